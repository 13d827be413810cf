//! A request's lock on the blocks that it changes on the backing device.

use crate::cache::engine::Engine;
use crate::cache::state::State;
use crate::cache::state::shared::Waiter;
use crate::device::DeviceError;
use crate::format::BlockNo;
use std::ops::Range;

/// Keeps writes off a range of blocks, until it is dropped.
pub(super) struct RangeLock<'a> {
    engine: &'a Engine,
    blocks: Range<BlockNo>,
}

impl<'a> RangeLock<'a> {
    /// Locks blocks. None of them may be locked.
    pub(super) fn new(
        engine: &'a Engine,
        state: &mut State,
        blocks: Range<BlockNo>,
    ) -> RangeLock<'a> {
        state.locks.lock(blocks.clone());
        RangeLock { engine, blocks }
    }

    pub(super) fn blocks(&self) -> &Range<BlockNo> {
        &self.blocks
    }

    /// Waits until none of the blocks is locked, and locks them.
    pub(super) async fn when_free(engine: &'a Engine, blocks: Range<BlockNo>) -> RangeLock<'a> {
        let lock = |state: &mut State| {
            let is_free = state.locks.is_free(&blocks);
            is_free.then(|| RangeLock::new(engine, state, blocks.clone()))
        };
        engine.state.wait(Waiter::Request, lock).await
    }
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        self.engine.state.lock().locks.unlock(&self.blocks);
    }
}

impl Engine {
    /// A change of locked blocks on the backing device has failed. The next power cut may undo what
    /// the device shows of them now, but a copy in the log would stay. So from now on, no data from
    /// the device is admitted.
    pub(super) fn change_failed(&self, error: &DeviceError) {
        tracing::warn!("read caching is suspended until the volume is attached again: {error}");
        self.state.lock().admission.suspend();
    }
}
