//! Flushes and drains.
//!
//! A flush does not close the open segment where the cache device carries the extension: it has the
//! appender make a *commit* of it, see
//! [`Commits`](crate::cache::state::segment_log). Without the extension, and in strict order, a
//! flush seals the segment.

use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::state::position::Position;
use crate::cache::state::shared::Waiter;
use crate::format::{Reason, SegmentId};
use crate::rules::Rule;

/// A drain that is waited for, until it is dropped.
struct Drain<'a> {
    to: SegmentId,
    engine: &'a Engine,
}

impl<'a> Drain<'a> {
    fn to(to: SegmentId, engine: &'a Engine) -> Drain<'a> {
        engine.state.lock().writeback.begin_drain(to);
        Drain { to, engine }
    }
}

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        self.engine.state.lock().writeback.end_drain(self.to);
    }
}

impl Engine {
    /// Makes all earlier acknowledged writes durable in the log. In the modes `through` and
    /// `around`, makes them durable on the backing device, too.
    pub(crate) async fn flush(&self) -> Result<(), CacheError> {
        self.counters.flushes.add(1);
        self.flush_log().await?;
        // What is still in the log goes where the mode promises it to be.
        let leftover = {
            let state = self.state.lock();
            !state.routing.keeps_dirty_data() && state.log.dirty_blocks() > 0
        };
        if leftover { self.drain().await } else { Ok(()) }
    }

    /// Writes everything back that is dirty at the time of the call.
    pub(crate) async fn drain(&self) -> Result<(), CacheError> {
        let target = self.seal().await?;
        // Once the newest versions are durable, older ones need not be written.
        self.wait_durable(Position::end_of(target)).await?;
        self.drain_to(target).await
    }

    /// Makes everything durable in the log that was acknowledged before.
    pub(crate) async fn flush_log(&self) -> Result<(), CacheError> {
        let target = match self.commits() {
            true => self.want_commit()?,
            false => Position::end_of(self.seal().await?),
        };
        self.wait_durable(target).await
    }

    /// Writes back every segment up to one that is durable.
    pub(crate) async fn drain_to(&self, target: SegmentId) -> Result<(), CacheError> {
        let _drain = Drain::to(target, self);
        let stops = self.state.lock().writeback.stops();
        self.state
            .wait(Waiter::Request, |state| {
                if let Some(failure) = state.lifecycle.failure() {
                    return Some(Err(CacheError::Failed(failure.clone())));
                }
                if state.log.written_back() >= target {
                    let stuck = state.stuck.report(&state.log);
                    return Some(stuck.map_or(Ok(()), |stuck| Err(CacheError::Stuck(stuck))));
                }
                if state.writeback.stops() > stops {
                    let error = self.counters.last_writeback_error();
                    return error.map(|error| Err(CacheError::Device(error)));
                }
                state.lifecycle.check_running().err().map(Err)
            })
            .await
    }

    /// Asks for a commit of what is in RAM, if it is not durable. Returns what a flush waits for.
    fn want_commit(&self) -> Result<Position, CacheError> {
        let mut state = self.state.lock();
        state.lifecycle.check_running()?;
        let target = state.log.newest_position();
        state.log.want(target);
        Ok(target)
    }

    /// Closes the last segment, and makes everything durable.
    pub(crate) async fn close_log(&self) -> Result<(), CacheError> {
        let last = self.seal().await?;
        self.wait_durable(Position::end_of(last)).await
    }

    /// Seals the open segment if it holds anything. Returns the segment with the newest data.
    async fn seal(&self) -> Result<SegmentId, CacheError> {
        let target = self.state.lock().log.newest();
        self.state
            .wait(Waiter::Request, |state| {
                if let Err(error) = state.lifecycle.check_running() {
                    return Some(Err(error));
                }
                let is_closing = state.lifecycle.is_closing();
                let reason = if is_closing { Reason::Close } else { Reason::Flush };
                // Another flush may have sealed it, and the next may be open already.
                let log = &mut state.log;
                let sealed = log.last_sealed() >= target || log.seal(reason).is_ok();
                sealed.then(|| {
                    log.end_epoch(target);
                    Ok(())
                })
            })
            .await?;
        Ok(target)
    }

    async fn wait_durable(&self, target: Position) -> Result<(), CacheError> {
        self.state.lock().log.want(target);
        let waits_for_device = self.rules.keep(Rule::FlushWaitsForDevice);
        self.state
            .wait(Waiter::Request, |state| {
                if let Some(failure) = state.lifecycle.failure() {
                    return Some(Err(CacheError::Failed(failure.clone())));
                }
                let is_written = || state.log.written_position() >= target;
                if state.log.durable_to() >= target || !waits_for_device && is_written() {
                    return Some(Ok(()));
                }
                state.lifecycle.check_running().err().map(Err)
            })
            .await
    }
}
