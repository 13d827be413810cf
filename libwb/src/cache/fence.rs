//! Fences: blocks whose content on the backing device a request is changing. Writes to them wait
//! meanwhile, or one that was written back in the midst of it would be lost; and nothing of them is
//! staged, for it could be old by then.

use super::Inner;
use super::index::Cached;
use super::state::State;
use crate::device::DeviceError;
use crate::format::BlockNo;
use crate::planted::Bug;
use std::ops::Range;

/// Keeps writes off a range of blocks.
pub(super) struct Fence<'a> {
    inner: &'a Inner,
    blocks: Range<BlockNo>,
}

impl<'a> Fence<'a> {
    /// Of blocks none of which is fenced.
    pub(super) fn new(inner: &'a Inner, state: &mut State, blocks: Range<BlockNo>) -> Fence<'a> {
        state.fenced.push(blocks.clone());
        Fence { inner, blocks }
    }

    pub(super) fn blocks(&self) -> &Range<BlockNo> {
        &self.blocks
    }

    /// Waits until none of the blocks is fenced.
    pub(super) async fn when_free(inner: &'a Inner, blocks: Range<BlockNo>) -> Fence<'a> {
        let overlaps =
            |other: &Range<BlockNo>| other.start < blocks.end && blocks.start < other.end;
        inner
            .wait(&inner.events.changed, |state| {
                let is_free = !state.fenced.iter().any(overlaps);
                is_free.then(|| Fence::new(inner, state, blocks.clone()))
            })
            .await
    }
}

impl Inner {
    /// A change of fenced blocks on the backing device has failed. What that shows of them now, the
    /// next power cut may take back; in the log, it would stay. So the log gets nothing any more of
    /// what the device shows.
    pub(super) fn change_failed(&self, error: &DeviceError) {
        tracing::warn!("read caching is suspended until the volume is attached again: {error}");
        self.lock().staging.suspend();
    }
}

impl Drop for Fence<'_> {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        if let Some(nth) = state.fenced.iter().position(|blocks| *blocks == self.blocks) {
            state.fenced.swap_remove(nth);
        }
        drop(state);
        self.inner.events.changed.notify(usize::MAX);
    }
}

impl State {
    /// Whether a request is changing this block on the backing device.
    pub(super) fn is_fenced(&self, block: BlockNo) -> bool {
        self.fenced.iter().any(|blocks| blocks.contains(&block))
            && !self.planted.has(Bug::FenceIgnored)
    }

    /// Forgets the version of a block that is written back, since the backing device is to get a
    /// newer one.
    pub(super) fn forget(&mut self, block: BlockNo, old: Cached) {
        self.index.remove(block);
        self.forgotten = self.id_of(old.place.slot).max(self.forgotten);
    }
}
