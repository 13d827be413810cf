//! Closing a cache.

use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::state::shared::Waiter;
use crate::device::DeviceError;
use crate::format::{SegmentId, SuperblockExtension};
use crate::log::segment_writes::{unprove_record, write_extension};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Engine {
    /// Takes no more requests, makes everything durable, ends the background tasks, and prepares
    /// the cache for the kernel module.
    pub(crate) async fn close(self: &Arc<Self>) -> Result<(), CacheError> {
        let state = &self.state;
        state.lock().lifecycle.close();
        let flushed = self.close_log().await;
        // Discards and writes around the log end with an error, or are done.
        state.wait(Waiter::Request, |state| state.locks.is_empty().then_some(())).await;
        state.lock().lifecycle.stop();
        state.wait(Waiter::Request, |it| it.lifecycle.have_tasks_ended().then_some(())).await;
        let failure = state.lock().lifecycle.failure().cloned();
        if let Some(failure) = failure {
            if failure.cause == DeviceError::CONTRADICTS
                && let Err(error) = unprove_record(&self.cache).await
            {
                tracing::warn!("the next attach may serve the log again: {error}");
            }
            return Err(CacheError::Failed(failure));
        }
        flushed?;
        self.warn_of_lost_blocks();
        if let Err(error) = self.retrying(|| self.empty_misleading_segments()).await {
            // It may have been closed in order before, at the same segment.
            let _ = self.mark(None).await;
            return Err(CacheError::NotHandedOver(error));
        }
        let newest = state.lock().log.durable();
        Ok(self.mark(Some(newest)).await?)
    }

    fn warn_of_lost_blocks(&self) {
        let lost = {
            let mut visit = self.state.lock();
            let state = &mut *visit;
            state.stuck.report(&state.log).map_or(0, |stuck| stuck.lost)
        };
        if lost > 0 {
            tracing::warn!(
                "{lost} blocks are lost; the kernel module would not know that, and would take \
                 what is left of them for valid data"
            );
        }
    }

    /// Notes in the superblock extension that the cache was closed in order, with this segment as
    /// its newest, or was not.
    async fn mark(&self, clean: Option<SegmentId>) -> Result<(), DeviceError> {
        let Some(extension) = &self.extension else { return Ok(()) };
        if extension.clean == clean {
            return Ok(());
        }
        let page = SuperblockExtension { clean, ..extension.next() };
        write_extension(&self.cache, &page).await?;
        self.cache.flush().await?;
        self.generation.store(page.generation, Ordering::Relaxed);
        Ok(())
    }
}
