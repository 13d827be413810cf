//! The way of a write around the log.
//!
//! It goes to the backing device at once, and is acknowledged when it is durable there. Everything
//! acknowledged before is made durable in the log first, for the backing device must not be ahead
//! of the log, nor the log of it: so the state after a power cut is a prefix of the history here,
//! too. Those that come at the same time share the flushes of both devices.
//!
//! What the log holds of a block that is not written back would be replayed over it. So blocks of
//! which it holds anything go through the log; what is written back is forgotten. Meanwhile the
//! blocks are fenced, see [`super::fence`].

use super::fence::Fence;
use super::state::{State, Wait};
use super::tunables::WriteMode;
use super::write::{Fragment, fragments};
use super::{CacheError, Inner};
use crate::device::{BlockDevice, DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, BlockNo, SECTOR_BYTES, Sector, to_u64, to_usize};
use crate::planted::Bug;
use std::sync::Arc;

/// The way that the front of a write is to take, and its length in bytes.
enum Way<'a> {
    Around(Fence<'a>, usize),
    Log(usize),
    /// Its first block is fenced.
    Wait(Wait),
}

impl Inner {
    /// Writes to the backing device what may go there, durably, and the rest to the log.
    pub(super) async fn write_around(
        self: &Arc<Self>,
        sector: Sector,
        data: &[u8],
    ) -> Result<(), CacheError> {
        let mut done = 0;
        while done < data.len() {
            let (at, rest) = (Sector(sector.0 + to_u64(done / SECTOR_BYTES)), &data[done..]);
            done += match self.way_of(at, rest.len())? {
                Way::Around(fence, length) => {
                    let stuck = self.empty_what_was_forgotten(fence.blocks()).await?;
                    if stuck.is_none() {
                        self.write_fenced(at, &rest[..length]).await?;
                    }
                    drop(fence);
                    if stuck.is_some() {
                        // On top of the version that cannot be taken from the log.
                        self.write_to_log(at, &rest[..length]).await?;
                    }
                    length
                }
                Way::Log(length) => {
                    self.write_to_log(at, &rest[..length]).await?;
                    length
                }
                Way::Wait(wait) => {
                    self.wait_for(wait).await?;
                    0
                }
            };
        }
        Ok(())
    }

    /// Chooses a way, and fences the blocks that go around the log.
    fn way_of(&self, sector: Sector, length: usize) -> Result<Way<'_>, CacheError> {
        let unit = self.backing.block_size() as usize;
        let mut guard = self.lock();
        let state = &mut *guard;
        state.check_open()?;
        let mut chosen = None;
        let mut end = sector;
        for fragment in fragments(sector, length) {
            let logged = !fragment.is_aligned(unit) || state.is_logged(fragment.block);
            if state.is_fenced(fragment.block) || *chosen.get_or_insert(logged) != logged {
                break;
            }
            end = Sector(end.0 + to_u64(fragment.length / SECTOR_BYTES));
        }
        let bytes = to_usize(end.0 - sector.0) * SECTOR_BYTES;
        Ok(match chosen {
            _ if bytes == 0 => Way::Wait(Wait::Fence(sector.block())),
            Some(true) => Way::Log(bytes),
            _ => {
                for fragment in fragments(sector, bytes) {
                    state.supersede(&fragment);
                }
                let last = Sector(end.0 - 1).block();
                Way::Around(Fence::new(self, state, sector.block()..BlockNo(last.0 + 1)), bytes)
            }
        })
    }

    /// Writes blocks that are fenced and of which the log holds nothing, and no segment that is
    /// written back any more.
    async fn write_fenced(self: &Arc<Self>, sector: Sector, data: &[u8]) -> Result<(), CacheError> {
        if !self.planted.has(Bug::DirectAheadOfLog) {
            self.flush_log().await?;
        }
        self.write_durably(sector, data).await.inspect_err(|error| self.change_failed(error))?;
        self.keep_for_reads(sector, data);
        Ok(())
    }

    async fn write_durably(&self, sector: Sector, data: &[u8]) -> Result<(), DeviceError> {
        let before = self.backing_flushes.failures();
        self.backing.write(sector.bytes(), IoBuf::copy_of(data).into()).await?;
        self.counters.direct_write_bytes.add(to_u64(data.len()));
        if self.planted.has(Bug::DirectNotFlushed) {
            return Ok(());
        }
        self.backing_flushes.flush(&self.backing, before).await
    }

    /// In mode `through`, whole blocks that were written are cached, too, as blocks that were read
    /// are.
    fn keep_for_reads(&self, sector: Sector, data: &[u8]) {
        if self.tunables.lock().write_mode != WriteMode::Through {
            return;
        }
        let whole = fragments(sector, data.len()).filter(|fragment| fragment.length == BLOCK_BYTES);
        let copies: Vec<(BlockNo, IoBuf)> =
            whole.map(|f| (f.block, IoBuf::copy_of(&data[f.at..f.at + BLOCK_BYTES]))).collect();
        let mut state = self.lock();
        let kept = copies
            .into_iter()
            .filter_map(|(block, data)| state.staging.keep(block, data).then_some(1));
        self.counters.staged_blocks.add(kept.sum());
        let ripe = state.staging.is_ripe();
        drop(state);
        if ripe {
            self.events.staging.notify(usize::MAX);
        }
    }
}

impl Fragment {
    /// Whether a device with blocks of so many bytes can write it alone.
    fn is_aligned(&self, unit: usize) -> bool {
        (self.first * SECTOR_BYTES).is_multiple_of(unit) && self.length.is_multiple_of(unit)
    }
}

impl State {
    /// Whether the log that recovery would apply holds anything of a block.
    fn is_logged(&self, block: BlockNo) -> bool {
        let logged = self.index.get(block).is_some_and(|cached| self.is_live(cached.place));
        logged && !self.planted.has(Bug::DirectOverLogged)
    }

    /// The backing device is to get a newer version of a block, or of a part of it.
    fn supersede(&mut self, fragment: &Fragment) {
        let old = self.index.get(fragment.block);
        let access = self.access(fragment, old, true);
        self.accesses.count(access);
        if !self.planted.has(Bug::CellOutlivesDirect) {
            self.staging.cancel(fragment.block);
        }
        if let Some(old) = old.filter(|_| !self.planted.has(Bug::DirectLeavesCached)) {
            self.forget(fragment.block, old);
        }
    }
}
