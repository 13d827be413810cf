//! Segments that are written back and hold data that is older than the backing device's.
//!
//! wb never reads them. But the kernel module takes every segment in the log for a read cache. So
//! they are emptied before a discard or a write around the log is acknowledged.
//!
//! A segment counts as emptied once its header was written *and* the device flushed after that.
//! Until then it is *in doubt*, whatever a read of it shows.

use super::segment_log::SegmentLog;
use crate::format::{BlockNo, SegmentId};
use std::collections::BTreeSet;
use std::ops::Range;

pub(crate) struct StaleSegments {
    /// Up to where segments may be stale. The index does not know what was written back or admitted
    /// before the cache was opened, so the first discard begins with all of that.
    up_to: SegmentId,
    /// Up to where they were emptied, except for those in doubt.
    emptied: SegmentId,
    /// Written-back segments that were to be emptied, or found damaged, and are not known to be
    /// empty durably.
    in_doubt: BTreeSet<SegmentId>,
    /// Up to where the index does not know all that segments hold: those from before the cache was
    /// opened.
    unindexed: SegmentId,
}

impl StaleSegments {
    /// Of a cache that is being opened: the index does not know all of the segments up to
    /// `unindexed`, and `damaged` ones are written back.
    pub(crate) fn new(unindexed: SegmentId, damaged: BTreeSet<SegmentId>) -> StaleSegments {
        StaleSegments { up_to: unindexed, emptied: SegmentId::NONE, in_doubt: damaged, unindexed }
    }

    /// The backing device gets a newer version of a block than this segment holds.
    pub(crate) fn outdated(&mut self, id: SegmentId) {
        self.up_to = self.up_to.max(id);
    }

    /// Up to where segments may be stale.
    pub(crate) fn up_to(&self) -> SegmentId {
        self.up_to
    }

    /// The segments in doubt.
    pub(crate) fn in_doubt(&self) -> &BTreeSet<SegmentId> {
        &self.in_doubt
    }

    /// The oldest segment that is to be emptied, apart from those in doubt.
    pub(crate) fn first_to_empty(&self, log: &SegmentLog) -> SegmentId {
        let oldest = log.newest().minus(log.geometry().lap());
        self.emptied.max(oldest).next()
    }

    /// All segments up to this one were emptied, except for those in doubt.
    pub(crate) fn emptied_up_to(&mut self, id: SegmentId) {
        self.emptied = self.emptied.max(id);
    }

    /// Notes that a segment is in doubt. Returns whether it was before.
    pub(crate) fn doubt(&mut self, id: SegmentId) -> bool {
        !self.in_doubt.insert(id)
    }

    /// A segment is empty durably, or its slot holds a newer one.
    pub(crate) fn trust(&mut self, id: SegmentId) {
        self.in_doubt.remove(&id);
    }

    /// Whether all stale segments were emptied, and none in doubt may hold some of these blocks.
    pub(crate) fn are_harmless_to(&self, blocks: &Range<BlockNo>, log: &SegmentLog) -> bool {
        self.emptied >= self.up_to
            && !self.in_doubt.iter().any(|&id| self.may_hold(id, blocks, log))
    }

    /// Whether a segment may hold some of these blocks, in whatever version.
    pub(crate) fn may_hold(
        &self,
        id: SegmentId,
        blocks: &Range<BlockNo>,
        log: &SegmentLog,
    ) -> bool {
        let is_there = log.id_of(log.geometry().slot_of(id)) == id;
        is_there && (id <= self.unindexed || log.holds_any(id, blocks))
    }
}
