//! How long data has been waiting for write-back: a moment for each slot, for people to read.

use crate::format::Slot;
use std::time::Duration;

/// When the segment of each slot was begun, in seconds of the wall clock. For segments from before
/// the cache was opened, when they were written. 0 where that is unknown, as in the base format.
pub(crate) struct Ages(Box<[u32]>);

impl Ages {
    pub(crate) fn new(slots: u32) -> Ages {
        Ages(vec![0; slots as usize].into())
    }

    /// A slot has data of this time.
    pub(crate) fn set(&mut self, slot: Slot, time: Duration) {
        self.0[slot.0 as usize] = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    }

    /// How old the data of a slot is, if that is known.
    pub(crate) fn age(&self, slot: Slot, now: Duration) -> Option<Duration> {
        let since = self.0[slot.0 as usize];
        (since > 0).then(|| now.saturating_sub(Duration::from_secs(since.into())))
    }
}
