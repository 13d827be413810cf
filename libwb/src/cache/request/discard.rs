//! Discards. The range reads as zeros afterwards, and that survives a power cut.
//!
//! The log has no entry for "nothing here". So a discard has these steps, in this order:
//!
//! 1. Zeros are written, through the log, over what segments hold of the range that are not written
//!    back. Cached versions that are written back are dropped.
//! 2. Stale segments are emptied: the kernel module would take them for a read cache.
//! 3. The log is flushed: the backing device must not be ahead of it.
//! 4. The backing device discards the whole range and is flushed: the log must not be ahead of the
//!    backing device either.
//!
//! Writes to the range wait meanwhile. Else write-back of such a write could come between, and the
//! discard would undo it.

use super::range_lock::RangeLock;
use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::state::shared::VISIT;
use crate::cache::tunables::WritebackOrder;
use crate::device::{BlockDevice, DeviceError, Operation};
use crate::format::{
    BLOCK_BYTES, BlockNo, SECTOR_BYTES, SECTORS_PER_BLOCK, Sector, to_u64, to_usize,
};
use crate::rules::Rule;
use futures_lite::future::yield_now;
use nix::errno::Errno;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Blocks that are looked up before other tasks run.
const TURN: u64 = 256;
const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// What becomes of the space of a range that is to read as zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    GivenUp,
    Kept,
}

impl Engine {
    /// Makes `length` bytes from `sector` on read as zeros. Durable when it returns.
    pub(crate) async fn clear(
        self: &Arc<Self>,
        sector: Sector,
        length: u64,
        space: Space,
    ) -> Result<(), CacheError> {
        self.check_range(sector, length)?;
        // What the backing device discards at once would be ahead of what strict order has yet to
        // write back.
        let strict = self.tunables.lock().writeback_order == WritebackOrder::Strict;
        if strict || self.cannot(space).load(Ordering::Relaxed) {
            return Err(self.no_discard(sector, length).into());
        }
        let end = Sector(sector.0 + length / to_u64(SECTOR_BYTES));
        let first = BlockNo(sector.0.div_ceil(SECTORS_PER_BLOCK));
        let blocks = first..first.max(end.block());
        // Zeros are written to what is no whole block.
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
        self.clear_blocks(blocks, space).await
    }

    async fn clear_blocks(
        self: &Arc<Self>,
        blocks: Range<BlockNo>,
        space: Space,
    ) -> Result<(), CacheError> {
        let _lock = RangeLock::when_free(self, blocks.clone()).await;
        self.cover(&blocks, space).await?;
        if let Some(error) = self.empty_stale_segments(&blocks).await? {
            return Err(error.into());
        }
        if self.rules.keep(Rule::DiscardAfterLogFlush) {
            self.flush_log().await?;
        }
        let discarded = self.discard_durably(&blocks, space).await;
        match &discarded {
            Err(DeviceError {
                operation: Operation::Discard, cause: Errno::EOPNOTSUPP, ..
            }) => {
                self.cannot(space).store(true, Ordering::Relaxed);
            }
            Err(error) => self.change_failed(error),
            Ok(()) => {}
        }
        Ok(discarded?)
    }

    /// Whether the backing device has refused that.
    fn cannot(&self, space: Space) -> &AtomicBool {
        match space {
            Space::GivenUp => &self.cannot_discard,
            Space::Kept => &self.cannot_zero,
        }
    }

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
        if self.rules.keep(Rule::DiscardFlushed) {
            self.backing_flushes.flush(&self.backing, before).await?;
        }
        Ok(())
    }

    /// Makes the log hold nothing of some blocks but zeros. Since the blocks are locked, no write
    /// comes to them between two visits to the state, and no read of them reserves an admission.
    /// A copy that waited for admission may still enter the log, until the visit that cancels it.
    async fn cover(&self, blocks: &Range<BlockNo>, space: Space) -> Result<(), CacheError> {
        let (mut next, mut looked_up) = (blocks.start, 0);
        while next < blocks.end {
            let visited = next..BlockNo(blocks.end.0.min(next.0 + u64::from(VISIT)));
            let (reached, covered) = {
                let mut visit = self.state.lock();
                // In the same visit: no segment may be opened once the last one was sealed.
                visit.lifecycle.check_open()?;
                let covered = visit.cover(visited, space == Space::GivenUp);
                visit.give_way();
                covered
            };
            looked_up += reached.0 - next.0;
            next = reached;
            if let Err(wait) = covered {
                self.wait_for(wait).await?;
            } else if looked_up >= TURN {
                // A large range takes many visits, and other tasks share the thread.
                looked_up = 0;
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
