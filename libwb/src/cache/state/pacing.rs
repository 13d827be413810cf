//! Back-pressure before the log is full.
//!
//! When few slots are free, writes are *paced*. Each is delayed a little, so that the free places
//! last until the current batch is written back. On a full log, the rate of writes settles at the
//! rate of write-back. Otherwise all writes would stall until a batch ends.

use super::segment_log::SegmentLog;
use crate::format::{PLACES, to_u64};
use std::time::Duration;

/// Writes are paced when less than this part of the slots is free: one slot in this many.
pub const PACING_DIVISOR: u64 = 3;
/// How much of the free places is to be left at the end of a batch: one place in this many. The
/// batch may take longer than expected, and the next one has to begin.
const RESERVE_DIVISOR: u64 = 8;
/// Before this many blocks of the first batch are written back, nothing is known of how long one
/// takes.
const FIRST_BLOCKS: u64 = 64;

/// The longest delay of a paced write. After that, it waits only if the log is full. The delay is
/// computed as if segments were full, so it may be wrong if flushes close segments almost empty.
const LONGEST: Duration = Duration::from_millis(500);

/// When writes may go.
#[derive(Default)]
pub(crate) struct Pacing {
    /// The time that write-back takes for a block, as measured of late; zero before it was.
    per_block: Duration,
    batch: Option<Batch>,
    /// How many blocks the batch before it had.
    last_blocks: u64,
    /// When the next write may go.
    next: Duration,
    /// Up to where in the log places were charged for, counted from its beginning.
    charged: u64,
}

/// What is being written back.
struct Batch {
    began: Duration,
    blocks: u64,
    /// How many of them are on the backing device.
    done: u64,
}

impl Pacing {
    /// A batch of this many blocks is to be written back.
    pub(crate) fn begin(&mut self, now: Duration, blocks: u64) {
        self.batch = Some(Batch { began: now, blocks, done: 0 });
    }

    /// This many blocks of it have been written.
    pub(crate) fn progressed(&mut self, blocks: u64, now: Duration) {
        let Some(batch) = &mut self.batch else { return };
        batch.done = (batch.done + blocks).min(batch.blocks);
        if self.per_block.is_zero() && batch.done >= FIRST_BLOCKS {
            self.per_block = now.saturating_sub(batch.began) / clamped(batch.done);
        }
    }

    /// The batch is over. `is_typical`: it has been written back, in the time that this takes.
    pub(crate) fn end(&mut self, now: Duration, is_typical: bool) {
        let batch = self.batch.take().filter(|batch| is_typical && batch.blocks > 0);
        let Some(batch) = batch else { return };
        self.last_blocks = batch.blocks;
        let per_block = now.saturating_sub(batch.began) / clamped(batch.blocks);
        let is_first = self.per_block.is_zero();
        self.per_block = if is_first { per_block } else { (self.per_block * 3 + per_block) / 4 };
    }

    /// How many blocks of the batch under way have been written.
    pub(crate) fn done(&self) -> u64 {
        self.batch.as_ref().map_or(0, |batch| batch.done)
    }

    /// Whether few slots are free, and it is known how long write-back takes.
    #[inline]
    pub(crate) fn is_due(&self, log: &SegmentLog) -> bool {
        let few_are_free = log.free_slots() * PACING_DIVISOR < log.geometry().lap();
        few_are_free && !self.per_block.is_zero()
    }

    /// Charges for a write of this many blocks, and says how long it is to wait.
    pub(crate) fn admit(
        &mut self,
        log: &SegmentLog,
        is_pacing: bool,
        now: Duration,
        blocks: usize,
    ) -> Duration {
        let taken = log.places_taken();
        if !is_pacing {
            self.charged = taken;
            self.next = now;
            return Duration::ZERO;
        }
        let price = self.price(log);
        // A flush may close a segment with unused places; the writer is charged for these, too. If
        // more than a segment's places are gone, writes that were not paced took them.
        let since = taken.saturating_sub(self.charged);
        let wasted = if since <= u64::from(PLACES) { since } else { 0 };
        self.charged = self.charged.max(taken) + to_u64(blocks);
        let start = self.next.max(now).min(now + LONGEST);
        self.next = start + price.saturating_mul(clamped(to_u64(blocks) + wasted));
        start - now
    }

    /// How long a write waits for each place that it takes.
    fn price(&self, log: &SegmentLog) -> Duration {
        let (blocks, left) = match &self.batch {
            Some(batch) => (batch.blocks, batch.blocks - batch.done),
            // The next one, taken to be as large.
            None => (self.last_blocks, self.last_blocks),
        };
        let total = self.per_block.saturating_mul(clamped(left + blocks / RESERVE_DIVISOR));
        total / clamped(log.free_places())
    }
}

/// As a factor or divisor of a time.
fn clamped(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::head::Entry;
    use crate::cache::state::ages::Ages;
    use crate::cache::state::index::Index;
    use crate::cache::state::segment_log::{Appended, Resumed};
    use crate::cache::state::wait::Reserve;
    use crate::format::{
        BlockNo, DirtyBits, Geometry, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, SegmentId,
    };
    use crate::rules::Rules;

    /// Takes a place, and lets the appender have written what that seals.
    fn write(log: &mut SegmentLog, block: u64) {
        log.take_place(Entry::new(BlockNo(block), DirtyBits::ALL), Reserve::Keep, |_| ())
            .expect("there is room");
        while let Some(job) = log.start_next_job() {
            let id = job.id;
            let (first, crcs) = (job.first, Vec::new());
            log.appended(&Appended { id, first, crcs, commit: None, is_durable: false });
            log.made_durable(log.written_position());
        }
    }

    #[test]
    fn the_free_places_last_until_a_batch_is_written_back_and_each_write_waits_about_as_long() {
        const BATCH_SEGMENTS: u64 = 10;
        let geometry = Geometry::of_device(SUPERBLOCK_REGION_BYTES + 40 * to_u64(SEGMENT_BYTES))
            .expect("40 slots");
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
        let mut blocks = 0..;
        while log.free_slots() > BATCH_SEGMENTS + 1 {
            write(&mut log, blocks.next().expect("endless"));
        }
        let per_block = Duration::from_millis(1);
        let batch = BATCH_SEGMENTS * u64::from(PLACES);
        let mut pacing = Pacing::default();
        assert!(!pacing.is_due(&log), "nothing is known of write-back");
        pacing.per_block = per_block;
        pacing.begin(Duration::ZERO, batch);
        assert!(pacing.is_due(&log));
        let (mut now, mut done, mut waits) = (Duration::ZERO, 0, Vec::new());
        while done < batch {
            let wait = pacing.admit(&log, true, now, 1);
            now += wait;
            waits.push(wait);
            write(&mut log, blocks.next().expect("endless"));
            let by_now = u64::try_from(now.as_millis()).expect("short").min(batch);
            pacing.progressed(by_now - done, now);
            done = by_now;
        }
        assert!((1..=3).contains(&log.free_slots()), "{} slots are left", log.free_slots());
        let (shortest, longest) = (waits[1..].iter().min(), waits.iter().max());
        let is_even = shortest > Some(&(per_block * 4 / 5)) && longest < Some(&(per_block * 5 / 4));
        assert!(is_even, "{waits:?}");
    }
}
