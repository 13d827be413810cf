//! The log as recovery reads it, and what its segments hold.

use super::mixture::Later;
use super::options::{OpenOptions, Reading};
use crate::cache::state::ages::Ages;
use crate::cache::state::index::Index;
use crate::cache::state::segment_log::Item;
use crate::device::Device;
use crate::format::{Geometry, PLACES, Place, Sector, SegmentId, Slot, to_usize};
use crate::log::bounds::first_outside;
use crate::log::live::Beyond;
use crate::log::pairing::{BackingFacts, check_pairing};
use crate::log::recovery::{Recovery, recover};
use crate::log::scan::{SlotContent, scan, scan_headers, scan_trusting};
use crate::log::superblock::{Superblock, read_superblock};
use crate::log::tail::{Tail, read_tail, slots_ahead};
use crate::log::{LogError, LogErrorKind, refuse_older};
use crate::rules::{Rule, Rules};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::Duration;

/// A log as it was read, and what its segments hold.
pub(super) struct Replay {
    pub(super) superblock: Superblock,
    pub(super) recovery: Recovery,
    pub(super) index: Index,
    /// Dirty sectors of older versions that the newest version of their block does not carry. They
    /// had been written back when the newer version was made, but the log does not say so.
    pub(super) leftovers: Vec<Item>,
    /// The newest live segment with a clean entry. The index does not hold clean entries.
    pub(super) staged: SegmentId,
    pub(super) bytes_read: u64,
    pub(super) ages: Ages,
    /// The segments in whose slots nothing was looked at: see [`Tail::rest`].
    pub(super) rest: Range<u64>,
}

fn replay_until(
    cache: &Device,
    recovery: Recovery,
    until: SegmentId,
) -> Result<Recovery, LogError> {
    let points = recovery.points();
    if points.contains(&until) {
        return Ok(recovery.until(until));
    }
    let (first, last) = points.into_inner();
    Err(LogError::new(cache, LogErrorKind::NoSuchPoint { until, first, last }))
}

/// What the slots hold, live or not, while they are read.
struct Slots<'a> {
    geometry: Geometry,
    backing: &'a Device,
    index: Index,
    /// Where the first entry in a slot lies that does not fit on the backing device.
    outside: HashMap<Slot, Sector>,
    /// Slots with clean entries.
    staged: HashSet<Slot>,
    /// Slots that were taken in.
    seen: Box<[bool]>,
    bytes_read: u64,
    ages: Ages,
    leftovers: Vec<Item>,
    ahead: Ahead,
    rules: Rules,
}

/// Segments whose entries are the newest versions already, while others are still read: the ones
/// after `start`, up to `linked`. Up to `read`, the log has no gap.
#[derive(Clone, Copy)]
struct Ahead {
    start: SegmentId,
    linked: SegmentId,
    read: SegmentId,
}

impl Ahead {
    fn of(start: SegmentId) -> Ahead {
        Ahead { start, linked: start, read: start }
    }

    /// The ones that are linked.
    fn segments(self) -> Vec<SegmentId> {
        (self.start.next().0..=self.linked.0).map(SegmentId).collect()
    }
}

impl Slots<'_> {
    /// Takes in a slot, instead of what was taken in of it before.
    fn visit(&mut self, slot: Slot, content: &SlotContent) {
        self.bytes_read += content.bytes_read;
        let seen = &mut self.seen[to_usize(slot.0.into())];
        if std::mem::replace(seen, true) {
            let Ahead { start, linked, .. } = self.ahead;
            let is_linked = self.geometry.id_in_slot(slot, linked) > start;
            if is_linked && self.rules.keep(Rule::LinkedAsReadLast) {
                self.unlink();
            }
            self.index.forget(slot);
            self.outside.remove(&slot);
            self.staged.remove(&slot);
        }
        let Some(header) = content.header.as_ref().filter(|_| content.state.valid_id().is_some())
        else {
            return;
        };
        if let Some(extension) = &header.extension {
            self.ages.set(slot, Duration::from_millis(extension.time));
        }
        let sectors = BackingFacts::of(self.backing).sectors;
        for (entry, place) in header.metablocks.iter().zip((0..).map(|index| Place { slot, index }))
        {
            // A clean entry of a read cache. It may be older than the backing device by now: the
            // kernel module writes around a cache without a trace in the log.
            if entry.dirty.is_clean() {
                self.staged.insert(slot);
                continue;
            }
            if let Some(sector) = first_outside(entry.block, entry.dirty, sectors) {
                self.outside.entry(slot).or_insert(sector);
                continue;
            }
            self.index.hold(entry.block, entry.dirty, place);
            if let Some(crc) = entry.crc {
                self.index.set_crc(place, crc);
            }
        }
    }

    /// Applies segments that are likely to be live, in the order of the log, while others are read.
    /// Those at its end may be read again.
    fn link_ahead(&mut self, found: Option<SegmentId>) {
        if found == Some(self.ahead.read.next()) {
            self.ahead.read = self.ahead.read.next();
        }
        let behind = match self.rules.keep(Rule::LinkedAsReadLast) {
            true => self.geometry.write_window(),
            false => 0,
        };
        while self.ahead.read.since(self.ahead.linked) > behind {
            self.ahead.linked = self.ahead.linked.next();
            self.apply(self.ahead.linked);
        }
    }

    /// Undoes that.
    fn unlink(&mut self) {
        self.ahead = Ahead::of(self.ahead.start);
        self.index.unlink();
        self.leftovers.clear();
    }

    /// Applies what a live segment holds.
    fn apply(&mut self, id: SegmentId) {
        let slot = self.geometry.slot_of(id);
        let places = || (0..PLACES).map(|index| Place { slot, index });
        places()
            .filter_map(|place| self.index.at(place))
            .for_each(|(block, _)| self.index.fetch(block));
        for place in places() {
            let Some((block, dirty)) = self.index.at(place) else { continue };
            if let Some(old) = self.index.link(block, place) {
                let sectors = old.dirty.without(dirty);
                if !sectors.is_clean() {
                    self.leftovers.push(Item {
                        block,
                        place: old.place,
                        sectors,
                        discarded: false,
                    });
                }
            }
        }
    }
}

impl Replay {
    pub(super) async fn read(
        cache: &Device,
        backing: &Device,
        options: &OpenOptions,
    ) -> Result<Replay, LogError> {
        let OpenOptions { reading, until, wanted, known, mixes, rules, .. } = options;
        let superblock = read_superblock(cache, *wanted).await?;
        let geometry = superblock.geometry;
        let mut slots = Slots {
            geometry,
            backing,
            index: Index::new(geometry, superblock.extension.is_some()),
            outside: HashMap::new(),
            staged: HashSet::new(),
            seen: vec![false; geometry.all_slots().len()].into(),
            bytes_read: 0,
            ages: Ages::new(geometry.slots()),
            leftovers: Vec::new(),
            ahead: Ahead::of(superblock.record),
            rules: *rules,
        };
        let tail = match reading {
            Reading::Tail => slots.read_tail(cache, &superblock).await,
            Reading::Headers | Reading::Whole => None,
        };
        let (recovery, rest) = match tail {
            Some(Tail { recovery, rest }) => (recovery, rest),
            None => (slots.read_all(cache, &superblock, *reading).await, 0..0),
        };
        let recovery = recovery.refuse_corrupt(cache)?;
        known.map_or(Ok(()), |known| refuse_older(cache, recovery.reach(), known))?;
        let later = until.map(|until| Later::of(cache, backing, geometry, &recovery, until));
        let recovery = match *until {
            Some(until) => replay_until(cache, recovery, until)?,
            None => recovery,
        };
        if let Some(extension) = &superblock.extension {
            check_pairing(cache, extension, &BackingFacts::of(backing))?;
        }
        let replay = Replay { rest, ..slots.replay(cache, &superblock, recovery)? };
        if let Some(later) = later.filter(|_| !mixes) {
            later.refuse_mixture(&replay.index).await?;
        }
        Ok(replay)
    }
}

impl Slots<'_> {
    /// Reads the tail of the log, if that decides what is live.
    async fn read_tail(&mut self, cache: &Device, superblock: &Superblock) -> Option<Tail> {
        let rules = self.rules;
        if !rules.keep(Rule::UnclaimedReadWhole) {
            return None;
        }
        let ahead = match rules.keep(Rule::TailReadOn) {
            true => slots_ahead(self.geometry),
            false => 1,
        };
        let visit = |slot, content: &SlotContent| {
            self.visit(slot, content);
            self.link_ahead(content.state.valid_id());
        };
        read_tail(cache, superblock, ahead, visit).await
    }

    async fn read_all(
        &mut self,
        cache: &Device,
        superblock: &Superblock,
        reading: Reading,
    ) -> Recovery {
        let (geometry, rules) = (self.geometry, self.rules);
        let visit = |slot, content: &_| self.visit(slot, content);
        let states = match reading {
            Reading::Whole => scan(cache, geometry, visit).await,
            Reading::Tail | Reading::Headers if rules.keep(Rule::UnclaimedReadWhole) => {
                scan_trusting(cache, superblock, visit).await
            }
            Reading::Tail | Reading::Headers => scan_headers(cache, geometry, visit).await,
        };
        recover(superblock, &states)
    }

    fn replay(
        mut self,
        cache: &Device,
        superblock: &Superblock,
        recovery: Recovery,
    ) -> Result<Replay, LogError> {
        let rules = self.rules;
        let above = !rules.keep(Rule::RecoveryStopsAtGap)
            || !rules.keep(Rule::RecoveryStopsAtCutShort) && recovery.is_open;
        let above = recovery.dropped.iter().copied().filter(|_| above);
        let live: Vec<SegmentId> = recovery.live().chain(above).collect();
        let mut holds_live = vec![false; self.geometry.all_slots().len()];
        for &id in &live {
            let slot = self.geometry.slot_of(id);
            holds_live[to_usize(slot.0.into())] = true;
            if let Some(&sector) = self.outside.get(&slot) {
                let backing = BackingFacts::of(self.backing);
                return Err(backing.refuse_beyond(cache, Beyond { id, sector }));
            }
        }
        let is_held = self.seen.iter().zip(holds_live).map(|(seen, live)| *seen && !live);
        for (slot, _) in self.geometry.all_slots().zip(is_held).filter(|(_, held)| *held) {
            self.index.forget(slot);
        }
        if !live.starts_with(&self.ahead.segments()) {
            self.unlink();
        }
        live.iter().skip(self.ahead.segments().len()).for_each(|&id| self.apply(id));
        let is_staged = |id: &&SegmentId| self.staged.contains(&self.geometry.slot_of(**id));
        let staged = live.iter().rfind(is_staged).copied().unwrap_or(SegmentId::NONE);
        let Slots { index, leftovers, bytes_read, ages, .. } = self;
        let superblock = superblock.clone();
        let rest = 0..0;
        Ok(Replay { superblock, recovery, index, leftovers, staged, bytes_read, ages, rest })
    }
}
