//! Back-pressure before the log is full.
//!
//! From [`TIGHT`] on, writes are paced so that the slots that are free outlast the batch that is
//! being written back: each write waits for its turn, at the rate at which the free places are to
//! be used up until the batch has been written. So a full log settles where writes come in as fast
//! as they go out, each a little late, instead of all stopping until a batch is done.

use super::state::State;
use crate::format::{PLACES, to_u64};
use std::time::Duration;

/// Writes are paced when less than this part of the slots is free: one in so many.
pub(super) const TIGHT: u64 = 3;
/// How much of the free places is to be left at the end of a batch, for it may take longer than
/// expected, and the next one has to begin: one in so many.
const RESERVE: u64 = 8;
/// Before so many blocks of the first batch are written back, nobody knows how long one takes.
const FIRST_BLOCKS: u64 = 64;

/// No write waits longer for its turn. Beyond that it waits for a slot, as all do when the log is
/// full: a price that was measured on full segments says little where flushes close them almost
/// empty.
const LONGEST: Duration = Duration::from_millis(500);

/// When writes may go.
#[derive(Default)]
pub(super) struct Throttle {
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

impl Throttle {
    /// A batch of so many blocks is to be written back.
    pub(super) fn begin(&mut self, now: Duration, blocks: u64) {
        self.batch = Some(Batch { began: now, blocks, done: 0 });
    }

    /// So many blocks of it have been written.
    pub(super) fn progressed(&mut self, blocks: u64, now: Duration) {
        let Some(batch) = &mut self.batch else { return };
        batch.done = (batch.done + blocks).min(batch.blocks);
        if self.per_block.is_zero() && batch.done >= FIRST_BLOCKS {
            self.per_block = now.saturating_sub(batch.began) / clamped(batch.done);
        }
    }

    /// The batch has been written back, or could not be.
    pub(super) fn end(&mut self, now: Duration, succeeded: bool) {
        let Some(batch) = self.batch.take().filter(|batch| succeeded && batch.blocks > 0) else {
            return;
        };
        self.last_blocks = batch.blocks;
        let per_block = now.saturating_sub(batch.began) / clamped(batch.blocks);
        self.per_block =
            if self.per_block.is_zero() { per_block } else { (self.per_block * 3 + per_block) / 4 };
    }

    /// How many blocks of the batch under way have been written.
    pub(super) fn done(&self) -> u64 {
        self.batch.as_ref().map_or(0, |batch| batch.done)
    }

    /// The time that write-back takes for a block, if it is known.
    pub(super) fn per_block(&self) -> Option<Duration> {
        (!self.per_block.is_zero()).then_some(self.per_block)
    }
}

impl State {
    /// Whether writes are paced. Where nothing is written back, for it is paused or others keep the
    /// disk busy, that would free no slot.
    pub(super) fn is_tight(&self) -> bool {
        let few_are_free = self.free_slots() * TIGHT < self.geometry.lap();
        few_are_free && self.writing_back && self.throttle.per_block().is_some()
    }

    /// Charges for a write of so many blocks, and says how long it is to wait.
    pub(super) fn admit(&mut self, now: Duration, blocks: usize) -> Duration {
        let position = self.position();
        if !self.is_tight() {
            self.throttle.charged = position;
            self.throttle.next = now;
            return Duration::ZERO;
        }
        let price = self.price();
        let throttle = &mut self.throttle;
        // A flush closes a segment with places left, and what that wastes is paid for as well. More
        // than that was not wasted but taken by writes that were not paced.
        let since = position.saturating_sub(throttle.charged);
        let wasted = if since <= u64::from(PLACES) { since } else { 0 };
        throttle.charged = throttle.charged.max(position) + to_u64(blocks);
        let start = throttle.next.max(now).min(now + LONGEST);
        throttle.next = start + price.saturating_mul(clamped(to_u64(blocks) + wasted));
        start - now
    }

    /// How long a write waits for each place that it takes.
    fn price(&self) -> Duration {
        let free = self.places_left();
        let (blocks, left) = match &self.throttle.batch {
            Some(batch) => (batch.blocks, batch.blocks - batch.done),
            // The next one, taken to be as large.
            None => (self.throttle.last_blocks, self.throttle.last_blocks),
        };
        self.throttle.per_block.saturating_mul(clamped(left + blocks / RESERVE)) / clamped(free)
    }

    /// How many blocks may be written until a batch is done.
    fn places_left(&self) -> u64 {
        let in_open = self.open.as_ref().map_or(0, |open| PLACES - open.length);
        self.free_slots() * u64::from(PLACES) + u64::from(in_open)
    }

    /// How many places the log has taken since its beginning.
    fn position(&self) -> u64 {
        let in_open = self.open.as_ref().map_or(u64::from(PLACES), |open| u64::from(open.length));
        self.newest.minus(1).0 * u64::from(PLACES) + in_open
    }
}

/// As a factor or divisor of a time.
fn clamped(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::index::Index;
    use crate::format::{
        BlockNo, DirtyBits, Geometry, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, SegmentId,
    };

    /// Takes a place, and lets the appender have written what that seals.
    fn write(state: &mut State, block: u64) {
        state.take_place(BlockNo(block), DirtyBits::ALL).expect("there is room");
        while let Some(id) = state.sealed.front().map(|sealed| sealed.id) {
            state.segment_written(id);
        }
    }

    #[test]
    fn the_free_places_last_until_a_batch_is_written_back_and_each_write_waits_about_as_long() {
        const BATCH_SEGMENTS: u64 = 10;
        let geometry = Geometry::of_device(SUPERBLOCK_REGION_BYTES + 40 * to_u64(SEGMENT_BYTES))
            .expect("40 slots");
        let mut state =
            State::new(geometry, Index::new(geometry, true), SegmentId::NONE, SegmentId::NONE);
        let mut blocks = 0..;
        while state.free_slots() > BATCH_SEGMENTS + 1 {
            write(&mut state, blocks.next().expect("endless"));
        }
        let per_block = Duration::from_millis(1);
        state.throttle.per_block = per_block;
        let batch = BATCH_SEGMENTS * u64::from(PLACES);
        state.throttle.begin(Duration::ZERO, batch);
        assert!(!state.is_tight(), "nothing is written back");
        state.writing_back = true;
        assert!(state.is_tight());
        let (mut now, mut done, mut waits) = (Duration::ZERO, 0, Vec::new());
        while done < batch {
            let wait = state.admit(now, 1);
            now += wait;
            waits.push(wait);
            write(&mut state, blocks.next().expect("endless"));
            let by_now = u64::try_from(now.as_millis()).expect("short").min(batch);
            state.throttle.progressed(by_now - done, now);
            done = by_now;
        }
        assert!((1..=3).contains(&state.free_slots()), "{} slots are left", state.free_slots());
        let (shortest, longest) = (waits[1..].iter().min(), waits.iter().max());
        assert!(
            shortest > Some(&(per_block * 4 / 5)) && longest < Some(&(per_block * 5 / 4)),
            "{waits:?}"
        );
    }
}
