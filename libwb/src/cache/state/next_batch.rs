//! What write-back is to do next.

use super::State;
use super::position::Position;
use super::writeback_state::Load;
use crate::cache::tunables::{Tunables, WritebackOrder};
use crate::format::{Reason, SegmentId};
use crate::rules::Rule;
use std::time::Duration;

/// What write-back is to do next.
pub(crate) enum Next {
    /// To write back all segments up to one.
    Batch {
        last: SegmentId,
    },
    /// To wait for a flush of the cache device.
    Flush,
    /// To wait until something changes.
    Wait,
    End,
}

impl State {
    /// Chooses what write-back is to do next, and notes it.
    pub(crate) fn next_writeback(
        &mut self,
        load: Load,
        tunables: &Tunables,
        now: Duration,
    ) -> Next {
        let next = self.choose_next(load, tunables, now);
        self.writeback.note_work(matches!(next, Next::Batch { .. } | Next::Flush));
        if matches!(next, Next::Batch { .. }) {
            // In the same visit as the choice, so that a pause either prevents this batch or waits
            // for it.
            self.writeback.batch_chosen(now);
        }
        next
    }

    fn choose_next(&mut self, load: Load, tunables: &Tunables, now: Duration) -> Next {
        if self.lifecycle.is_over() {
            return Next::End;
        }
        let (threshold, at_once) = (tunables.writeback_threshold, !self.routing.keeps_dirty_data());
        if !self.writeback.is_time(&self.log, load, threshold, at_once) {
            return Next::Wait;
        }
        if load.idle && self.log.is_open() {
            // Without room for another sealed segment, it is sealed later.
            let _ = self.log.seal(Reason::Idle);
        }
        let last = self.last_of_batch(load, tunables, now);
        if last > self.log.written_back() {
            return Next::Batch { last };
        }
        // Only what is durable may go to the backing device: it must not get ahead of the log.
        if self.log.written() > self.log.durable() {
            self.log.want(Position::end_of(self.log.written()));
            return Next::Flush;
        }
        Next::Wait
    }

    fn last_of_batch(&mut self, load: Load, tunables: &Tunables, now: Duration) -> SegmentId {
        let largest = self.writeback.largest_batch(&self.log, load);
        let most = u64::from(tunables.nr_max_batched_writeback).min(largest);
        let durable_only = self.rules.keep(Rule::OnlyDurableWrittenBack);
        let reached = if durable_only { self.log.durable() } else { self.log.written() };
        let last = reached.min(self.log.written_back().plus(most));
        if self.is_strict(tunables) {
            return self.end_of_epoch_within(last);
        }
        let before_stuck = self.stuck.segment_before(&self.log, now);
        let before_stuck = before_stuck.filter(|_| !self.writeback.is_pressed(&self.log));
        let last = last.min(before_stuck.unwrap_or(last));
        last.max(self.writeback.replacement(&self.log, reached).unwrap_or_default())
    }

    /// Whether write-back is in strict order.
    pub(crate) fn is_strict(&self, tunables: &Tunables) -> bool {
        let is_set = tunables.writeback_order == WritebackOrder::Strict;
        is_set && self.rules.keep(Rule::OneEpochPerBatch)
    }

    /// Whether the next batch must extend beyond this segment, to include the newer version of a
    /// block that cannot be read. Never in strict order.
    pub(crate) fn reaches_further_than(&self, last: SegmentId, tunables: &Tunables) -> bool {
        let replacement = self.writeback.replacement(&self.log, self.log.durable());
        !self.is_strict(tunables) && replacement.is_some_and(|id| last < id)
    }

    /// The first segment after `written_back`, up to `last`, that ends an epoch; or `last`.
    fn end_of_epoch_within(&self, last: SegmentId) -> SegmentId {
        let mut ids = (self.log.written_back().next().0..=last.0).map(SegmentId);
        ids.find(|&id| self.log.ends_epoch(id)).unwrap_or(last)
    }
}
