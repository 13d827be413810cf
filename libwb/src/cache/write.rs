//! The way of a write: into the open segment, under one visit to the state.

use super::index::Cached;
use super::read::Pinned;
use super::state::{State, Wait};
use super::{Cache, CacheError, Inner};
use crate::device::IoBuf;
use crate::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, Place, SECTOR_BYTES, Sector, SegmentId, to_u64,
};
use crate::planted::Bug;
use futures_util::future::select;
use parking_lot::MutexGuard;
use std::pin::pin;
use std::sync::Arc;

/// Why a write cannot go on at once.
enum Stop {
    Wait(Wait),
    /// Older dirty sectors of the block lie on the cache device and must be read first.
    Merge {
        block: BlockNo,
        old: Cached,
        id: SegmentId,
    },
    /// Dirty sectors of the block are to be kept, and are lost.
    Lost(Place),
    Error(CacheError),
}

impl From<Wait> for Stop {
    fn from(wait: Wait) -> Stop {
        Stop::Wait(wait)
    }
}

/// The part of a request that lies in one block.
pub(super) struct Fragment {
    pub(super) block: BlockNo,
    /// The first sector within the block.
    pub(super) first: usize,
    /// Where it begins in the request, in bytes.
    pub(super) at: usize,
    /// Its length in bytes.
    pub(super) length: usize,
}

impl Fragment {
    pub(super) fn bits(&self) -> DirtyBits {
        DirtyBits::range(self.first, self.length / SECTOR_BYTES)
    }
}

/// Cuts a request into the parts that lie in one block each.
pub(super) fn fragments(sector: Sector, length: usize) -> impl Iterator<Item = Fragment> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let here = Sector(sector.0 + to_u64(at / SECTOR_BYTES));
        let first = here.in_block();
        let fragment = Fragment {
            block: here.block(),
            first,
            at,
            length: (length - at).min(BLOCK_BYTES - first * SECTOR_BYTES),
        };
        at += fragment.length;
        (fragment.length > 0).then_some(fragment)
    })
}

impl Cache {
    /// Writes as much as can be acknowledged without waiting, from the front. Returns how many
    /// bytes that is.
    ///
    /// # Errors
    /// When the request lies outside the volume, the cache is being closed, or the cache device
    /// failed.
    pub fn write_ready(&self, sector: Sector, data: &[u8]) -> Result<usize, CacheError> {
        self.inner.check_range(sector, to_u64(data.len()))?;
        self.inner.counters.writes.add(1);
        self.inner.counters.write_bytes.add(to_u64(data.len()));
        let mut state = self.inner.lock();
        if state.bypass.arrives(sector, data.len()) || state.is_tight() {
            return Ok(0);
        }
        match self.inner.noticing(state, |state| state.write_some(sector, data)) {
            (_, Some(Stop::Error(error))) => Err(error),
            (done, _) => Ok(done),
        }
    }

    /// Goes on with a write of which [`Cache::write_ready`] has taken the front. `sector` and
    /// `data` are the rest.
    ///
    /// # Errors
    /// When the cache is being closed or a device fails. Parts may have been written.
    pub async fn write_rest(&self, sector: Sector, data: &[u8]) -> Result<(), CacheError> {
        let around = self.inner.lock().bypass.applies_to(sector, data.len());
        if around {
            return self.inner.write_around(sector, data).await;
        }
        self.inner.write_to_log(sector, data).await
    }

    /// Writes. The data is acknowledged from RAM, as a disk with a volatile write cache does;
    /// [`Cache::flush`] makes it durable. Where it goes around the log, it is durable when this
    /// returns.
    ///
    /// # Errors
    /// As [`Cache::write_ready`] and [`Cache::write_rest`].
    pub async fn write(&self, sector: Sector, data: &[u8]) -> Result<(), CacheError> {
        let done = self.write_ready(sector, data)?;
        if done == data.len() {
            return Ok(());
        }
        self.write_rest(Sector(sector.0 + to_u64(done / SECTOR_BYTES)), &data[done..]).await
    }

    /// Writes, and makes it durable before it is acknowledged ("force unit access").
    ///
    /// # Errors
    /// As [`Cache::write`] and [`Cache::flush`].
    pub async fn write_fua(&self, sector: Sector, data: &[u8]) -> Result<(), CacheError> {
        self.write(sector, data).await?;
        self.flush().await
    }
}

/// A writer that waits for a slot, until it is dropped.
struct WaitingForSlot<'a>(&'a Inner);

impl Drop for WaitingForSlot<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting_for_slot -= 1;
    }
}

impl Inner {
    /// Writes to the log, and waits where it must.
    pub(super) async fn write_to_log(
        self: &Arc<Self>,
        sector: Sector,
        data: &[u8],
    ) -> Result<(), CacheError> {
        self.pace(data.len()).await;
        let mut done = 0;
        while done < data.len() {
            let at = Sector(sector.0 + to_u64(done / SECTOR_BYTES));
            let (taken, stop) = self.write_some(at, &data[done..]);
            done += taken;
            match stop {
                None => {}
                Some(Stop::Error(error)) => return Err(error),
                Some(Stop::Lost(place)) => {
                    return Err(self.altered(self.lock().geometry.place_offset(place)).into());
                }
                Some(Stop::Wait(wait)) => self.wait_for(wait).await?,
                Some(Stop::Merge { block, old, id }) => {
                    let fragment = fragments(
                        Sector(sector.0 + to_u64(done / SECTOR_BYTES)),
                        data.len() - done,
                    )
                    .next();
                    let Some(fragment) = fragment else { continue };
                    debug_assert_eq!(fragment.block, block);
                    if self.merge(&fragment, &data[done..done + fragment.length], old, id).await? {
                        done += fragment.length;
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes from the front until something is in the way. Returns the bytes taken, and what is in
    /// the way.
    fn write_some(&self, sector: Sector, data: &[u8]) -> (usize, Option<Stop>) {
        self.noticing(self.lock(), |state| state.write_some(sector, data))
    }

    /// Changes the state, and wakes the background tasks that this gives something to do.
    pub(super) fn noticing<T>(
        &self,
        mut state: MutexGuard<'_, State>,
        change: impl FnOnce(&mut State) -> T,
    ) -> T {
        let (sealed, newest) = (state.last_sealed(), state.newest);
        let result = change(&mut state);
        let (sealed, opened) = (state.last_sealed() != sealed, state.newest != newest);
        if opened {
            state.begun(newest, self.runtime.wall_clock());
        }
        drop(state);
        if sealed {
            self.events.appender.notify(usize::MAX);
        }
        if opened {
            self.events.writeback.notify(usize::MAX);
        }
        result
    }

    /// Waits for the turn of a write of so many bytes, when the log is nearly full.
    async fn pace(&self, length: usize) {
        if length == 0 {
            return;
        }
        let delay = self.lock().admit(self.runtime.now(), length.div_ceil(BLOCK_BYTES));
        if !delay.is_zero() {
            let relaxed = self.wait(&self.events.changed, |state| {
                (!state.is_tight() || state.is_ending()).then_some(())
            });
            select(self.runtime.sleep(delay), pin!(relaxed)).await;
        }
    }

    /// Waits until it may be worth another try.
    ///
    /// # Errors
    /// When the log is full, and write-back has not got on for long.
    pub(super) async fn wait_for(&self, wait: Wait) -> Result<(), CacheError> {
        match wait {
            Wait::Appender => {
                self.wait(&self.events.changed, |state| {
                    (state.may_seal() || state.is_ending()).then_some(())
                })
                .await;
            }
            Wait::Fence(block) => {
                self.wait(&self.events.changed, |state| (!state.is_fenced(block)).then_some(()))
                    .await;
            }
            Wait::Slot => {
                self.lock().waiting_for_slot += 1;
                let _waiting = WaitingForSlot(self);
                self.events.writeback.notify(usize::MAX);
                self.wait(&self.events.changed, |state| match &state.jammed {
                    _ if state.free_slots() > 0 || state.is_ending() => Some(Ok(())),
                    jammed => jammed.clone().map(|error| Err(CacheError::Full(error))),
                })
                .await?;
            }
        }
        Ok(())
    }

    /// Reads the older version of a block from the cache device and writes a fragment on top of it.
    /// Returns whether that was done; if not, the block has changed meanwhile and the write must
    /// look again.
    async fn merge(
        self: &Arc<Self>,
        new: &Fragment,
        data: &[u8],
        old: Cached,
        id: SegmentId,
    ) -> Result<bool, CacheError> {
        let pinned = {
            let mut state = self.lock();
            if state.id_of(old.place.slot) != id {
                return Ok(false);
            }
            Pinned::new(self, &mut state, old.place.slot)
        };
        let base = self.read_places(old.place, IoBuf::zeroed(BLOCK_BYTES)).await?;
        drop(pinned);
        match self.place_on_top(new, data, old, id, base.block_at(0))? {
            Placed::Done => Ok(true),
            Placed::Changed => Ok(false),
            Placed::Wait(wait) => self.wait_for(wait).await.map(|()| false),
        }
    }

    fn place_on_top(
        &self,
        new: &Fragment,
        data: &[u8],
        old: Cached,
        id: SegmentId,
        base: &[u8; BLOCK_BYTES],
    ) -> Result<Placed, CacheError> {
        let state = self.lock();
        state.check_open()?;
        let same = state.index.get(new.block) == Some(old) && state.id_of(old.place.slot) == id;
        if !same || !state.is_dirty(old.place, old.dirty) {
            return Ok(Placed::Changed);
        }
        if state.is_fenced(new.block) {
            return Ok(Placed::Wait(Wait::Fence(new.block)));
        }
        let placed = self.noticing(state, |state| {
            let access = state.access(new, Some(old), true);
            state.place_merged(new, data, old.dirty, base).map(|()| state.accesses.count(access))
        });
        Ok(placed.map_or_else(Placed::Wait, |()| Placed::Done))
    }
}

/// What became of a write on top of an older version.
enum Placed {
    Done,
    /// The older version is not the newest any more, or has been written back.
    Changed,
    Wait(Wait),
}

impl State {
    /// Whether requests can only fail from now on.
    fn is_ending(&self) -> bool {
        self.failure.is_some() || self.closing
    }

    pub(super) fn check_open(&self) -> Result<(), CacheError> {
        match &self.failure {
            Some(failure) => Err(CacheError::Failed(failure.clone())),
            None if self.closing => Err(CacheError::Closed),
            None => Ok(()),
        }
    }

    fn write_some(&mut self, sector: Sector, data: &[u8]) -> (usize, Option<Stop>) {
        if let Err(error) = self.check_open() {
            return (0, Some(Stop::Error(error)));
        }
        for fragment in fragments(sector, data.len()) {
            let bytes = &data[fragment.at..fragment.at + fragment.length];
            if let Err(stop) = self.write_fragment(&fragment, bytes) {
                return (fragment.at, Some(stop));
            }
        }
        self.seal_if_full();
        (data.len(), None)
    }

    fn write_fragment(&mut self, new: &Fragment, bytes: &[u8]) -> Result<(), Stop> {
        if self.is_fenced(new.block) {
            return Err(Stop::Wait(Wait::Fence(new.block)));
        }
        let old = self.index.get(new.block);
        let access = self.access(new, old, true);
        self.place_fragment(new, bytes, old)?;
        self.accesses.count(access);
        Ok(())
    }

    fn place_fragment(
        &mut self,
        new: &Fragment,
        bytes: &[u8],
        old: Option<Cached>,
    ) -> Result<(), Stop> {
        let dirty = new.bits();
        if let Some(old) = old {
            if let Some(data) = self.overwrite(old.place, old.dirty, dirty) {
                copy_in(data, new, bytes);
                return Ok(());
            }
            // What the new version must carry on, so that it alone holds everything not yet written
            // back.
            let more = self.is_dirty(old.place, old.dirty) && !old.dirty.without(dirty).is_clean();
            if more && !self.planted.has(Bug::MergeDropsOldSectors) {
                if self.is_lost(old.place) {
                    return Err(Stop::Lost(old.place));
                }
                let Some(base) = self.in_ram(old.place).copied() else {
                    return Err(Stop::Merge {
                        block: new.block,
                        old,
                        id: self.id_of(old.place.slot),
                    });
                };
                return Ok(self.place_merged(new, bytes, old.dirty, &base)?);
            }
        }
        let data = self.take_place(new.block, dirty)?;
        if !dirty.is_all() {
            // Nobody reads the other sectors, but no other block's data is to lie there.
            data.fill(0);
        }
        copy_in(data, new, bytes);
        Ok(())
    }

    fn place_merged(
        &mut self,
        new: &Fragment,
        bytes: &[u8],
        old_dirty: DirtyBits,
        base: &[u8; BLOCK_BYTES],
    ) -> Result<(), Wait> {
        let data = self.take_place(new.block, old_dirty.union(new.bits()))?;
        data.copy_from_slice(base);
        copy_in(data, new, bytes);
        Ok(())
    }
}

fn copy_in(data: &mut [u8; BLOCK_BYTES], new: &Fragment, bytes: &[u8]) {
    let at = new.first * SECTOR_BYTES;
    data[at..at + bytes.len()].copy_from_slice(bytes);
}
