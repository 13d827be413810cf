//! How blocks get into the open segment: writes, zeros of discards, admitted reads, moved blocks.

use super::State;
use super::fragment::{Fragment, fragments};
use super::index::Cached;
use super::pacing::PACING_DIVISOR;
use super::shared::VISIT;
use super::stuck::MovedBlock;
use super::wait::{Reserve, Wait};
use crate::cache::error::CacheError;
use crate::cache::figures::accesses::Access;
use crate::cache::head::Entry;
use crate::format::{BLOCK_BYTES, BlockNo, DirtyBits, Place, Sector, SegmentId};
use crate::rules::Rule;
use std::ops::Range;

/// Why a write cannot go on at once.
pub(crate) enum Obstacle {
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

impl From<Wait> for Obstacle {
    fn from(wait: Wait) -> Obstacle {
        Obstacle::Wait(wait)
    }
}

/// What became of a write on top of an older version.
pub(crate) enum Merged {
    Done,
    /// The older version is not the newest any more, or has been written back.
    Changed,
    Wait(Wait),
}

impl State {
    /// How a request meets a block. `cached` is what the cache holds of the block, if anything.
    pub(crate) fn access(&self, at: &Fragment, cached: Option<Cached>, write: bool) -> Access {
        let in_ram = cached.is_some_and(|cached| self.log.in_ram(cached.place).is_some());
        Access { write, hit: cached.is_some(), in_ram, whole: at.is_whole_block() }
    }

    /// Takes the next place of the log for the newest version of a block, which `fill` fills.
    /// Nothing older of it can be admitted any more.
    fn take_place(
        &mut self,
        entry: Entry,
        reserve: Reserve,
        fill: impl FnOnce(&mut [u8; BLOCK_BYTES]),
    ) -> Result<(), Wait> {
        self.log.take_place(entry, reserve, fill)?;
        if self.rules.keep(Rule::WriteCancelsAdmission) {
            self.admission.cancel(entry.block);
        }
        Ok(())
    }

    /// Writes from the front until something is in the way, or it is time for another visit.
    /// Returns the bytes taken, and what is in the way.
    pub(crate) fn write_some(&mut self, sector: Sector, data: &[u8]) -> (usize, Option<Obstacle>) {
        if let Err(error) = self.lifecycle.check_open() {
            return (0, Some(Obstacle::Error(error)));
        }
        let mut done = 0;
        for fragment in fragments(sector, data.len()).take(VISIT.into()) {
            let bytes = &data[fragment.at..fragment.at + fragment.length];
            if let Err(obstacle) = self.write_fragment(&fragment, bytes) {
                return (done, Some(obstacle));
            }
            done += fragment.length;
        }
        self.log.seal_if_full();
        (done, None)
    }

    fn write_fragment(&mut self, new: &Fragment, bytes: &[u8]) -> Result<(), Obstacle> {
        if self.locks.is_locked(new.block) {
            return Err(Obstacle::Wait(Wait::RangeLock(new.block)));
        }
        let old = self.log.newest_version(new.block);
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
    ) -> Result<(), Obstacle> {
        let dirty = new.bits();
        if let Some(old) = old {
            let fill = |data: &mut _| new.copy_into(data, bytes);
            if self.log.overwrite((new.block, old), dirty, fill) {
                return Ok(());
            }
            // The new version must include all sectors that are not written back, except those that
            // it overwrites. So the newest version alone has every dirty sector.
            let carries_on = self.log.is_dirty(old) && !old.dirty.without(dirty).is_clean();
            if carries_on && self.rules.keep(Rule::MergeKeepsOldSectors) {
                if self.log.is_lost(old.place) {
                    return Err(Obstacle::Lost(old.place));
                }
                let Some(base) = self.log.in_ram(old.place).copied() else {
                    let id = self.log.id_of(old.place.slot);
                    return Err(Obstacle::Merge { block: new.block, old, id });
                };
                return Ok(self.place_merged(new, bytes, old.dirty, &base)?);
            }
        }
        self.take_place(Entry::new(new.block, dirty), Reserve::Keep, |data| {
            if !dirty.is_all() {
                // No request reads the other sectors, but no other block's data is to lie there.
                data.fill(0);
            }
            new.copy_into(data, bytes);
        })?;
        Ok(())
    }

    fn place_merged(
        &mut self,
        new: &Fragment,
        bytes: &[u8],
        old_dirty: DirtyBits,
        base: &[u8; BLOCK_BYTES],
    ) -> Result<(), Wait> {
        let entry = Entry::new(new.block, old_dirty.union(new.bits()));
        self.take_place(entry, Reserve::Keep, |data| {
            data.copy_from_slice(base);
            new.copy_into(data, bytes);
        })
    }

    /// Writes a fragment on top of an older version, whose data was read from segment `id`.
    pub(crate) fn merge(
        &mut self,
        new: &Fragment,
        bytes: &[u8],
        (old, id): (Cached, SegmentId),
        base: &[u8; BLOCK_BYTES],
    ) -> Result<Merged, CacheError> {
        self.lifecycle.check_open()?;
        let is_newest = self.log.newest_version(new.block) == Some(old);
        if !is_newest || self.log.id_of(old.place.slot) != id || !self.log.is_dirty(old) {
            return Ok(Merged::Changed);
        }
        if self.locks.is_locked(new.block) {
            return Ok(Merged::Wait(Wait::RangeLock(new.block)));
        }
        let access = self.access(new, Some(old), true);
        let placed = self.place_merged(new, bytes, old.dirty, base);
        Ok(match placed {
            Ok(()) => {
                self.accesses.count(access);
                Merged::Done
            }
            Err(wait) => Merged::Wait(wait),
        })
    }

    /// The backing device gets a newer version of a block, or of a part of it, around the log.
    pub(crate) fn supersede(&mut self, new: &Fragment) {
        let old = self.log.newest_version(new.block);
        let access = self.access(new, old, true);
        self.accesses.count(access);
        if self.rules.keep(Rule::WriteAroundCancelsAdmission) {
            self.admission.cancel(new.block);
        }
        if let Some(old) = old.filter(|_| self.rules.keep(Rule::WriteAroundDropsCached)) {
            self.drop_written_back(new.block, old);
        }
    }

    /// Drops the cached version of a block, which is written back: the backing device gets a newer
    /// one.
    fn drop_written_back(&mut self, block: BlockNo, old: Cached) {
        self.log.drop_version(block);
        self.stale.outdated(self.log.id_of(old.place.slot));
    }

    /// Makes the cache hold only zeros of some blocks. Writes zeros over versions that are not
    /// written back, dirty or clean. Drops the others. Returns the block at which it stopped.
    pub(crate) fn cover(
        &mut self,
        blocks: Range<BlockNo>,
        is_space_given_up: bool,
    ) -> (BlockNo, Result<(), Wait>) {
        for block in (blocks.start.0..blocks.end.0).map(BlockNo) {
            if self.rules.keep(Rule::DiscardCancelsAdmission) {
                self.admission.cancel(block);
            }
            let Some(old) = self.log.newest_version(block) else { continue };
            if !self.log.is_live(old.place) {
                self.drop_written_back(block, old);
                continue;
            }
            if !self.rules.keep(Rule::DiscardCoversDirty) {
                continue;
            }
            let fill = |data: &mut [u8; BLOCK_BYTES]| data.fill(0);
            if !self.log.overwrite((block, old), DirtyBits::ALL, fill)
                && let Err(wait) =
                    self.take_place(Entry::new(block, DirtyBits::ALL), Reserve::Keep, fill)
            {
                return (block, Err(wait));
            }
            // Else write-back would fill again what the backing device has given up.
            if is_space_given_up {
                self.log.mark_discarded(block);
            }
        }
        self.log.seal_if_full();
        (blocks.end, Ok(()))
    }

    /// Whether clean blocks may be put into the log: it is nowhere near full, so that no writer
    /// comes to wait for a slot that they take, and the appender keeps up.
    pub(crate) fn may_admit(&self) -> bool {
        let lap = self.log.geometry().lap();
        let has_room = self.log.free_slots() > 1 + lap / PACING_DIVISOR;
        has_room && self.log.may_seal() && !self.lifecycle.is_ending()
    }

    /// Puts up to `most` waiting blocks into the log as clean entries. Returns how many.
    pub(crate) fn admit_some(&mut self, most: u64) -> u64 {
        let mut admitted = 0;
        while admitted < most
            && self.may_admit()
            && let Some((block, data)) = self.admission.pop()
        {
            let entry = Entry::new(block, DirtyBits::CLEAN);
            let fill = |place: &mut [u8; BLOCK_BYTES]| place.copy_from_slice(&data);
            // There was room for it.
            if self.take_place(entry, Reserve::Keep, fill).is_err() {
                break;
            }
            admitted += 1;
        }
        self.log.seal_if_full();
        admitted
    }

    /// Writes a stuck block to the end of the log once more, if what was read of it is still its
    /// newest version. Returns whether it is.
    pub(crate) fn move_block(&mut self, moved: &MovedBlock) -> Result<bool, Wait> {
        let MovedBlock { block, from, data, lost } = moved;
        if self.log.newest_version(*block) != Some(*from) {
            return Ok(false);
        }
        // A range lock does not matter: the data stays the same. And a discard that holds one may
        // wait for a slot, which waits for this.
        let is_lost = lost.is_some() && self.rules.keep(Rule::LostMarked);
        let entry = Entry { lost: is_lost, ..Entry::new(*block, from.dirty) };
        let fill = |place: &mut [u8; BLOCK_BYTES]| place.copy_from_slice(data.block_at(0));
        self.take_place(entry, Reserve::Use, fill)?;
        if let Some(newest) = self.log.newest_version(*block) {
            self.stuck.moved(*block, newest.place, lost.as_ref());
        }
        Ok(true)
    }
}
