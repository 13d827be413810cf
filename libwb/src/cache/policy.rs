//! When to write back, and how much.

use super::commits::Position;
use super::state::State;
use super::writeback::Stop;
use super::{Inner, Tunables, URGENT_BELOW, WriteMode, WritebackOrder};
use crate::device::{BlockDevice, DeviceError};
use crate::format::{Reason, SegmentId};
use crate::planted::Bug;
use futures_util::future::{BoxFuture, Either, select};
use std::sync::Arc;
use std::time::Duration;

/// The most segments in a batch, as `nr_max_batched_writeback` has it.
const LARGEST_BATCH: u64 = 4096;
/// How often the load is looked at. After this time without a write, the log is written back though
/// there is room.
const PERIOD: Duration = Duration::from_secs(1);
/// A batch is at most this part of the log, one in so many segments, since its slots come free all
/// at once and writes have to make do with the others until then. The larger a batch, the less a
/// disk's arm moves for each block of it.
const BATCH: u64 = 4;
/// But it need not be smaller than this.
const SMALL_BATCH: u64 = 8;
/// When nothing was written back for so long, writes fail that would wait for a slot.
const JAMMED_AFTER: Duration = Duration::from_secs(30);
/// The pause after the first failed batch; it doubles up to [`MAX_PAUSE`].
const PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// What write-back is to do next.
enum Next {
    Batch { last: SegmentId },
    Flush,
    Wait,
    End,
}

/// What was seen in the last period.
struct Load {
    /// When the period under way began, and the counts at that time.
    since: Duration,
    writes: u64,
    device: Option<Duration>,
    requests: Duration,
    writeback: Duration,
    /// Nothing was written in the last whole period.
    idle: bool,
    /// For how much of it others than write-back kept the backing device busy, in percent.
    percent: u32,
    end: BoxFuture<'static, ()>,
}

impl Load {
    fn new(inner: &Inner) -> Load {
        let now = inner.runtime.now();
        Load {
            since: now,
            writes: inner.counters.writes.get(),
            device: inner.backing.busy(),
            requests: inner.backing.busy_here(),
            writeback: inner.writeback_device.busy_here(),
            idle: false,
            percent: 0,
            end: inner.runtime.sleep(PERIOD),
        }
    }

    /// Takes a look, if a period is over.
    fn observe(&mut self, inner: &Inner) {
        let now = inner.runtime.now();
        let length = now.saturating_sub(self.since);
        if length < PERIOD {
            self.idle &= inner.counters.writes.get() == self.writes;
            return;
        }
        let last = std::mem::replace(self, Load::new(inner));
        self.idle = self.writes == last.writes;
        let requests = self.requests.saturating_sub(last.requests);
        let writeback = self.writeback.saturating_sub(last.writeback);
        let others = self
            .device
            .zip(last.device)
            .map(|(now, then)| now.saturating_sub(then).saturating_sub(writeback));
        let busy = requests.max(others.unwrap_or_default());
        self.percent = u32::try_from(busy.as_millis() * 100 / length.as_millis().max(1))
            .unwrap_or(u32::MAX)
            .min(100);
    }
}

impl Inner {
    /// The background task that writes back.
    pub(super) async fn writeback(self: Arc<Self>) {
        let mut pause = PAUSE;
        let mut failing_since = None;
        let mut load = Load::new(&self);
        loop {
            let listener = self.events.writeback.listen();
            load.observe(&self);
            match self.next_writeback(&load) {
                Next::Batch { last } => {
                    let before = self.lock().written_back;
                    let stop = self.batch(last).await.err();
                    // Where blocks were only moved, the log is as full as before.
                    let has_room =
                        |state: &State| state.written_back > before && state.free_slots() > 0;
                    if stop.is_none() || has_room(&self.lock()) {
                        failing_since = None;
                        self.lock().jammed = None;
                    }
                    match stop {
                        None => {
                            self.counters.writeback_succeeded();
                            pause = PAUSE;
                        }
                        // No more may be moved, and the log is being closed first.
                        Some(Stop::Closing) => self.pause(PAUSE).await,
                        Some(Stop::Device(_)) if self.reaches_further_than(last) => {}
                        Some(Stop::Device(error)) => {
                            self.lock().stops += 1;
                            self.batch_failed(error, &mut failing_since, &mut pause).await;
                        }
                        Some(Stop::Stuck(error)) => {
                            self.batch_failed(error, &mut failing_since, &mut pause).await;
                        }
                    }
                }
                Next::Flush => {
                    self.events.flusher.notify(usize::MAX);
                    listener.await;
                }
                Next::Wait => {
                    if let Either::Right(_) = select(listener, &mut load.end).await {
                        // However early the clock says that was: a sleep that has ended is not to
                        // be polled again.
                        load.end = self.runtime.sleep(PERIOD);
                    }
                }
                Next::End => break,
            }
        }
        self.task_ended();
    }

    /// Says so, and waits before the next try.
    async fn batch_failed(
        &self,
        error: DeviceError,
        failing_since: &mut Option<Duration>,
        pause: &mut Duration,
    ) {
        tracing::warn!("write-back failed, the data stays in the cache: {error}");
        self.counters.writeback_failed(&error);
        let now = self.runtime.now();
        if now.saturating_sub(*failing_since.get_or_insert(now)) >= JAMMED_AFTER {
            self.lock().jammed = Some(error);
        }
        self.events.changed.notify(usize::MAX);
        self.pause(*pause).await;
        *pause = (*pause * 2).min(MAX_PAUSE);
    }

    /// Writes a batch back, and tells those who wait for its end.
    async fn batch(&self, last: SegmentId) -> Result<(), Stop> {
        let written = self.write_back(last).await;
        self.lock().rate.end(self.runtime.now());
        self.events.changed.notify(usize::MAX);
        written
    }

    /// Sleeps, but not through the end.
    async fn pause(&self, duration: Duration) {
        let ending = self.wait(&self.events.writeback, |state| state.stopping.then_some(()));
        match select(self.runtime.sleep(duration), std::pin::pin!(ending)).await {
            Either::Left(_) | Either::Right(_) => {}
        }
    }

    /// The background task that makes durable what has been volatile for as long as it may be.
    pub(super) async fn syncer(self: Arc<Self>) {
        let mut synced = self.runtime.now();
        loop {
            self.pause(PERIOD).await;
            {
                let state = self.lock();
                if state.stopping || state.failure.is_some() {
                    break;
                }
            }
            let interval = self.tunables.lock().sync_data_interval;
            let due = synced + Duration::from_secs(interval.into());
            if interval > 0 && self.runtime.now() >= due && self.sync() {
                synced = self.runtime.now();
            }
        }
        self.task_ended();
    }

    /// Begins to make everything durable. Returns false when that has to wait for the appender.
    fn sync(&self) -> bool {
        let commits = self.commits();
        let mut state = self.lock();
        if !commits && state.newest > state.durable && state.seal(Reason::Idle).is_err() {
            return false;
        }
        let newest = state.newest_position();
        state.want(newest);
        drop(state);
        self.events.appender.notify(usize::MAX);
        self.events.flusher.notify(usize::MAX);
        true
    }

    fn next_writeback(&self, load: &Load) -> Next {
        let tunables = self.tunables.lock().clone();
        let mut state = self.lock();
        let next = self.choose(&mut state, load, &tunables);
        state.writing_back = matches!(next, Next::Batch { .. } | Next::Flush);
        if matches!(next, Next::Batch { .. }) {
            // Under the lock under which it was chosen: a pause comes before, or sees it.
            state.rate.begin(self.runtime.now());
        }
        next
    }

    pub(super) fn is_strict(&self, tunables: &Tunables) -> bool {
        tunables.writeback_order == WritebackOrder::Strict && !self.planted.has(Bug::EpochsMixed)
    }

    /// Whether the next batch is to go on after this segment, up to where what cannot be read has a
    /// newer version. In strict order it must not.
    pub(super) fn reaches_further_than(&self, last: SegmentId) -> bool {
        let is_strict = self.is_strict(&self.tunables.lock());
        let state = self.lock();
        !is_strict && state.replacement(state.durable).is_some_and(|id| last < id)
    }

    fn choose(&self, state: &mut State, load: &Load, tunables: &Tunables) -> Next {
        if state.stopping || state.failure.is_some() {
            return Next::End;
        }
        if !state.wants_writeback(load, tunables.writeback_threshold) {
            return Next::Wait;
        }
        if load.idle && state.open.is_some() && state.seal(Reason::Idle).is_ok() {
            self.events.appender.notify(usize::MAX);
        }
        let most = u64::from(tunables.nr_max_batched_writeback).min(state.largest_batch(load));
        let reached =
            if self.planted.has(Bug::VolatileWrittenBack) { state.written } else { state.durable };
        let mut last = reached.min(state.written_back.plus(most));
        if self.is_strict(tunables) {
            last = state.first_flush_within(last);
        } else {
            let before_stuck =
                state.before_stuck(self.runtime.now()).filter(|_| !state.is_pressed());
            last = last.min(before_stuck.unwrap_or(last));
            last = last.max(state.replacement(reached).unwrap_or_default());
        }
        if last > state.written_back {
            return Next::Batch { last };
        }
        // Only what is durable may go to the backing device: a write there must not outrun the log.
        if state.written > state.durable {
            let written = Position::end_of(state.written);
            state.want(written);
            return Next::Flush;
        }
        Next::Wait
    }
}

impl State {
    /// Whether somebody waits for write-back, or soon will.
    fn is_pressed(&self) -> bool {
        let urgent = self.free_slots() * URGENT_BELOW < self.geometry.lap();
        urgent || self.drain_to() > self.written_back || self.waiting_for_slot > 0
    }

    fn wants_writeback(&self, load: &Load, threshold: u32) -> bool {
        if self.drain_to() > self.written_back || self.waiting_for_slot > 0 || self.jammed.is_some()
        {
            return true;
        }
        if self.paused {
            return false;
        }
        if self.bypass.mode != WriteMode::Back && self.dirty_segments() > 0 {
            return true;
        }
        let lap = self.geometry.lap();
        let urgent = self.free_slots() * URGENT_BELOW < lap;
        let half_full = self.dirty_segments() * 2 >= lap;
        urgent || ((load.idle || half_full) && load.percent < threshold)
    }

    /// How many segments may be written back at a time. Where hardly anything is written meanwhile,
    /// or somebody waits for all of it, as many as there are free slots.
    fn largest_batch(&self, load: &Load) -> u64 {
        let part = (self.geometry.lap() / BATCH).max(SMALL_BATCH);
        let calm = load.idle || self.drain_to() > self.written_back;
        if calm { part.max(self.free_slots()) } else { part }
    }

    /// Up to where a batch must reach to heal what cannot be read, if it may: no larger than the
    /// largest that can be set, for each block of it takes memory.
    fn replacement(&self, reached: SegmentId) -> Option<SegmentId> {
        let furthest = reached.min(self.written_back.plus(LARGEST_BATCH));
        Some(self.replaced_by).filter(|&id| id <= furthest)
    }

    /// The first segment after `written_back`, up to `last`, that a flush closed; or `last`.
    fn first_flush_within(&self, last: SegmentId) -> SegmentId {
        let candidates = (self.written_back.next().0..=last.0).map(SegmentId);
        candidates.into_iter().find(|&id| self.ends_epoch(id)).unwrap_or(last)
    }
}
