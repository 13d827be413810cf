//! The tasks that write back and make durable when it is time: their clocks and pauses.

use super::batch::BatchStop;
use crate::cache::engine::Engine;
use crate::cache::state::State;
use crate::cache::state::next_batch::Next;
use crate::cache::state::shared::Waiter;
use crate::cache::state::writeback_state::Load;
use crate::device::{BlockDevice, DeviceError, LinkStatus};
use crate::format::{Reason, SegmentId};
use crate::rules::Rule;
use futures_util::future::{BoxFuture, Either, select};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

/// How often the load is looked at. After this time without a write, the log is written back though
/// there is room.
const PERIOD: Duration = Duration::from_secs(1);
/// When write-back has failed for this long, writes fail that would wait for a slot. Time in which
/// it waits for the link to the backing device does not count.
const JAMMED_AFTER: Duration = Duration::from_secs(30);
/// The pause after the first failed batch; it doubles up to [`MAX_PAUSE`].
const PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// Measures the load, period by period.
struct LoadMeter {
    /// When the period under way began, and the counts at that time.
    since: Duration,
    writes: u64,
    device: Option<Duration>,
    requests: Duration,
    writeback: Duration,
    /// The load in the last whole period; but it is not idle if this one is not.
    load: Load,
    /// The end of this period.
    end: BoxFuture<'static, ()>,
}

impl LoadMeter {
    fn new(engine: &Engine) -> LoadMeter {
        LoadMeter {
            since: engine.runtime.now(),
            writes: engine.counters.writes.get(),
            device: engine.backing.busy(),
            requests: engine.backing.busy_here(),
            writeback: engine.writeback_device.busy_here(),
            load: Load::default(),
            end: engine.runtime.sleep(PERIOD),
        }
    }

    /// Takes a look, and begins anew if a period is over.
    fn observe(&mut self, engine: &Engine) -> Load {
        let now = engine.runtime.now();
        let length = now.saturating_sub(self.since);
        if length < PERIOD {
            self.load.idle &= engine.counters.writes.get() == self.writes;
            return self.load;
        }
        let last = std::mem::replace(self, LoadMeter::new(engine));
        let requests = self.requests.saturating_sub(last.requests);
        let writeback = self.writeback.saturating_sub(last.writeback);
        let device = self.device.zip(last.device).map(|(now, then)| now.saturating_sub(then));
        let others = device.map(|device| device.saturating_sub(writeback));
        let busy = requests.max(others.unwrap_or_default()).as_millis();
        let percent = u32::try_from(busy * 100 / length.as_millis().max(1)).unwrap_or(u32::MAX);
        self.load = Load { idle: self.writes == last.writes, percent: percent.min(100) };
        self.load
    }
}

/// How write-back has failed of late.
struct Failures {
    since: Option<Duration>,
    pause: Duration,
}

impl Engine {
    /// The background task that writes back.
    pub(crate) async fn writeback(self: Arc<Self>) {
        let mut failures = Failures { since: None, pause: PAUSE };
        let mut meter = LoadMeter::new(&self);
        loop {
            let listener = self.state.listen(Waiter::Writeback);
            let (load, tunables) = (meter.observe(&self), self.tunables.lock().clone());
            let now = self.runtime.now();
            let next = self.state.lock().next_writeback(load, &tunables, now);
            match next {
                Next::Batch { last } => self.batch(last, &mut failures).await,
                Next::Flush => listener.await,
                Next::Wait => {
                    if let Either::Right(_) = select(listener, &mut meter.end).await {
                        // The sleep has ended, and must not be polled again, even if the period is
                        // not quite over by the clock.
                        meter.end = self.runtime.sleep(PERIOD);
                    }
                }
                Next::End => break,
            }
        }
        self.task_ended();
    }

    /// Writes a batch back, and pauses where it failed.
    async fn batch(&self, last: SegmentId, failures: &mut Failures) {
        let before = self.state.lock().log.written_back();
        let link = self.backing.link();
        let stop = self.write_back(last).await.err();
        self.state.lock().writeback.batch_ended(self.runtime.now());
        if self.has_waited_for_link(link.as_ref()) {
            failures.since = None;
            self.state.lock().writeback.set_jammed(None);
        }
        // Where blocks were only moved, the log is as full as before.
        let has_room =
            |state: &State| state.log.written_back() > before && state.log.free_slots() > 0;
        if stop.is_none() || has_room(&self.state.lock()) {
            failures.since = None;
            self.state.lock().writeback.set_jammed(None);
        }
        match stop {
            None => {
                self.counters.writeback_succeeded();
                failures.pause = PAUSE;
            }
            // No block may be moved any more, and the log is being closed first.
            Some(BatchStop::Closing) => self.pause(PAUSE).await,
            Some(BatchStop::Device(_)) if self.reaches_further_than(last) => {}
            Some(BatchStop::Device(error)) => {
                self.batch_failed(&error);
                self.state.lock().writeback.stopped();
                self.pause_after(error, failures).await;
            }
            Some(BatchStop::Stuck(error)) => {
                self.batch_failed(&error);
                self.state.lock().writeback.failed();
                self.pause_after(error, failures).await;
            }
        }
    }

    /// Whether write-back had to wait for the link to the backing device since an earlier look.
    pub(super) fn has_waited_for_link(&self, earlier: Option<&LinkStatus>) -> bool {
        let now = self.backing.link();
        let has_failed = now.zip(earlier).is_some_and(|(now, then)| now.has_failed_since(then));
        has_failed && self.rules.keep(Rule::LostLinkNoFault)
    }

    fn batch_failed(&self, error: &DeviceError) {
        tracing::warn!("write-back failed, the data stays in the cache: {error}");
        self.counters.writeback_failed(error);
    }

    /// Waits before the next try. When write-back fails for long, writes are told.
    async fn pause_after(&self, error: DeviceError, failures: &mut Failures) {
        let now = self.runtime.now();
        if now.saturating_sub(*failures.since.get_or_insert(now)) >= JAMMED_AFTER {
            self.state.lock().writeback.set_jammed(Some(error));
        }
        self.pause(failures.pause).await;
        failures.pause = (failures.pause * 2).min(MAX_PAUSE);
    }

    /// Works on the backing device, but not through the end of the cache while the link is down:
    /// what is in the log can be written back another time.
    pub(super) async fn while_linked<T>(
        &self,
        work: impl Future<Output = Result<T, BatchStop>>,
    ) -> Result<T, BatchStop> {
        let cut_off = async {
            self.state.wait(Waiter::Writeback, |it| it.lifecycle.is_stopping().then_some(())).await;
            while !self.backing.link().is_some_and(|link| link.is_awaited()) {
                self.runtime.sleep(PERIOD).await;
            }
        };
        match select(pin!(work), pin!(cut_off)).await {
            Either::Left((done, _)) => done,
            Either::Right(_) => Err(BatchStop::Closing),
        }
    }

    /// Sleeps, but not through the end.
    pub(super) async fn pause(&self, duration: Duration) {
        let ending =
            self.state.wait(Waiter::Writeback, |it| it.lifecycle.is_stopping().then_some(()));
        match select(self.runtime.sleep(duration), pin!(ending)).await {
            Either::Left(_) | Either::Right(_) => {}
        }
    }

    /// The background task that makes durable what has been volatile for as long as it may be.
    pub(crate) async fn syncer(self: Arc<Self>) {
        let mut synced = self.runtime.now();
        while !self.state.lock().lifecycle.is_over() {
            let listener = self.state.listen(Waiter::Writeback);
            let interval = self.tunables.lock().sync_data_interval;
            match interval {
                // An idle volume is not to wake the machine for this.
                0 if !self.state.lock().lifecycle.is_over() => listener.await,
                _ => self.pause(PERIOD).await,
            }
            let due = synced + Duration::from_secs(interval.into());
            let is_time = interval > 0 && self.runtime.now() >= due;
            if is_time && !self.state.lock().lifecycle.is_over() && self.sync() {
                synced = self.runtime.now();
            }
        }
        self.task_ended();
    }

    /// Begins to make everything durable. Returns false when that has to wait for the appender.
    fn sync(&self) -> bool {
        let commits = self.commits();
        let mut visit = self.state.lock();
        let log = &mut visit.log;
        if !commits && log.newest() > log.durable() && log.seal(Reason::Idle).is_err() {
            return false;
        }
        let newest = log.newest_position();
        log.want(newest);
        true
    }
}
