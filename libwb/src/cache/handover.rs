//! What a cache that is closed leaves behind, so that the kernel module reads the same as we do.
//!
//! When the module recovers a log and comes to a partial version of a block, it writes the dirty sectors of the version
//! before to the backing device, even if the superblock record says that both had been written back long ago. Then it
//! takes all that the record covers for clean. So the older version stands over the newer one. It does so to its own
//! devices as well, where `update_sb_record_interval` is set. We leave no older version with which that could happen.
//!
//! And it takes written-back segments for a read cache. So none may hold a version of a block that was discarded since, or
//! written around the log; nor one that was superseded, where what superseded it is gone: a crash may leave a segment empty
//! with older ones as they were, or overwrite one before those that came before it.

use super::read::Pinned;
use super::state::State;
use super::{CacheError, Inner};
use crate::device::{DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, Metablock, SegmentHeader, SegmentId, empty_header, to_u64};
use crate::log::scan::read_header;
use futures_util::{StreamExt, stream};
use std::collections::HashSet;
use std::sync::Arc;

/// Headers that are read or written at the same time.
const DEPTH: usize = 32;

fn is_partial(entry: &Metablock) -> bool {
    !entry.dirty.is_clean() && !entry.dirty.is_all()
}

/// Whether a partial version and one before it are in the same segment.
fn has_older_version(entries: &[Metablock]) -> bool {
    let mut seen = HashSet::new();
    entries.iter().any(|entry| !seen.insert(entry.block) && is_partial(entry))
}

impl Inner {
    /// Empties the written-back segments before the last of them that holds a partial version, or a clean one, in which
    /// the module sees no whole version either, or that is empty or gone; and that one if it holds the version before, too.
    pub(super) async fn hand_over(self: &Arc<Self>) -> Result<(), DeviceError> {
        let (geometry, newest, written_back) = {
            let state = self.lock();
            (state.geometry, state.newest, state.written_back)
        };
        let oldest = newest.minus(geometry.lap()).next();
        let reads = (oldest.0..=written_back.0).map(|id| read_header(&self.cache, geometry, SegmentId(id)));
        let mut headers = stream::iter(reads).buffered(DEPTH);
        let (mut older, mut misleading) = (Vec::new(), Vec::new());
        while let Some(header) = headers.next().await {
            // What is not there any more, or is empty, may have held newer versions of what stands before it.
            let Ok(header) = header else {
                misleading.append(&mut older);
                continue;
            };
            if header.metablocks.is_empty() || header.metablocks.iter().any(|entry| !entry.dirty.is_all()) {
                misleading.append(&mut older);
            }
            if has_older_version(&header.metablocks) {
                misleading.push(header.id);
            } else if !header.metablocks.is_empty() {
                older.push(header.id);
            }
        }
        self.empty_segments(misleading).await
    }

    /// Empties all segments up to the last that holds what was forgotten. A block may have older versions in any of them.
    pub(super) async fn empty_what_was_forgotten(self: &Arc<Self>) -> Result<(), CacheError> {
        let done = |state: &State| state.emptied >= state.forgotten;
        if done(&self.lock()) {
            return Ok(());
        }
        let _alone = self.emptying.lock().await;
        let (first, last, written_back) = {
            let state = self.lock();
            let oldest = state.newest.minus(state.geometry.lap());
            (state.emptied.max(oldest).next(), state.forgotten, state.written_back)
        };
        if last > written_back {
            // Staged before the cache was opened.
            self.drain_to(last).await?;
        }
        self.empty_segments((first.0..=last.0).map(SegmentId)).await?;
        let mut state = self.lock();
        state.emptied = state.emptied.max(last);
        Ok(())
    }

    /// Makes written-back segments empty, durably. They stay in the log, so that it can be walked without the
    /// superblock record too.
    pub(super) async fn empty_segments(
        self: &Arc<Self>,
        segments: impl IntoIterator<Item = SegmentId>,
    ) -> Result<(), DeviceError> {
        let emptying = segments.into_iter().map(|id| self.empty(id));
        let mut emptying = stream::iter(emptying).buffer_unordered(DEPTH);
        let mut result = Ok(());
        let mut any = false;
        // To the end, even after a failure: a slot stays pinned as long as a write to it is under way.
        while let Some(emptied) = emptying.next().await {
            match emptied {
                Ok(emptied) => any |= emptied,
                // It may have been written all the same, and the next attempt would find nothing to do.
                Err(error) => (any, result) = (true, Err(error)),
            }
        }
        if any {
            self.flush_cache_device().await?;
        }
        result
    }

    /// Empties a segment that is written back, if its slot still holds it. Returns whether there was anything in it.
    async fn empty(self: &Arc<Self>, id: SegmentId) -> Result<bool, DeviceError> {
        let (offset, _pinned) = {
            let mut state = self.lock();
            let slot = state.geometry.slot_of(id);
            if state.id_of(slot) != id {
                return Ok(false);
            }
            (state.geometry.slot_offset(slot), Pinned::new(self, &mut state, slot))
        };
        let mut block = match self.cache.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await {
            Ok(block) => block,
            Err(error) => {
                // What cannot be read cannot mislead.
                tracing::warn!("a segment that is written back is left as it is: {error}");
                return Ok(false);
            }
        };
        let header = SegmentHeader::decode(block.block_at(0));
        if !header.is_ok_and(|header| header.id == id && header.length() > 0) {
            return Ok(false);
        }
        empty_header(block.block_at_mut(0));
        self.cache.write(offset, block.into()).await?;
        self.counters.cache_write_bytes.add(to_u64(BLOCK_BYTES));
        Ok(true)
    }
}
