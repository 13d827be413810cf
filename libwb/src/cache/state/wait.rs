//! What a request may have to wait for.

use crate::format::BlockNo;

/// Why something must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// For a slot: write-back must catch up.
    Slot,
    /// For the appender: too many segments are sealed.
    Appender,
    /// For the range lock on this block.
    RangeLock(BlockNo),
}

/// Whether a block may take one of the reserved slots. They are kept for moved blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reserve {
    Use,
    Keep,
}
