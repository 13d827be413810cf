//! Writes into the open segment, without waiting where nothing is in the way.

use super::pinned::Pinned;
use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::state::State;
use crate::cache::state::fragment::{Fragment, fragments, sector_at};
use crate::cache::state::index::Cached;
use crate::cache::state::placement::{Merged, Obstacle};
use crate::cache::state::shared::Waiter;
use crate::cache::state::wait::Wait;
use crate::device::{BlockDevice, IoBuf};
use crate::format::{BLOCK_BYTES, Sector, SegmentId, to_u64};
use crate::rules::Rule;
use futures_util::future::select;
use std::pin::pin;
use std::sync::Arc;

/// A writer that waits for a slot, until it is dropped.
struct WaitingForSlot<'a>(&'a Engine);

impl<'a> WaitingForSlot<'a> {
    fn new(engine: &'a Engine) -> WaitingForSlot<'a> {
        engine.state.lock().writeback.begin_wait_for_slot();
        WaitingForSlot(engine)
    }
}

impl Drop for WaitingForSlot<'_> {
    fn drop(&mut self) {
        self.0.state.lock().writeback.end_wait_for_slot();
    }
}

impl Engine {
    /// Writes as much as can be acknowledged without waiting, from the front. Returns how many
    /// bytes that is.
    pub(crate) fn write_ready(&self, sector: Sector, data: &[u8]) -> Result<usize, CacheError> {
        self.check_range(sector, to_u64(data.len()))?;
        self.counters.writes.add(1);
        self.counters.write_bytes.add(to_u64(data.len()));
        let mut visit = self.state.lock();
        if visit.routing.arrives(sector, data.len()) {
            return Ok(0);
        }
        let mut done = 0;
        loop {
            let state = &mut *visit;
            if state.writeback.is_pacing(&state.log) {
                return Ok(done);
            }
            let (taken, obstacle) = state.write_some(sector_at(sector, done), &data[done..]);
            done += taken;
            match obstacle {
                Some(Obstacle::Error(error)) => return Err(error),
                None if done < data.len() => {}
                _ => return Ok(done),
            }
            visit.give_way();
            if self.runtime.is_thread_shared() {
                return Ok(done);
            }
            visit = self.state.lock();
        }
    }

    /// Goes on with a write whose front [`Engine::write_ready`] has taken.
    pub(crate) async fn write_rest(
        self: &Arc<Self>,
        sector: Sector,
        data: &[u8],
    ) -> Result<(), CacheError> {
        let around = self.state.lock().routing.applies_to(sector, data.len());
        if around {
            return self.write_around(sector, data).await;
        }
        self.write_to_log(sector, data).await
    }

    pub(crate) async fn write(
        self: &Arc<Self>,
        sector: Sector,
        data: &[u8],
    ) -> Result<(), CacheError> {
        let done = self.write_ready(sector, data)?;
        if done == data.len() {
            return Ok(());
        }
        self.write_rest(sector_at(sector, done), &data[done..]).await
    }

    /// Writes to the log, and waits where it must. Others come in between the visits to the state:
    /// until a write is acknowledged, a concurrent write may come before or after any of its
    /// blocks. Each visit looks anew whether the cache is open and where the blocks lie.
    pub(super) async fn write_to_log(
        self: &Arc<Self>,
        sector: Sector,
        data: &[u8],
    ) -> Result<(), CacheError> {
        self.pace(data.len()).await;
        let mut done = 0;
        while done < data.len() {
            let obstacle = {
                let mut visit = self.state.lock();
                let (taken, obstacle) = visit.write_some(sector_at(sector, done), &data[done..]);
                visit.give_way();
                done += taken;
                obstacle
            };
            match obstacle {
                None if done < data.len() => self.let_others().await,
                None => {}
                Some(Obstacle::Error(error)) => return Err(error),
                Some(Obstacle::Lost(place)) => return Err(self.altered_place(place).into()),
                Some(Obstacle::Wait(wait)) => self.wait_for(wait).await?,
                Some(Obstacle::Merge { block, old, id }) => {
                    let rest = fragments(sector_at(sector, done), data.len() - done).next();
                    let Some(fragment) = rest else { continue };
                    debug_assert_eq!(fragment.block, block);
                    if self.merge(&fragment, &data[done..done + fragment.length], old, id).await? {
                        done += fragment.length;
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits for the turn of a write of `length` bytes, when the log is nearly full.
    async fn pace(&self, length: usize) {
        if length == 0 {
            return;
        }
        let delay = {
            let mut visit = self.state.lock();
            let state = &mut *visit;
            let blocks = length.div_ceil(BLOCK_BYTES);
            state.writeback.admit(&state.log, self.runtime.now(), blocks)
        };
        if !delay.is_zero() {
            let relaxed = self.state.wait(Waiter::Request, |state| {
                let waits = state.writeback.is_pacing(&state.log) && !state.lifecycle.is_ending();
                (!waits).then_some(())
            });
            select(self.runtime.sleep(delay), pin!(relaxed)).await;
        }
    }

    /// Whether write-back waits for the link to the backing device, and does not fail.
    fn is_link_awaited(&self) -> bool {
        let link = self.backing.link();
        link.is_some_and(|link| link.is_awaited()) && self.rules.keep(Rule::LostLinkNoFault)
    }

    /// Waits until it may be worth another try.
    ///
    /// # Errors
    /// When the log is full, and write-back has failed for long.
    pub(crate) async fn wait_for(&self, wait: Wait) -> Result<(), CacheError> {
        match wait {
            Wait::Appender => {
                let may_go_on = |state: &mut State| {
                    (state.log.may_seal() || state.lifecycle.is_ending()).then_some(())
                };
                self.state.wait(Waiter::Request, may_go_on).await;
                Ok(())
            }
            Wait::RangeLock(block) => {
                let is_free = |state: &mut State| (!state.locks.is_locked(block)).then_some(());
                self.state.wait(Waiter::Request, is_free).await;
                Ok(())
            }
            Wait::Slot => {
                let _waiting = WaitingForSlot::new(self);
                self.state
                    .wait(Waiter::Request, |state| match state.writeback.jammed() {
                        _ if state.log.free_slots() > 0 || state.lifecycle.is_ending() => {
                            Some(Ok(()))
                        }
                        Some(_) if self.is_link_awaited() => None,
                        jammed => jammed.map(|error| Err(CacheError::Full(error.clone()))),
                    })
                    .await
            }
        }
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
            let mut state = self.state.lock();
            if state.log.id_of(old.place.slot) != id {
                return Ok(false);
            }
            Pinned::new(self, &mut state, old.place.slot)
        };
        let base = self.read_places(old.place, IoBuf::zeroed(BLOCK_BYTES)).await?;
        drop(pinned);
        let merged = self.state.lock().merge(new, data, (old, id), base.block_at(0))?;
        match merged {
            Merged::Done => Ok(true),
            Merged::Changed => Ok(false),
            Merged::Wait(wait) => self.wait_for(wait).await.map(|()| false),
        }
    }
}
