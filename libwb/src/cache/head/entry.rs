//! What a frame says of one block.

use crate::format::{BlockNo, DirtyBits};

const DISCARDED: u8 = 1;
const LOST: u8 = 2;

/// What a frame says of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) block: BlockNo,
    pub(crate) dirty: DirtyBits,
    /// These are the zeros of a discard.
    pub(crate) discarded: bool,
    /// The data is not what the block should hold.
    pub(crate) lost: bool,
}

impl Entry {
    /// Of an ordinary block.
    pub(crate) fn new(block: BlockNo, dirty: DirtyBits) -> Entry {
        Entry { block, dirty, discarded: false, lost: false }
    }

    /// As it is stored: in one word, so that it changes in one step.
    pub(super) fn encode(self) -> u64 {
        let flags = if self.discarded { DISCARDED } else { 0 } | if self.lost { LOST } else { 0 };
        self.block.0 << 16 | u64::from(flags) << 8 | u64::from(self.dirty.0)
    }

    /// `None` if a flag is unknown.
    pub(super) fn decode(word: u64) -> Option<Entry> {
        let [dirty, flags, ..] = word.to_le_bytes();
        (flags & !(DISCARDED | LOST) == 0).then_some(Entry {
            block: BlockNo(word >> 16),
            dirty: DirtyBits(dirty),
            discarded: flags & DISCARDED != 0,
            lost: flags & LOST != 0,
        })
    }
}
