//! What a cache that is closed leaves behind, so that the kernel module reads the same as we do.
//!
//! The module takes written-back segments for a read cache. So none may hold a version that was discarded since; and
//! what was discarded before a crash is not known any more, so none may hold a version that the index does not know.
//!
//! When the module recovers a log and comes to a partial version of a block, it writes the dirty sectors of the version
//! before to the backing device, even if the superblock record says that both had been written back long ago. Then it
//! takes all that the record covers for clean. So the older version stands over the newer one. It does so to its own
//! devices as well, where `update_sb_record_interval` is set. We leave no older version with which that could happen.

use super::Inner;
use crate::device::{DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, Geometry, SegmentId, empty_header};
use crate::log::scan::read_header;
use futures_util::{StreamExt, TryStreamExt, stream};

/// Headers that are read or written at the same time.
const DEPTH: usize = 32;

impl Inner {
    /// Empties the written-back segments before the last of them that holds a partial version, and those of which the
    /// index does not know all blocks. They stay in the log, so that it can be walked without the superblock record too.
    pub(super) async fn hand_over(&self) -> Result<(), DeviceError> {
        let (geometry, newest, written_back) = {
            let state = self.lock();
            (state.geometry, state.newest, state.written_back)
        };
        let oldest = newest.minus(geometry.lap()).next();
        let reads = (oldest.0..=written_back.0).map(|id| read_header(&self.cache, geometry, SegmentId(id)));
        let mut headers = stream::iter(reads).buffered(DEPTH);
        let (mut older, mut misleading) = (Vec::new(), Vec::new());
        while let Some(header) = headers.next().await {
            // What is not there cannot mislead.
            let Ok(header) = header else { continue };
            if header.metablocks.iter().any(|entry| !entry.dirty.is_clean() && !entry.dirty.is_all()) {
                misleading.append(&mut older);
            }
            let index_knows = {
                let state = self.lock();
                header.metablocks.iter().all(|entry| state.index.get(entry.block).is_some())
            };
            if !index_knows {
                misleading.push(header.id);
            } else if !header.metablocks.is_empty() {
                older.push(header.id);
            }
        }
        if misleading.is_empty() {
            return Ok(());
        }
        stream::iter(misleading)
            .map(Ok)
            .try_for_each_concurrent(DEPTH, |id| self.empty(geometry, id))
            .await?;
        self.cache.flush().await
    }

    async fn empty(&self, geometry: Geometry, id: SegmentId) -> Result<(), DeviceError> {
        let offset = geometry.slot_offset(geometry.slot_of(id));
        let mut block = self.cache.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await?;
        empty_header(block.block_at_mut(0));
        self.cache.write(offset, block.into()).await
    }
}
