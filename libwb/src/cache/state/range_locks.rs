//! Range locks: blocks that a request is changing on the backing device.
//!
//! Writes to a locked block wait: write-back of such a write could come between, and the change
//! would undo it. And no read of a locked block is admitted to the cache, for its data may be old
//! by then.

use crate::format::BlockNo;
use crate::rules::{Rule, Rules};
use std::ops::Range;

#[derive(Default)]
pub(crate) struct RangeLocks {
    locked: Vec<Range<BlockNo>>,
    /// How many locks have ended.
    released: u64,
    rules: Rules,
}

impl RangeLocks {
    pub(crate) fn new(rules: Rules) -> RangeLocks {
        RangeLocks { rules, ..RangeLocks::default() }
    }

    /// Whether a request is changing this block on the backing device.
    #[inline]
    pub(crate) fn is_locked(&self, block: BlockNo) -> bool {
        self.locked.iter().any(|blocks| blocks.contains(&block))
            && self.rules.keep(Rule::RangeLocksRespected)
    }

    /// Whether no range is locked.
    pub(crate) fn is_empty(&self) -> bool {
        self.locked.is_empty()
    }

    /// Whether none of these blocks is locked.
    pub(crate) fn is_free(&self, blocks: &Range<BlockNo>) -> bool {
        self.locked.iter().all(|other| other.end <= blocks.start || blocks.end <= other.start)
    }

    /// Locks blocks. None of them may be locked.
    pub(crate) fn lock(&mut self, blocks: Range<BlockNo>) {
        self.locked.push(blocks);
    }

    /// Ends a [`RangeLocks::lock`].
    pub(crate) fn unlock(&mut self, blocks: &Range<BlockNo>) {
        if let Some(nth) = self.locked.iter().position(|locked| locked == blocks) {
            self.locked.swap_remove(nth);
            self.released += 1;
        }
    }

    #[inline]
    pub(crate) fn released(&self) -> u64 {
        self.released
    }
}
