//! What a cache says about itself.

use super::latency::Timed;
use super::statistics::Statistics;
use crate::cache::engine::Engine;
use crate::cache::state::rate::Pace;
use crate::cache::state::stuck::StuckBlocks;
use crate::cache::tunables::Tunables;
use crate::device::{BlockDevice, LinkStatus};
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
    /// How long the oldest dirty data has been waiting for write-back. `None` if nothing waits, or
    /// its age is unknown, as in the base format.
    pub oldest_dirty: Option<Duration>,
    /// Write-back is paused.
    pub paused: bool,
    /// A batch is being written back.
    pub writing_back: bool,
    /// Why writes are refused, if they are.
    pub failure: Option<String>,
    /// Why write-back fails, if it does.
    pub writeback_error: Option<String>,
    /// How the connection to the backing device is, if that is on a server.
    pub link: Option<LinkStatus>,
    /// Blocks that cannot be written back while others can, if there are any.
    pub stuck: Option<StuckBlocks>,
    /// How long recovery took.
    pub recovery_time: Duration,
    /// How many bytes of the log it read.
    pub recovery_bytes: u64,
    /// The tunables in force.
    pub tunables: Tunables,
    /// Dirty blocks that are not yet on the backing device. Blocks of the batch under way count as
    /// dirty until all of the batch is durable there.
    pub blocks_to_write_back: u64,
    /// How fast write-back was in the last minute while it worked; `None` while it fails, or waits
    /// for a lost connection.
    pub writeback_pace: Option<Pace>,
    /// What was counted since the cache was opened, or its counters were told to start anew.
    pub statistics: Statistics,
}

impl Engine {
    /// The state at this moment.
    pub(crate) fn status(&self) -> Status {
        let statistics = self.statistics();
        let writeback_error = self.counters.last_writeback_error().map(|error| error.to_string());
        let link = self.backing.link();
        let works = writeback_error.is_none() && link.as_ref().is_none_or(|it| !it.is_awaited());
        let now = self.runtime.now();
        let mut visit = self.state.lock();
        let state = &mut *visit;
        let (log, writeback) = (&state.log, &state.writeback);
        let (current, next_place) = log.cursor();
        let segments = log.geometry().lap();
        Status {
            volume_bytes: self.backing.size(),
            log_bytes: segments * to_u64(SEGMENT_BYTES),
            segments,
            free_segments: log.all_free_slots(),
            dirty_segments: log.dirty_segments(),
            dirty_blocks: log.dirty_blocks(),
            used_blocks: to_u64(log.used_blocks()),
            places: segments * u64::from(PLACES),
            next_place,
            current,
            newest: log.newest(),
            written: log.written(),
            durable: log.durable(),
            written_back: log.written_back(),
            oldest_dirty: log.oldest_dirty(self.runtime.wall_clock()),
            paused: writeback.is_paused(),
            writing_back: writeback.is_working(),
            failure: state.lifecycle.failure().map(ToString::to_string),
            stuck: state.stuck.report(log),
            recovery_time: self.recovery_time,
            recovery_bytes: self.recovery_bytes,
            tunables: self.tunables.lock().clone(),
            blocks_to_write_back: log.dirty_blocks().saturating_sub(writeback.blocks_done()),
            writeback_pace: writeback.pace(now).filter(|_| works),
            writeback_error,
            link,
            statistics,
        }
    }

    /// Which cache it is, and how far it has come for good; `None` for one of the base format,
    /// which has no identity.
    pub(crate) fn seen(&self) -> Option<Seen> {
        let uuid = self.extension.as_ref()?.uuid;
        let state = self.state.lock();
        let (durable, written_back) = (state.log.durable(), state.log.written_back());
        let reach = Reach { durable, written_back };
        Some(Seen { uuid, generation: self.generation.load(Ordering::Relaxed), reach })
    }

    fn counted(&self) -> Statistics {
        Statistics {
            time: self.runtime.now(),
            counters: self.counters.get(),
            accesses: self.state.lock().accesses.get(),
            latencies: self.latencies.get(),
        }
    }

    fn statistics(&self) -> Statistics {
        self.baseline.since(|| self.counted())
    }

    /// Lets all counters start anew.
    pub(crate) fn clear_statistics(&self) {
        self.baseline.set(&*self.runtime);
    }

    /// Notes how long a request took, as its front end saw it.
    pub(crate) fn took(&self, request: Timed, time: Duration) {
        self.latencies.add(request, time);
    }
}
