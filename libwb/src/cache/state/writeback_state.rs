//! Who waits for write-back, how it gets on, and what holds it up.

use super::pacing::Pacing;
use super::rate::{Pace, Rate};
use super::segment_log::SegmentLog;
use crate::device::DeviceError;
use crate::format::SegmentId;
use std::time::Duration;

/// The log is written back, whatever the load, when less than this part of it is free: one slot in
/// this many.
pub const URGENT_BELOW: u64 = 8;
/// The most segments in a batch, as `nr_max_batched_writeback` has it.
const LARGEST_BATCH: u64 = 4096;
/// A batch takes at most this part of the log: one segment in this many. Its slots become free only
/// when the whole batch is done; until then, writes have only the other slots. On the other hand,
/// a larger batch needs shorter seeks for each block.
const BATCH_DIVISOR: u64 = 4;
/// But a batch need not be smaller than this.
const SMALL_BATCH: u64 = 8;

/// How busy the volume is.
#[derive(Clone, Copy, Default)]
pub(crate) struct Load {
    /// Nothing was written in the last period.
    pub(crate) idle: bool,
    /// The utilization of the backing device in that period, without write-back, in percent.
    pub(crate) percent: u32,
}

#[derive(Default)]
pub(crate) struct WritebackState {
    /// Write-back is to reach these segments, whatever the policy says.
    drains: Vec<SegmentId>,
    /// Writers that wait for a slot.
    waiting_for_slot: usize,
    /// Nothing is written back except for a drain, or when there is no choice.
    paused: bool,
    /// There is something to write back now.
    has_work: bool,
    pacing: Pacing,
    rate: Rate,
    /// The newest segment with a newer version of a block that cannot be read. Once both versions
    /// are in one batch, the older is not needed.
    replaced_by: SegmentId,
    /// How often write-back has stopped because a device failed.
    stops: u64,
    /// Write-back has failed for long: writes that would wait for a slot fail, unless the link to
    /// the backing device is down.
    jammed: Option<DeviceError>,
    /// The record on the device may cover more: a write of it is under way, or has failed.
    record_in_doubt: bool,
    events: Happened,
}

/// Counts what others wait for.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Happened {
    /// A drain or a writer began to wait, or a pause ended.
    pub(crate) asked: u64,
    /// A batch ended, well or not.
    pub(crate) ended: u64,
}

impl WritebackState {
    #[inline]
    pub(crate) fn happened(&self) -> Happened {
        self.events
    }

    /// Write-back is to reach a segment, whatever the policy says.
    pub(crate) fn begin_drain(&mut self, to: SegmentId) {
        self.drains.push(to);
        self.events.asked += 1;
    }

    /// Ends a [`WritebackState::begin_drain`].
    pub(crate) fn end_drain(&mut self, to: SegmentId) {
        if let Some(nth) = self.drains.iter().position(|&drain| drain == to) {
            self.drains.swap_remove(nth);
        }
    }

    /// Whether a drain has yet to be served.
    pub(crate) fn is_draining(&self, log: &SegmentLog) -> bool {
        self.drains.iter().any(|&to| to > log.written_back())
    }

    /// A writer waits for a slot.
    pub(crate) fn begin_wait_for_slot(&mut self) {
        self.waiting_for_slot += 1;
        self.events.asked += 1;
    }

    /// Ends a [`WritebackState::begin_wait_for_slot`].
    pub(crate) fn end_wait_for_slot(&mut self) {
        self.waiting_for_slot -= 1;
    }

    pub(crate) fn pause(&mut self) {
        self.paused = true;
    }

    pub(crate) fn resume(&mut self) {
        self.paused = false;
        self.events.asked += 1;
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether the log is nearly full.
    fn is_urgent(log: &SegmentLog) -> bool {
        log.free_slots() * URGENT_BELOW < log.geometry().lap()
    }

    /// Whether a request waits for write-back.
    fn is_awaited(&self, log: &SegmentLog) -> bool {
        self.is_draining(log) || self.waiting_for_slot > 0
    }

    /// Whether a request waits for write-back, or soon will.
    pub(crate) fn is_pressed(&self, log: &SegmentLog) -> bool {
        WritebackState::is_urgent(log) || self.is_awaited(log)
    }

    /// Whether it is time to write back. Under a load of `threshold` percent or more, neither an
    /// idle volume nor a half-full log is a reason. `at_once`: nothing is to stay in the log.
    pub(crate) fn is_time(
        &self,
        log: &SegmentLog,
        load: Load,
        threshold: u32,
        at_once: bool,
    ) -> bool {
        if self.is_awaited(log) || self.jammed.is_some() {
            return true;
        }
        if self.paused {
            return false;
        }
        if at_once && log.dirty_segments() > 0 {
            return true;
        }
        let half_full = log.dirty_segments() * 2 >= log.geometry().lap();
        WritebackState::is_urgent(log) || ((load.idle || half_full) && load.percent < threshold)
    }

    /// How many segments a batch may take. If the volume is idle or a drain waits, this is at least
    /// the number of free slots.
    pub(crate) fn largest_batch(&self, log: &SegmentLog, load: Load) -> u64 {
        let part = (log.geometry().lap() / BATCH_DIVISOR).max(SMALL_BATCH);
        let calm = load.idle || self.is_draining(log);
        if calm { part.max(log.free_slots()) } else { part }
    }

    /// A block cannot be read where it is to be written back from, and this segment has a newer
    /// version.
    pub(crate) fn replaced_by(&mut self, id: SegmentId) {
        self.replaced_by = self.replaced_by.max(id);
    }

    /// The segment up to which a batch must reach so that newer versions replace unreadable blocks.
    /// `None` if it lies after `reached`, or the batch would exceed [`LARGEST_BATCH`]: each block
    /// takes memory.
    pub(crate) fn replacement(&self, log: &SegmentLog, reached: SegmentId) -> Option<SegmentId> {
        let furthest = reached.min(log.written_back().plus(LARGEST_BATCH));
        Some(self.replaced_by).filter(|&id| id <= furthest)
    }

    /// Notes whether there is something to write back now.
    pub(crate) fn note_work(&mut self, has_work: bool) {
        self.has_work = has_work;
    }

    /// A batch is chosen.
    pub(crate) fn batch_chosen(&mut self, now: Duration) {
        self.rate.begin(now);
    }

    /// A batch of this many blocks is to be written.
    pub(crate) fn batch_begun(&mut self, now: Duration, blocks: u64) {
        self.pacing.begin(now, blocks);
    }

    /// This much of a batch is on the backing device.
    pub(crate) fn wrote(&mut self, bytes: u64, blocks: u64, now: Duration) {
        self.pacing.progressed(blocks, now);
        self.rate.wrote(bytes, blocks, now);
    }

    /// These blocks of a batch were discarded instead of written.
    pub(crate) fn gave_up(&mut self, blocks: u64, now: Duration) {
        self.pacing.progressed(blocks, now);
    }

    /// The blocks of a batch are written, or not all could be. `is_typical`: they all are, and took
    /// the time that a batch takes.
    pub(crate) fn batch_written(&mut self, now: Duration, is_typical: bool) {
        self.pacing.end(now, is_typical);
    }

    /// A batch has ended, well or not.
    pub(crate) fn batch_ended(&mut self, now: Duration) {
        self.rate.end(now);
        self.events.ended += 1;
    }

    /// Whether a batch is under way.
    pub(crate) fn is_working(&self) -> bool {
        self.rate.is_working()
    }

    /// How fast write-back was in the last minute while it worked.
    pub(crate) fn pace(&self, now: Duration) -> Option<Pace> {
        self.rate.pace(now)
    }

    /// How many blocks of the batch under way are written.
    pub(crate) fn blocks_done(&self) -> u64 {
        self.pacing.done()
    }

    /// Write-back has stopped because a device failed.
    pub(crate) fn stopped(&mut self) {
        self.stops += 1;
        self.events.ended += 1;
    }

    /// Some blocks could not be written back; why is known now.
    pub(crate) fn failed(&mut self) {
        self.events.ended += 1;
    }

    /// How often write-back has stopped.
    pub(crate) fn stops(&self) -> u64 {
        self.stops
    }

    /// Writes that would wait for a slot fail from now on; or they wait again.
    pub(crate) fn set_jammed(&mut self, jammed: Option<DeviceError>) {
        self.events.ended += u64::from(jammed.is_some());
        self.jammed = jammed;
    }

    /// Why writes that would wait for a slot fail, if they do.
    pub(crate) fn jammed(&self) -> Option<&DeviceError> {
        self.jammed.as_ref()
    }

    pub(crate) fn set_record_in_doubt(&mut self, in_doubt: bool) {
        self.record_in_doubt = in_doubt;
    }

    /// Whether the record on the device may cover more than is known.
    pub(crate) fn is_record_in_doubt(&self) -> bool {
        self.record_in_doubt
    }

    /// Whether writes are paced. Pacing would be useless while write-back is paused, or held off by
    /// a busy disk.
    #[inline]
    pub(crate) fn is_pacing(&self, log: &SegmentLog) -> bool {
        self.has_work && self.pacing.is_due(log)
    }

    /// Charges for a write of this many blocks, and says how long it is to wait.
    pub(crate) fn admit(&mut self, log: &SegmentLog, now: Duration, blocks: usize) -> Duration {
        let is_pacing = self.is_pacing(log);
        self.pacing.admit(log, is_pacing, now, blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::head::Entry;
    use crate::cache::state::ages::Ages;
    use crate::cache::state::index::Index;
    use crate::cache::state::segment_log::Resumed;
    use crate::cache::state::wait::Reserve;
    use crate::format::{
        BlockNo, DirtyBits, Geometry, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, to_u64,
    };
    use crate::rules::Rules;

    #[test]
    fn writes_are_paced_only_while_there_is_something_to_write_back() {
        let bytes = SUPERBLOCK_REGION_BYTES + 4 * to_u64(SEGMENT_BYTES);
        let geometry = Geometry::of_device(bytes).expect("four slots");
        let (none, ages) = (SegmentId::NONE, Ages::new(geometry.slots()));
        let index = Index::new(geometry, true);
        let mut log = SegmentLog::new(
            geometry,
            index,
            none,
            none,
            ages,
            Resumed::nothing(),
            Rules::default(),
        );
        for block in 0..3 * 127 {
            log.take_place(Entry::new(BlockNo(block), DirtyBits::ALL), Reserve::Keep, |_| ())
                .expect("there is room");
        }
        let mut state = WritebackState::default();
        state.note_work(true);
        assert!(!state.is_pacing(&log), "nothing is known of write-back");
        state.batch_begun(Duration::ZERO, 100);
        state.batch_written(Duration::from_secs(1), true);
        assert!(state.is_pacing(&log));
        state.note_work(false);
        assert!(!state.is_pacing(&log));
    }
}
