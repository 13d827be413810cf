//! What the kernel module must not find: written-back segments with old data are emptied.
//!
//! That happens before a discard or a write around the log is acknowledged, and when the cache is
//! closed. [`log::kernel_compat`](crate::log::kernel_compat) says which segments that concerns, and
//! why.
//!
//! Each attempt rewrites the segments in doubt (see [`stale_segments`](crate::cache::state)). A
//! header that cannot be read is replaced by a new one.
//!
//! A header that cannot be written does not delay others for long. A request that needs the segment
//! emptied tries only once. If that fails:
//!
//! - A discard fails if the segment may hold some of its blocks.
//! - A write around the log goes through the log instead, on top of the segment.
//! - A close tries a few times more, then says so and leaves no clean mark.
//!
//! The doubt ends when a write succeeds, or when the log reaches the slot. Then the log overwrites
//! the segment, or the write fails like that of any other segment.

use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::request::pinned::Pinned;
use crate::device::{DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, BlockNo, SegmentId, to_u64};
use crate::log::kernel_compat::{emptied, segments_to_empty};
use crate::rules::Rule;
use futures_util::{StreamExt, stream};
use std::ops::Range;
use std::sync::Arc;

/// Headers that are emptied at the same time.
const DEPTH: usize = 32;

impl Engine {
    /// Empties the written-back segments that would mislead the kernel module. Nothing else may be
    /// under way.
    pub(crate) async fn empty_misleading_segments(self: &Arc<Self>) -> Result<(), DeviceError> {
        let (geometry, written_back, newest, in_doubt, is_record_in_doubt) = {
            let state = self.state.lock();
            let (log, in_doubt) = (&state.log, state.stale.in_doubt().clone());
            let is_record_in_doubt = state.writeback.is_record_in_doubt();
            (log.geometry(), log.written_back(), log.newest(), in_doubt, is_record_in_doubt)
        };
        if is_record_in_doubt {
            // It may cover more than we know of.
            self.write_record(written_back).await?;
        }
        let is_damaged = |id| in_doubt.contains(&id);
        let misleading =
            segments_to_empty(&self.cache, geometry, [written_back, newest], is_damaged).await;
        let failed = self.empty_segments(misleading).await?;
        failed.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Empties all stale segments, since any of them may hold older versions of a block. Returns an
    /// error if a segment that may hold some of these blocks could not be emptied: their old data
    /// could come back.
    pub(crate) async fn empty_stale_segments(
        self: &Arc<Self>,
        blocks: &Range<BlockNo>,
    ) -> Result<Option<DeviceError>, CacheError> {
        let is_done = {
            let state = self.state.lock();
            state.stale.are_harmless_to(blocks, &state.log)
        };
        if is_done {
            return Ok(None);
        }
        let _alone = self.emptying.lock().await;
        let (mut segments, first, last, written_back) = {
            let state = self.state.lock();
            let first = state.stale.first_to_empty(&state.log);
            let again: Vec<SegmentId> = state.stale.in_doubt().range(..first).copied().collect();
            (again, first, state.stale.up_to(), state.log.written_back())
        };
        if last > written_back {
            // Admitted before the cache was opened. An earlier process may have left it open.
            let is_sealed = self.state.lock().log.last_sealed() >= last;
            let drained = match is_sealed {
                true => self.drain_to(last).await,
                false => self.drain().await,
            };
            match drained {
                // Stuck blocks lie in newer segments now.
                Ok(()) | Err(CacheError::Stuck(_)) => {}
                Err(error) => return Err(error),
            }
        }
        segments.extend((first.0..=last.0).map(SegmentId));
        let failed = self.empty_segments(segments).await?;
        let mut state = self.state.lock();
        state.stale.emptied_up_to(last);
        let may_hold = |id| state.stale.may_hold(id, blocks, &state.log);
        Ok(failed.into_iter().find_map(|(id, error)| may_hold(id).then_some(error)))
    }

    /// Empties segments that were found damaged though they are written back. A failure makes
    /// nothing worse.
    pub(crate) async fn empty_damaged(self: &Arc<Self>, segments: Vec<SegmentId>) {
        let _alone = self.emptying.lock().await;
        {
            let mut state = self.state.lock();
            for &id in &segments {
                state.stale.doubt(id);
            }
        }
        let _ = self.empty_segments(segments).await;
    }

    /// Empties written-back segments durably. Returns those that it could not empty, and why.
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
            let mut state = self.state.lock();
            written.into_iter().for_each(|id| state.stale.trust(id));
        }
        Ok(failed)
    }

    /// Empties a segment that is written back, if its slot still holds it. Returns whether anything
    /// was written, which is in doubt until the device was flushed.
    async fn empty(self: &Arc<Self>, id: SegmentId) -> Result<bool, DeviceError> {
        let (geometry, durable, _pinned) = {
            let mut state = self.state.lock();
            let geometry = state.log.geometry();
            let slot = geometry.slot_of(id);
            if state.log.id_of(slot) != id {
                // A newer segment has the slot. It becomes durable before the request that wants
                // this one emptied is acknowledged.
                state.stale.trust(id);
                return Ok(false);
            }
            (geometry, state.log.durable(), Pinned::new(self, &mut state, slot))
        };
        let offset = geometry.slot_offset(geometry.slot_of(id));
        if !self.rules.keep(Rule::UnreadableEmptied) {
            let read = self.cache.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await;
            if read.is_err() {
                return Ok(false);
            }
        }
        let header = emptied(&self.cache, geometry, [id, durable], self.extension.as_ref()).await;
        {
            let mut state = self.state.lock();
            let was_in_doubt = state.stale.doubt(id);
            let is_in_doubt = was_in_doubt && self.rules.keep(Rule::EmptiedOnlyWhenFlushed);
            if header.as_ref().is_ok_and(|header| header.is_there) && !is_in_doubt {
                state.stale.trust(id);
                return Ok(false);
            }
        }
        self.cache.write(offset, header?.block.into()).await?;
        self.counters.cache_write_bytes.add(to_u64(BLOCK_BYTES));
        Ok(true)
    }
}
