//! Since when data waits to be written back: a moment for each slot, for people to read.

use super::state::State;
use crate::format::{SegmentId, Slot};
use std::time::Duration;

/// When the segment of each slot was begun, or, before this cache was opened, written: in seconds
/// of the wall clock. 0 where nobody knows, as in the base format.
pub(super) struct Ages(Box<[u32]>);

impl Ages {
    pub(super) fn new(slots: u32) -> Ages {
        Ages(vec![0; slots as usize].into())
    }

    /// A slot has data of this time.
    pub(super) fn set(&mut self, slot: Slot, time: Duration) {
        self.0[slot.0 as usize] = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    }
}

impl State {
    /// Segments after `before` have been begun, at this time.
    pub(super) fn begun(&mut self, before: SegmentId, time: Duration) {
        for id in (before.next().0..=self.newest.0).map(SegmentId) {
            self.ages.set(self.geometry.slot_of(id), time);
        }
    }

    /// For how long the oldest data that is not written back has been waiting; `None` where nobody
    /// knows, or nothing waits.
    pub(super) fn oldest_dirty(&self, now: Duration) -> Option<Duration> {
        let oldest = (self.dirty_blocks > 0).then(|| self.written_back.next())?;
        let since = self.ages.0[self.geometry.slot_of(oldest).0 as usize];
        (since > 0).then(|| now.saturating_sub(Duration::from_secs(since.into())))
    }
}
