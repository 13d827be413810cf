//! Flushes of the cache device. All who wait for one share it.

use crate::cache::engine::Engine;
use crate::cache::state::shared::Waiter;
use crate::device::DeviceError;
use crate::rules::Rule;
use std::sync::Arc;

impl Engine {
    /// The background task that flushes the cache device when a request waits for it.
    pub(crate) async fn flusher(self: Arc<Self>) {
        loop {
            let listener = self.state.listen(Waiter::Flusher);
            let (due, failed, stopping) = {
                let state = self.state.lock();
                let failed = state.lifecycle.failure().is_some();
                (state.log.is_flush_due(), failed, state.lifecycle.is_stopping())
            };
            if failed || (stopping && !due) {
                break;
            }
            if !due {
                listener.await;
            } else {
                // A failure shows in the state.
                let _ = self.flush_cache_device().await;
            }
        }
        self.task_ended();
    }

    /// Flushes the cache device, which makes durable what was written before the flush began. A
    /// failed flush always fails the cache. Otherwise segments that the device has lost would count
    /// as durable after the next flush.
    pub(crate) async fn flush_cache_device(&self) -> Result<(), DeviceError> {
        let _alone = self.flushing.lock().await;
        let mut written = {
            let state = self.state.lock();
            if let Some(failure) = state.lifecycle.failure() {
                return Err(failure.clone());
            }
            state.log.written_position()
        };
        let mut flushed = self.cache.flush().await;
        if flushed.is_err() && !self.rules.keep(Rule::FailedFlushFinal) {
            flushed = self.retrying(|| self.cache.flush()).await;
        }
        // No second try: a later flush would not report what the device has lost by the failure.
        flushed.inspect_err(|error| self.fail(error.clone()))?;
        let mut state = self.state.lock();
        if !self.rules.keep(Rule::DurableAsOfFlushStart) {
            written = state.log.written_position();
        }
        state.log.made_durable(written);
        Ok(())
    }
}
