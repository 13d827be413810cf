//! Written-back segments that the kernel module must not find are emptied: before a discard or a
//! write around the log is acknowledged, and when the cache is closed.
//! [`log::kernel_compat`](crate::log::kernel_compat) says which, and why.
//!
//! A segment counts as emptied once its header was written *and* the device flushed after that.
//! Until then it is in doubt, whatever a read of it shows, and each attempt writes it again. What
//! cannot be read is written without.
//!
//! A header that cannot be written keeps nothing waiting for long. Each request that needs it gone
//! tries once. A discard fails, but only of blocks that the segment may hold; a write around the
//! log goes through it instead, on top of the segment. That ends when a write succeeds, or when the
//! log comes to the slot: it is overwritten then, or fails as any other would. A close tries a few
//! times more; where that does not do, it says so and leaves no clean mark.

use super::read::Pinned;
use super::state::State;
use super::{CacheError, Inner};
use crate::device::{DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, BlockNo, PLACES, Place, SegmentId, to_u64};
use crate::log::kernel_compat::{emptied, segments_to_empty};
use crate::planted::Bug;
use futures_util::{StreamExt, stream};
use std::ops::Range;
use std::sync::Arc;

/// Headers that are emptied at the same time.
const DEPTH: usize = 32;

impl Inner {
    /// Empties the written-back segments that would mislead the kernel module. Nothing else may be
    /// under way.
    pub(super) async fn hand_over(self: &Arc<Self>) -> Result<(), DeviceError> {
        let (geometry, written_back, newest, in_doubt, record_in_doubt) = {
            let state = self.lock();
            let in_doubt = state.in_doubt.clone();
            (state.geometry, state.written_back, state.newest, in_doubt, state.record_in_doubt)
        };
        if record_in_doubt {
            // It may cover more than we know of.
            self.write_record(written_back).await?;
        }
        let is_damaged = |id| in_doubt.contains(&id);
        let misleading =
            segments_to_empty(&self.cache, geometry, [written_back, newest], is_damaged).await;
        let failed = self.empty_segments(misleading).await?;
        failed.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Empties all segments up to the last that holds what was forgotten. A block may have older
    /// versions in any of them. Returns why one could not be emptied that may hold some of these
    /// blocks: they could come back.
    pub(super) async fn empty_what_was_forgotten(
        self: &Arc<Self>,
        blocks: &Range<BlockNo>,
    ) -> Result<Option<DeviceError>, CacheError> {
        let done = |state: &State| state.emptied >= state.forgotten && !state.may_come_back(blocks);
        if done(&self.lock()) {
            return Ok(None);
        }
        let _alone = self.emptying.lock().await;
        let (mut segments, first, last, written_back) = {
            let state = self.lock();
            let oldest = state.newest.minus(state.geometry.lap());
            let first = state.emptied.max(oldest).next();
            let again: Vec<SegmentId> = state.in_doubt.range(..first).copied().collect();
            (again, first, state.forgotten, state.written_back)
        };
        if last > written_back {
            // Staged before the cache was opened.
            match self.drain_to(last).await {
                // What is stuck lies in newer segments now.
                Ok(()) | Err(CacheError::Stuck(_)) => {}
                Err(error) => return Err(error),
            }
        }
        segments.extend((first.0..=last.0).map(SegmentId));
        let failed = self.empty_segments(segments).await?;
        let mut state = self.lock();
        state.emptied = state.emptied.max(last);
        Ok(failed.into_iter().find_map(|(id, error)| state.may_hold(id, blocks).then_some(error)))
    }

    /// Makes written-back segments empty, durably, and returns those of which that failed.
    async fn empty_segments(
        self: &Arc<Self>,
        segments: Vec<SegmentId>,
    ) -> Result<Vec<(SegmentId, DeviceError)>, DeviceError> {
        let emptying = segments.into_iter().map(async |id| (id, self.empty(id).await));
        let mut emptying = stream::iter(emptying).buffer_unordered(DEPTH);
        let (mut written, mut failed) = (Vec::new(), Vec::new());
        // To the end, even after a failure: a slot stays pinned as long as a write to it is under
        // way.
        while let Some((id, emptied)) = emptying.next().await {
            match emptied {
                Ok(true) => written.push(id),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!("segment {id} is written back and cannot be emptied: {error}");
                    failed.push((id, error));
                }
            }
        }
        if !written.is_empty() {
            self.flush_cache_device().await?;
            let mut state = self.lock();
            written.iter().for_each(|id| _ = state.in_doubt.remove(id));
        }
        Ok(failed)
    }

    /// Empties a segment that is written back, if its slot still holds it. Returns whether anything
    /// was written, which is in doubt until the device was flushed.
    async fn empty(self: &Arc<Self>, id: SegmentId) -> Result<bool, DeviceError> {
        let (geometry, durable, _pinned) = {
            let mut state = self.lock();
            let slot = state.geometry.slot_of(id);
            if state.id_of(slot) != id {
                // What is to follow it is durable before anything is acknowledged that this was to
                // go for.
                state.in_doubt.remove(&id);
                return Ok(false);
            }
            (state.geometry, state.durable, Pinned::new(self, &mut state, slot))
        };
        let offset = geometry.slot_offset(geometry.slot_of(id));
        if self.planted.has(Bug::UnreadableLeft) {
            let read = self.cache.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await;
            if read.is_err() {
                return Ok(false);
            }
        }
        let header = emptied(&self.cache, geometry, [id, durable], self.extension.as_ref()).await;
        {
            let mut state = self.lock();
            let in_doubt = !state.in_doubt.insert(id) && !self.planted.has(Bug::HalfEmptiedTrusted);
            if header.as_ref().is_ok_and(|header| header.is_there) && !in_doubt {
                state.in_doubt.remove(&id);
                return Ok(false);
            }
        }
        self.cache.write(offset, header?.block.into()).await?;
        self.counters.cache_write_bytes.add(to_u64(BLOCK_BYTES));
        Ok(true)
    }
}

impl State {
    /// Whether a segment that could not be emptied may hold some of these blocks.
    fn may_come_back(&self, blocks: &Range<BlockNo>) -> bool {
        self.in_doubt.iter().any(|&id| self.may_hold(id, blocks))
    }

    /// Whether a segment may hold some of these blocks, in whatever version.
    fn may_hold(&self, id: SegmentId, blocks: &Range<BlockNo>) -> bool {
        let slot = self.geometry.slot_of(id);
        let held = |index| self.index.at(Place { slot, index });
        let holds = || (0..PLACES).filter_map(held).any(|(block, _)| blocks.contains(&block));
        self.id_of(slot) == id && (id <= self.unindexed || holds())
    }
}
