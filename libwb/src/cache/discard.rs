//! The way of a discard. The range reads as zeros afterwards, and that survives a power cut.
//!
//! The log has no entry for "nothing here". So where a segment that is not written back holds data
//! of the range, zeros are written on top of it, through the log; what is written back is
//! forgotten, and segments up to there are emptied, since the kernel module would take them for a
//! read cache; and the backing device gives up the whole range. It does so only when everything
//! written before is durable, for its state must not be ahead of the log's; and it is flushed
//! before the discard is acknowledged, for the log's must not be ahead of its. Writes to the range
//! wait meanwhile: one that was written back in the midst of it would be lost.

use super::fence::Fence;
use super::state::{State, Wait};
use super::{Cache, CacheError, Inner, WritebackOrder};
use crate::device::{BlockDevice, DeviceError, Operation};
use crate::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, SECTOR_BYTES, SECTORS_PER_BLOCK, Sector, to_u64, to_usize,
};
use crate::planted::Bug;
use futures_lite::future::yield_now;
use nix::errno::Errno;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Blocks that are looked up in one visit to the state.
const VISIT: u64 = 4096;
const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// What becomes of the space of a range that is to read as zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Space {
    GivenUp,
    Kept,
}

impl Cache {
    /// Makes `length` bytes from `sector` on read as zeros, and gives up their space. Durable when
    /// it returns.
    ///
    /// # Errors
    /// When the backing device cannot discard, or write-back is in strict order (the
    /// [`CacheError::errno`] is `EOPNOTSUPP` then), the range is not within the volume, the cache
    /// is being closed, or a device fails: also when what a written-back segment holds of the range
    /// cannot be taken from it. Parts may have been discarded.
    pub async fn discard(&self, sector: Sector, length: u64) -> Result<(), CacheError> {
        self.clear(sector, length, Space::GivenUp).await
    }

    /// As [`Cache::discard`], but the range keeps its space on the backing device.
    ///
    /// # Errors
    /// As [`Cache::discard`].
    pub async fn zero(&self, sector: Sector, length: u64) -> Result<(), CacheError> {
        self.clear(sector, length, Space::Kept).await
    }

    async fn clear(&self, sector: Sector, length: u64, space: Space) -> Result<(), CacheError> {
        let inner = &self.inner;
        inner.check_range(sector, length)?;
        // What the backing device discards at once would be ahead of what strict order has yet to
        // write back.
        let strict = inner.tunables.lock().writeback_order == WritebackOrder::Strict;
        let cannot = match space {
            Space::GivenUp => &inner.cannot_discard,
            Space::Kept => &inner.cannot_zero,
        };
        if strict || cannot.load(Ordering::Relaxed) {
            return Err(inner.no_discard(sector, length).into());
        }
        let end = Sector(sector.0 + length / to_u64(SECTOR_BYTES));
        let first = BlockNo(sector.0.div_ceil(SECTORS_PER_BLOCK));
        let blocks = first..first.max(end.block());
        // What is no whole block goes the way of a write.
        let head = end.min(blocks.start.sector());
        let tail = head.max(blocks.end.sector());
        for (from, to) in [(sector, head), (tail, end)] {
            if from < to {
                self.write(from, &ZEROS[..to_usize(to.0 - from.0) * SECTOR_BYTES]).await?;
            }
        }
        if blocks.is_empty() {
            return self.flush().await;
        }
        let _fence = Fence::when_free(inner, blocks.clone()).await;
        inner.cover(&blocks, space).await?;
        if let Some(error) = inner.empty_what_was_forgotten(&blocks).await? {
            return Err(error.into());
        }
        if !inner.planted.has(Bug::DiscardAheadOfLog) {
            inner.flush_log().await?;
        }
        let discarded = inner.discard_durably(&blocks, space).await;
        match &discarded {
            Err(DeviceError {
                operation: Operation::Discard, cause: Errno::EOPNOTSUPP, ..
            }) => {
                cannot.store(true, Ordering::Relaxed);
            }
            Err(error) => inner.change_failed(error),
            Ok(()) => {}
        }
        Ok(discarded?)
    }
}

impl Inner {
    async fn discard_durably(
        &self,
        blocks: &Range<BlockNo>,
        space: Space,
    ) -> Result<(), DeviceError> {
        let bytes = (blocks.end.0 - blocks.start.0) * to_u64(BLOCK_BYTES);
        let before = self.backing_flushes.failures();
        match space {
            Space::GivenUp => self.backing.discard(blocks.start.bytes(), bytes).await?,
            Space::Kept => self.backing.zero(blocks.start.bytes(), bytes).await?,
        }
        self.counters.discarded_bytes.add(bytes);
        if self.planted.has(Bug::DiscardNotFlushed) {
            return Ok(());
        }
        self.backing_flushes.flush(&self.backing, before).await
    }

    /// Makes the log hold nothing of some blocks but zeros.
    async fn cover(&self, blocks: &Range<BlockNo>, space: Space) -> Result<(), CacheError> {
        let mut next = blocks.start;
        while next < blocks.end {
            let visited = next..BlockNo(blocks.end.0.min(next.0 + VISIT));
            let (reached, covered) = self.noticing(self.lock(), |state| {
                // In the same visit: nothing may open a segment any more once the last one was
                // sealed.
                state.check_open()?;
                Ok::<_, CacheError>(state.cover(visited, space))
            })?;
            next = reached;
            match covered {
                Ok(()) => {}
                Err(wait) => self.wait_for(wait).await?,
            }
            if next < blocks.end {
                // A large range is many visits, and other tasks share the thread.
                yield_now().await;
            }
        }
        Ok(())
    }

    fn no_discard(&self, sector: Sector, length: u64) -> DeviceError {
        DeviceError {
            device: self.backing.name().clone(),
            operation: Operation::Discard,
            offset: sector.bytes(),
            length,
            cause: Errno::EOPNOTSUPP,
        }
    }
}

impl State {
    /// Zeros over what the log holds of some blocks that is not written back, be it dirty or clean,
    /// and forgets the rest. Returns the block it has come to.
    fn cover(&mut self, blocks: Range<BlockNo>, space: Space) -> (BlockNo, Result<(), Wait>) {
        for block in (blocks.start.0..blocks.end.0).map(BlockNo) {
            if !self.planted.has(Bug::CellOutlivesDiscard) {
                self.staging.cancel(block);
            }
            let Some(old) = self.index.get(block) else { continue };
            if !self.is_live(old.place) {
                self.forget(block, old);
                continue;
            }
            if self.planted.has(Bug::DiscardLeavesDirty) {
                continue;
            }
            if let Some(data) = self.overwrite(old.place, old.dirty, DirtyBits::ALL) {
                data.fill(0);
            } else {
                match self.take_place(block, DirtyBits::ALL) {
                    Ok(data) => data.fill(0),
                    Err(wait) => return (block, Err(wait)),
                }
            }
            // Else write-back would fill again what the backing device has given up.
            if let Some(zeros) = self.index.get(block).filter(|_| space == Space::GivenUp) {
                self.index.set_discarded(zeros.place);
            }
        }
        self.seal_if_full();
        (blocks.end, Ok(()))
    }
}
