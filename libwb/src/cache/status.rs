//! What a cache says about itself.

use super::state::State;
use super::{Cache, Pace, Statistics, StuckBlocks, Tunables};
use crate::device::BlockDevice;
use crate::format::{PLACES, SEGMENT_BYTES, SegmentId, to_u64};
use crate::log::reach::{Reach, Seen};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A cache's state at one moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Size of the volume in bytes.
    pub volume_bytes: u64,
    /// Size of the log in bytes: all its segments.
    pub log_bytes: u64,
    /// Segments that the log holds.
    pub segments: u64,
    /// Segments that can take new data at once.
    pub free_segments: u64,
    /// Segments that are not written back.
    pub dirty_segments: u64,
    /// Blocks of 4 KiB whose newest version is not written back.
    pub dirty_blocks: u64,
    /// Blocks of 4 KiB that the cache holds a version of, dirty or clean.
    pub used_blocks: u64,
    /// How many places for blocks the log has.
    pub places: u64,
    /// The place that the next block takes, counted through the log's slots.
    pub next_place: u64,
    /// The segment of that place.
    pub current: SegmentId,
    /// The newest segment.
    pub newest: SegmentId,
    /// Every segment up to this one is on the cache device, perhaps in its volatile cache.
    pub written: SegmentId,
    /// Every segment up to this one survives a power cut.
    pub durable: SegmentId,
    /// Every segment up to this one is written back.
    pub written_back: SegmentId,
    /// For how long the oldest data that is not written back has been waiting; `None` where nothing
    /// waits, or nobody knows, as of what was in a cache of the base format.
    pub oldest_dirty: Option<Duration>,
    /// Write-back is paused.
    pub paused: bool,
    /// A batch is being written back.
    pub writing_back: bool,
    /// Why writes are refused, if they are.
    pub failure: Option<String>,
    /// Why write-back does not get on, if it does not.
    pub writeback_error: Option<String>,
    /// Blocks that cannot be written back while others can, if there are any.
    pub stuck: Option<StuckBlocks>,
    /// How long recovery took.
    pub recovery_time: Duration,
    /// How many bytes of the log it read.
    pub recovery_bytes: u64,
    /// The tunables in force.
    pub tunables: Tunables,
    /// Dirty blocks without those of the batch under way that have been written to the backing
    /// device. They count as dirty until all of the batch is durable there.
    pub blocks_to_write_back: u64,
    /// How fast write-back was in the last minute while it worked; `None` while it does not get on.
    pub writeback_pace: Option<Pace>,
    /// What was counted since the cache was opened, or since [`Cache::clear_statistics`].
    pub statistics: Statistics,
}

impl Cache {
    /// The state at this moment.
    pub fn status(&self) -> Status {
        let inner = &self.inner;
        let statistics = inner.statistics();
        let writeback_error = inner.counters.last_writeback_error().map(|error| error.to_string());
        let mut state = inner.lock();
        let (current, next_place) = state.cursor();
        let writeback_pace =
            state.rate.pace(inner.runtime.now()).filter(|_| writeback_error.is_none());
        Status {
            volume_bytes: inner.backing.size(),
            log_bytes: state.geometry.lap() * to_u64(SEGMENT_BYTES),
            segments: state.geometry.lap(),
            free_segments: state.all_free_slots(),
            dirty_segments: state.dirty_segments(),
            dirty_blocks: state.dirty_blocks,
            used_blocks: to_u64(state.index.len()),
            places: state.geometry.lap() * u64::from(PLACES),
            next_place,
            current,
            newest: state.newest,
            written: state.written,
            durable: state.durable,
            written_back: state.written_back,
            oldest_dirty: state.oldest_dirty(inner.runtime.wall_clock()),
            paused: state.paused,
            writing_back: state.rate.is_working(),
            failure: state.failure.as_ref().map(ToString::to_string),
            writeback_error,
            stuck: state.stuck_blocks(),
            recovery_time: inner.recovery_time,
            recovery_bytes: inner.recovery_bytes,
            tunables: self.tunables(),
            blocks_to_write_back: state.dirty_blocks.saturating_sub(state.throttle.done()),
            writeback_pace,
            statistics,
        }
    }
}

impl Cache {
    /// Which cache it is, and how far it has come for good; `None` for one of the base format,
    /// which has no identity.
    pub fn seen(&self) -> Option<Seen> {
        let inner = &self.inner;
        let uuid = inner.extension.as_ref()?.uuid;
        let state = inner.lock();
        let reach = Reach { durable: state.durable, written_back: state.written_back };
        Some(Seen { uuid, generation: inner.generation.load(Ordering::Relaxed), reach })
    }
}

impl State {
    /// The segment that takes the next block, and the place for it, counted through the slots.
    fn cursor(&self) -> (SegmentId, u64) {
        let open = self.open.as_ref().filter(|open| open.length < PLACES);
        let (id, length) = open.map_or((self.newest.next(), 0), |open| (open.id, open.length));
        (id, u64::from(self.geometry.slot_of(id).0) * u64::from(PLACES) + u64::from(length))
    }
}
