//! Writes around the log.
//!
//! Such a write goes to the backing device at once, and is acknowledged when it is durable there.
//! Everything acknowledged before is made durable in the log first: neither device must be ahead of
//! the other. So the state after a power cut is a prefix of the history here, too. Writes that come
//! at the same time share the flushes of both devices.
//!
//! If any segment still awaiting write-back holds the block, the write goes through the log:
//! otherwise replay would overwrite it. Older versions that are written back are dropped. Meanwhile
//! the blocks are locked, see [`RangeLock`].

use super::range_lock::RangeLock;
use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::state::fragment::{fragments, sector_at};
use crate::cache::state::shared::VISIT;
use crate::cache::state::wait::Wait;
use crate::cache::tunables::WriteMode;
use crate::device::{BlockDevice, DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, BlockNo, SECTOR_BYTES, Sector, to_u64, to_usize};
use crate::rules::Rule;
use std::sync::Arc;

/// Where the front of a write goes, and its length in bytes.
enum Route<'a> {
    Around(RangeLock<'a>, usize),
    Log(usize),
    /// Its first block is locked.
    Wait(Wait),
}

impl Engine {
    /// Writes to the backing device what may go there, durably, and the rest to the log.
    pub(super) async fn write_around(
        self: &Arc<Self>,
        sector: Sector,
        data: &[u8],
    ) -> Result<(), CacheError> {
        let mut done = 0;
        while done < data.len() {
            let (at, rest) = (sector_at(sector, done), &data[done..]);
            done += match self.route_of(at, rest.len())? {
                Route::Around(lock, length) => {
                    let cannot_empty = self.empty_stale_segments(lock.blocks()).await?;
                    if cannot_empty.is_none() {
                        self.write_locked(at, &rest[..length]).await?;
                    }
                    drop(lock);
                    if cannot_empty.is_some() {
                        // On top of the version that cannot be taken from the log.
                        self.write_to_log(at, &rest[..length]).await?;
                    }
                    length
                }
                Route::Log(length) => {
                    self.write_to_log(at, &rest[..length]).await?;
                    length
                }
                Route::Wait(wait) => {
                    self.wait_for(wait).await?;
                    0
                }
            };
        }
        Ok(())
    }

    /// Chooses a route, and locks the blocks that go around the log. All in one visit: an admitted
    /// copy of a block could come into the log right before the lock, and be dropped after it.
    fn route_of(&self, sector: Sector, length: usize) -> Result<Route<'_>, CacheError> {
        let unit = self.backing.block_size() as usize;
        let mut visit = self.state.lock();
        let state = &mut *visit;
        state.lifecycle.check_open()?;
        let mut through_log = None;
        let mut end = sector;
        for fragment in fragments(sector, length) {
            let is_logged =
                state.log.is_logged(fragment.block) && self.rules.keep(Rule::LoggedStaysInLog);
            let logged = is_logged || !fragment.is_aligned(unit);
            let goes_on = *through_log.get_or_insert(logged) == logged;
            if !goes_on || state.locks.is_locked(fragment.block) {
                break;
            }
            end = sector_at(end, fragment.length);
        }
        let bytes = to_usize(end.0 - sector.0) * SECTOR_BYTES;
        Ok(match through_log {
            _ if bytes == 0 => Route::Wait(Wait::RangeLock(sector.block())),
            Some(true) => Route::Log(bytes),
            _ => {
                for fragment in fragments(sector, bytes) {
                    state.supersede(&fragment);
                }
                let last = Sector(end.0 - 1).block();
                let blocks = sector.block()..BlockNo(last.0 + 1);
                Route::Around(RangeLock::new(self, state, blocks), bytes)
            }
        })
    }

    /// Writes locked blocks. The log holds nothing of them, nor does any stale segment.
    async fn write_locked(self: &Arc<Self>, sector: Sector, data: &[u8]) -> Result<(), CacheError> {
        if self.rules.keep(Rule::WriteAroundAfterLogFlush) {
            self.flush_log().await?;
        }
        let written = self.write_durably(sector, data).await;
        written.inspect_err(|error| self.change_failed(error))?;
        self.keep_for_reads(sector, data);
        Ok(())
    }

    async fn write_durably(&self, sector: Sector, data: &[u8]) -> Result<(), DeviceError> {
        let before = self.backing_flushes.failures();
        self.backing.write(sector.bytes(), IoBuf::copy_of(data).into()).await?;
        self.counters.direct_write_bytes.add(to_u64(data.len()));
        if self.rules.keep(Rule::WriteAroundFlushed) {
            self.backing_flushes.flush(&self.backing, before).await?;
        }
        Ok(())
    }

    /// In mode `through`, whole blocks that were written are admitted like blocks that were read.
    fn keep_for_reads(&self, sector: Sector, data: &[u8]) {
        if self.tunables.lock().write_mode != WriteMode::Through {
            return;
        }
        let whole = fragments(sector, data.len()).filter(|fragment| fragment.is_whole_block());
        let mut copies =
            whole.map(|f| (f.block, IoBuf::copy_of(&data[f.at..f.at + BLOCK_BYTES]))).peekable();
        // The blocks are locked, so nothing newer comes between two visits to the state.
        while copies.peek().is_some() {
            let some: Vec<(BlockNo, IoBuf)> = copies.by_ref().take(VISIT.into()).collect();
            let mut visit = self.state.lock();
            let kept = some
                .into_iter()
                .filter_map(|(block, data)| visit.admission.keep(block, data).then_some(1));
            self.counters.staged_blocks.add(kept.sum());
            visit.give_way();
        }
    }
}
