//! Write-back: oldest segments first, many at a time, sorted and merged; then the record.

use super::batch::{BatchOutcome, BatchStop};
use crate::cache::engine::Engine;
use crate::cache::state::State;
use crate::cache::state::segment_log::Item;
use crate::cache::state::shared::VISIT;
use crate::cache::state::stuck::Passage;
use crate::device::{BlockDevice, DeviceError};
use crate::format::{BLOCK_BYTES, BlockNo, PLACES, Record, SegmentId, to_u64};
use crate::log::segment_writes::write_record;
use crate::rules::Rule;
use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

/// What a batch is to write, and what it passes over.
#[derive(Default)]
struct Batch {
    items: Vec<Item>,
    /// Stuck blocks that are not tried, each with its segment.
    passed_over: Vec<(SegmentId, BlockNo)>,
}

impl Batch {
    /// Takes in some places of a segment of a batch that ends with `last`.
    fn add(
        &mut self,
        state: &State,
        (id, places): (SegmentId, Range<u8>),
        last: SegmentId,
        now: Duration,
    ) {
        let is_draining = state.writeback.is_draining(&state.log);
        for item in state.log.items_of(id, places, last) {
            match state.stuck.is_passed_over(item.block, is_draining, now) {
                true => self.passed_over.push((id, item.block)),
                false => self.items.push(item),
            }
        }
    }
}

impl Engine {
    /// Writes back every segment up to `last`, and then lets their slots be reused. Where some
    /// blocks cannot be written back, that goes for the segments before them.
    pub(super) async fn write_back(&self, last: SegmentId) -> Result<(), BatchStop> {
        let (started, link) = (self.runtime.now(), self.backing.link());
        let first = {
            let mut visit = self.state.lock();
            let state = &mut *visit;
            state.stuck.prune(&state.log);
            state.log.written_back().next()
        };
        let Batch { items, passed_over } = self.collect(first, last, started).await;
        self.state.lock().writeback.batch_begun(started, to_u64(items.len()));
        let written = async {
            let written = self.while_linked(self.write_items(items)).await?;
            self.pass(last, written, passed_over).await
        };
        let written = written.await;
        let is_done = written.as_ref().is_ok_and(|(_, stop)| stop.is_none());
        // Else its time says nothing of what the next batch takes.
        let is_typical = is_done && !self.has_waited_for_link(link.as_ref());
        self.state.lock().writeback.batch_written(self.runtime.now(), is_typical);
        let (up_to, stop) = written?;
        for id in (first.0..=up_to.0).map(SegmentId) {
            self.state.lock().log.segment_written_back(id);
            self.let_others().await;
        }
        stop.map_or(Ok(()), Err)
    }

    /// What a batch is to write, from segment `first` up to `last`.
    ///
    /// Blocks get newer versions between the visits to the state, but only beyond the batch. There
    /// they stand for none that a later visit finds. What an earlier one left out has a newer
    /// version within the batch, which does not change.
    async fn collect(&self, first: SegmentId, last: SegmentId, now: Duration) -> Batch {
        let mut batch = Batch::default();
        for id in (first.0..=last.0).map(SegmentId) {
            for place in (0..PLACES).step_by(VISIT.into()) {
                let visit = self.state.lock();
                let places = place..PLACES.min(place + VISIT);
                batch.add(&visit, (id, places), last, now);
                visit.give_way();
            }
            self.let_others().await;
        }
        batch
    }

    /// Of each of these blocks, the oldest segment up to `last` that holds anything of it and is
    /// not written back. Such segments do not change.
    async fn oldest_versions(
        &self,
        last: SegmentId,
        mut wanted: BTreeSet<BlockNo>,
    ) -> Vec<(SegmentId, BlockNo)> {
        let mut found = Vec::new();
        let first = self.state.lock().log.written_back().next();
        for id in (first.0..=last.0).map(SegmentId) {
            if wanted.is_empty() {
                break;
            }
            found.extend(self.state.lock().log.take_held(id, &mut wanted));
            self.let_others().await;
        }
        found
    }

    /// Moves blocks that were not written back, where that is allowed. Then records how far the log
    /// is written back. Returns this segment, and why write-back stopped there. If the batch wrote
    /// nothing, returns why to wait before the next one.
    async fn pass(
        &self,
        last: SegmentId,
        BatchOutcome { failed, any: wrote }: BatchOutcome,
        mut in_the_way: Vec<(SegmentId, BlockNo)>,
    ) -> Result<(SegmentId, Option<BatchStop>), BatchStop> {
        if let Some(failed) = failed.first().filter(|_| self.reaches_further_than(last)) {
            return Err(BatchStop::Device(failed.error.clone()));
        }
        // A newer version stands for an older one only if both are written back.
        let blocks = failed.iter().map(|failed| failed.block).collect();
        in_the_way.extend(self.oldest_versions(last, blocks).await);
        let any = !in_the_way.is_empty();
        let passage = {
            let tunables = self.tunables.lock().clone();
            let mut visit = self.state.lock();
            let state = &mut *visit;
            let (is_strict, has_crcs) = (state.is_strict(&tunables), self.digest.is_some());
            let movable = |lost: bool| !is_strict && (has_crcs || !lost);
            let now = self.runtime.now();
            state.stuck.passage(&state.log, last, failed, in_the_way, movable, now)
        };
        let Passage { mut up_to, moves, mut obstacle } = passage;
        if !self.rules.keep(Rule::StuckMoved) {
            (up_to, obstacle) = (last, None);
        } else if any {
            let moved = self.move_stuck(&moves, up_to).await;
            let (done, why) = moved.map_err(|_| BatchStop::Closing)?;
            if let Some((id, _)) = moves.get(done) {
                up_to = id.minus(1);
                obstacle = why.map(|error| (error, false)).or(obstacle);
            }
            // What was moved, and newer versions that stand for what was not: all that the record
            // relies on.
            if self.rules.keep(Rule::MovedMadeDurable) {
                self.flush_log().await.map_err(|_| BatchStop::Closing)?;
            }
        }
        if any && !wrote {
            // With nothing but such blocks in the log, they would be moved on and on.
            let mut visit = self.state.lock();
            let state = &mut *visit;
            let stuck = state.stuck.report(&state.log);
            obstacle = obstacle.or(stuck.map(|stuck| (stuck.error, true)));
        }
        if up_to > self.state.lock().log.written_back() {
            self.write_record(up_to).await?;
        }
        let stop = obstacle.map(|(error, may_be_moved)| match may_be_moved {
            true => BatchStop::Stuck(error),
            false => BatchStop::Device(error),
        });
        Ok((up_to, stop))
    }

    /// Whether the next batch is to go on after this segment: see
    /// [`State::reaches_further_than`].
    pub(super) fn reaches_further_than(&self, last: SegmentId) -> bool {
        let tunables = self.tunables.lock().clone();
        self.state.lock().reaches_further_than(last, &tunables)
    }

    /// Makes it durable that every segment up to `id` is written back.
    pub(crate) async fn write_record(&self, id: SegmentId) -> Result<(), DeviceError> {
        self.state.lock().writeback.set_record_in_doubt(true);
        write_record(&self.cache, Record { id, digest: self.digest }).await?;
        self.counters.cache_write_bytes.add(to_u64(BLOCK_BYTES));
        if self.rules.keep(Rule::RecordMadeDurable) {
            self.flush_cache_device().await?;
            self.state.lock().writeback.set_record_in_doubt(false);
        }
        Ok(())
    }
}
