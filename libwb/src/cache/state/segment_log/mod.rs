//! The log as the engine knows it: which segment is how far, and where each block's newest version
//! lies.
//!
//! Segment ids divide the log, oldest first:
//!
//! ```text
//! … written_back │ dirty, durable … durable │ … written │ sealed, in RAM … │ open, in RAM
//! ```
//!
//! - Slots up to `written_back` may be reused: the superblock record covers them durably.
//! - `durable` segments survive a power cut.
//! - `written` segments are on the device, perhaps in its volatile cache.
//!
//! The first blocks of the next segment, open or sealed, may be durable or written as well: see
//! [`Position`].

mod append;
mod resume;
mod resumed;
mod segments;
mod versions;

pub(crate) use append::{Appended, Job};
pub(crate) use resumed::{OnDevice, Resumed};
pub(crate) use versions::Item;

use super::ages::Ages;
use super::index::{Cached, Index};
use super::position::Position;
use super::wait::{Reserve, Wait};
use crate::cache::head::{Entry, Frames};
use crate::device::DeviceError;
use crate::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, PLACES, Place, Reason, SegmentId, Slot, to_u64,
};
use crate::rules::{Rule, Rules};
use crate::sys::prefetch_to_write;
use segments::{OpenSegment, SealedSegment};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

/// Sealed segments kept in RAM on their way to the device, 512 KiB each. Writers wait when there
/// are as many.
const MAX_SEALED: usize = 8;
/// Slots that only moved blocks may take, where the log is large enough to spare them.
const RESERVED_SLOTS: u64 = 2;

pub(crate) struct SegmentLog {
    geometry: Geometry,
    index: Index,
    open: Option<OpenSegment>,
    /// Neighbouring ids, oldest first.
    sealed: VecDeque<SealedSegment>,
    /// The newest segment: open, or sealed, or written long ago.
    newest: SegmentId,
    written: SegmentId,
    /// What survives a power cut.
    durable_to: Position,
    written_back: SegmentId,
    /// Positions that requests want to be durable.
    flush_wanted: BTreeSet<Position>,
    /// For each slot whether a flush came after its segment, which ends an epoch of the history.
    epoch_ends: Box<[bool]>,
    /// Reads under way on a slot. It must not be overwritten meanwhile.
    pins: HashMap<Slot, u32>,
    frames: Frames,
    /// Blocks whose newest version is newer than the backing device.
    dirty_blocks: u64,
    ages: Ages,
    events: Happened,
    rules: Rules,
}

/// Counts what happened, for [`Landmarks`].
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Happened {
    /// A commit or a segment reached the device.
    appended: u64,
    /// A request wanted durability beyond what was wanted before.
    wanted: u64,
    /// The last pin of a slot went while a segment may have waited for that.
    unpinned: u64,
}

/// What of the log others wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Landmarks {
    pub(crate) newest: SegmentId,
    pub(crate) last_sealed: SegmentId,
    pub(crate) written_back: SegmentId,
    pub(crate) durable_to: Position,
    pub(crate) appended: u64,
    pub(crate) wanted: u64,
    pub(crate) unpinned: u64,
}

impl SegmentLog {
    /// A log in which everything up to `point` is durable and everything up to `written_back` is
    /// clean. The index holds what lies between. The log goes on with what is resumed.
    pub(crate) fn new(
        geometry: Geometry,
        index: Index,
        written_back: SegmentId,
        point: SegmentId,
        ages: Ages,
        Resumed { frames, segments, on_device }: Resumed,
        rules: Rules,
    ) -> SegmentLog {
        let mut log = SegmentLog {
            geometry,
            dirty_blocks: to_u64(index.len()),
            index,
            open: None,
            sealed: VecDeque::new(),
            newest: point,
            written: point,
            durable_to: Position::end_of(point),
            written_back,
            flush_wanted: BTreeSet::new(),
            epoch_ends: vec![true; geometry.slots() as usize].into(),
            pins: HashMap::new(),
            frames,
            ages,
            events: Happened::default(),
            rules,
        };
        log.resume(segments, on_device);
        log
    }

    #[inline]
    pub(crate) fn landmarks(&self) -> Landmarks {
        Landmarks {
            newest: self.newest,
            last_sealed: self.last_sealed(),
            written_back: self.written_back,
            durable_to: self.durable_to,
            appended: self.events.appended,
            wanted: self.events.wanted,
            unpinned: self.events.unpinned,
        }
    }

    #[inline]
    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The newest segment: open, or sealed, or written long ago.
    #[inline]
    pub(crate) fn newest(&self) -> SegmentId {
        self.newest
    }

    /// Every segment up to this one is on the device, perhaps in its volatile cache.
    #[inline]
    pub(crate) fn written(&self) -> SegmentId {
        self.written
    }

    /// Every segment up to this one survives a power cut.
    #[inline]
    pub(crate) fn durable(&self) -> SegmentId {
        self.durable_to.whole_segments()
    }

    /// What survives a power cut, the commits of the segment after [`SegmentLog::durable`]
    /// included.
    #[inline]
    pub(crate) fn durable_to(&self) -> Position {
        self.durable_to
    }

    /// Every segment up to this one is written back, and the device says so durably.
    #[inline]
    pub(crate) fn written_back(&self) -> SegmentId {
        self.written_back
    }

    /// The newest sealed segment, or one that was written long ago.
    #[inline]
    pub(crate) fn last_sealed(&self) -> SegmentId {
        match &self.open {
            Some(open) => open.id.minus(1),
            None => self.newest,
        }
    }

    /// Whether a segment is open.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The segment that a slot holds now, in RAM or on the device.
    #[inline]
    pub(crate) fn id_of(&self, slot: Slot) -> SegmentId {
        self.geometry.id_in_slot(slot, self.newest)
    }

    /// Blocks whose newest version is newer than the backing device.
    pub(crate) fn dirty_blocks(&self) -> u64 {
        self.dirty_blocks
    }

    /// Segments, sealed or open, that are not written back.
    #[inline]
    pub(crate) fn dirty_segments(&self) -> u64 {
        self.newest.since(self.written_back)
    }

    /// Slots that can take a segment at once, without the reserve.
    #[inline]
    pub(crate) fn free_slots(&self) -> u64 {
        // A small log has none to spare.
        let reserve = (self.geometry.lap() / 8).min(RESERVED_SLOTS);
        self.all_free_slots().saturating_sub(reserve)
    }

    /// The same with the reserve.
    #[inline]
    pub(crate) fn all_free_slots(&self) -> u64 {
        self.geometry.lap() - self.dirty_segments()
    }

    /// Places that can be taken before a writer must wait for a slot.
    pub(crate) fn free_places(&self) -> u64 {
        let in_open = self.open.as_ref().map_or(0, |open| PLACES - open.length);
        self.free_slots() * u64::from(PLACES) + u64::from(in_open)
    }

    /// How many places the log has taken since its beginning.
    pub(crate) fn places_taken(&self) -> u64 {
        let in_open = self.open.as_ref().map_or(u64::from(PLACES), |open| u64::from(open.length));
        self.newest.minus(1).0 * u64::from(PLACES) + in_open
    }

    /// The segment that takes the next block, and the place for it, counted through the slots.
    pub(crate) fn cursor(&self) -> (SegmentId, u64) {
        let open = self.open.as_ref().filter(|open| open.length < PLACES);
        let (id, length) = open.map_or((self.newest.next(), 0), |open| (open.id, open.length));
        (id, u64::from(self.geometry.slot_of(id).0) * u64::from(PLACES) + u64::from(length))
    }

    /// Takes the next place of the open segment for a block, and makes it the block's newest
    /// version. The place holds old data of other blocks until `fill` has filled it.
    #[inline]
    pub(crate) fn take_place(
        &mut self,
        Entry { block, dirty, discarded: _, lost }: Entry,
        reserve: Reserve,
        fill: impl FnOnce(&mut [u8; BLOCK_BYTES]),
    ) -> Result<(), Wait> {
        if self.open.as_ref().is_some_and(|open| open.length == PLACES) {
            self.seal(Reason::Full)?;
        }
        if self.open.is_none() {
            self.open_next(reserve)?;
        }
        let old = self.index.get(block);
        let was_dirty = old.is_some_and(|old| self.is_dirty(old));
        self.dirty_blocks += u64::from(!dirty.is_clean() && !was_dirty);
        let open = self.open.as_mut().expect("opened above");
        let place = Place { slot: self.geometry.slot_of(open.id), index: open.length };
        open.length += 1;
        let keeps_mark = !self.rules.keep(Rule::DiscardMarkEndsWithSlot);
        let outlives = keeps_mark && self.index.is_discarded(place);
        self.index.insert(block, dirty, place);
        if outlives {
            self.index.set_discarded(place);
        }
        if lost {
            open.lost.add(place.index);
        }
        let lost = lost && self.rules.keep(Rule::HeadKeepsLost);
        let entry = Entry { block, dirty, discarded: outlives, lost };
        let data_first = self.rules.keep(Rule::HeadDataFirst);
        if !data_first {
            open.frame.publish(place.index, entry);
        }
        fill(open.frame.block_mut(place.index));
        if data_first {
            open.frame.publish(place.index, entry);
        }
        if open.length < PLACES {
            prefetch_to_write(open.frame.block_mut(open.length));
        }
        Ok(())
    }

    /// Has `fill` overwrite a block in place, if it lies in the open segment and no commit holds
    /// it. Its dirty bits grow by `dirty`. Returns whether it was done.
    #[inline]
    pub(crate) fn overwrite(
        &mut self,
        (block, old): (BlockNo, Cached),
        dirty: DirtyBits,
        fill: impl FnOnce(&mut [u8; BLOCK_BYTES]),
    ) -> bool {
        let Cached { place, dirty: before } = old;
        let id = self.id_of(place.slot);
        let keeps_commits = self.rules.keep(Rule::CommittedNeverOverwritten);
        let may_change = |open: &&mut OpenSegment| {
            open.id == id
                && !(keeps_commits && open.commits.has(place))
                && !open.lost.has(place.index)
        };
        let Some(open) = self.open.as_mut().filter(may_change) else { return false };
        let dirty = before.union(dirty);
        self.dirty_blocks += u64::from(before.is_clean() && !dirty.is_clean());
        self.index.set_dirty(place, dirty);
        let entry = Entry::new(block, dirty);
        self.frames.overwrite(&mut open.frame, place.index, entry, fill);
        true
    }

    /// Leaves the failure of the cache device to the next process.
    pub(crate) fn note_failure(&self, error: &DeviceError) {
        self.frames.note_failure(error);
    }

    /// Notes that the newest version of a block is the zeros of a discard.
    pub(crate) fn mark_discarded(&mut self, block: BlockNo) {
        let Some(Cached { place, dirty }) = self.index.get(block) else { return };
        self.index.set_discarded(place);
        let id = self.id_of(place.slot);
        if let Some(open) = self.open.as_ref().filter(|open| open.id == id) {
            let entry = Entry { discarded: true, ..Entry::new(block, dirty) };
            open.frame.update(place.index, entry);
        }
    }

    fn open_next(&mut self, reserve: Reserve) -> Result<(), Wait> {
        let free = match reserve {
            Reserve::Use => self.all_free_slots(),
            Reserve::Keep => self.free_slots(),
        };
        if free == 0 {
            return Err(Wait::Slot);
        }
        let id = self.newest.next();
        // There are more than segments in RAM, unless the device still holds some that it has
        // written.
        let frame = self.frames.begin(id).ok_or(Wait::Appender)?;
        self.index.forget(self.geometry.slot_of(id));
        self.newest = id;
        self.open = Some(OpenSegment::new(id, frame));
        Ok(())
    }

    /// Whether there is room for another sealed segment.
    #[inline]
    pub(crate) fn may_seal(&self) -> bool {
        self.sealed.len() < MAX_SEALED
    }

    /// Seals the open segment if it is full and there is room for another sealed one. Without room,
    /// the next write waits.
    #[inline]
    pub(crate) fn seal_if_full(&mut self) {
        if self.open.as_ref().is_some_and(|open| open.length == PLACES) {
            let _ = self.seal(Reason::Full);
        }
    }

    /// Closes the open segment, if it holds anything.
    pub(crate) fn seal(&mut self, reason: Reason) -> Result<(), Wait> {
        if !self.may_seal() {
            return Err(Wait::Appender);
        }
        if let Some(open) = self.open.take_if(|open| open.length > 0) {
            let slot = self.geometry.slot_of(open.id);
            self.epoch_ends[slot.0 as usize] = false;
            self.sealed.push_back(open.seal(reason));
        }
        Ok(())
    }

    /// A flush covers everything up to this segment, which is sealed.
    pub(crate) fn end_epoch(&mut self, id: SegmentId) {
        if id != SegmentId::NONE {
            self.epoch_ends[self.geometry.slot_of(id).0 as usize] = true;
        }
    }

    /// Whether an epoch of the write history ends with a segment of the log. For segments from
    /// before the cache was opened the answer is yes, which is the safer one.
    pub(crate) fn ends_epoch(&self, id: SegmentId) -> bool {
        self.epoch_ends[self.geometry.slot_of(id).0 as usize]
    }

    /// Keeps a slot from being overwritten until [`SegmentLog::unpin`] is called as often.
    pub(crate) fn pin(&mut self, slot: Slot) {
        *self.pins.entry(slot).or_insert(0) += 1;
    }

    /// Ends a [`SegmentLog::pin`].
    pub(crate) fn unpin(&mut self, slot: Slot) {
        let Some(count) = self.pins.get_mut(&slot) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        self.pins.remove(&slot);
        let unstarted = self.sealed.iter().filter(|segment| !segment.started);
        let mut waiting =
            unstarted.map(|segment| segment.id).chain(self.open.as_ref().map(|open| open.id));
        let is_awaited = waiting.any(|id| self.geometry.slot_of(id) == slot);
        self.events.unpinned += u64::from(is_awaited);
    }

    /// Whether a read of a slot is under way.
    pub(crate) fn is_pinned(&self, slot: Slot) -> bool {
        self.pins.contains_key(&slot)
    }

    /// Notes when the segments after `before` were begun: now, by the wall clock.
    pub(crate) fn note_begun(&mut self, before: SegmentId, now: Duration) {
        for id in (before.next().0..=self.newest.0).map(SegmentId) {
            self.ages.set(self.geometry.slot_of(id), now);
        }
    }

    /// How long the oldest dirty data has been waiting for write-back. `None` if nothing waits or
    /// its age is unknown.
    pub(crate) fn oldest_dirty(&self, now: Duration) -> Option<Duration> {
        let oldest = (self.dirty_blocks > 0).then(|| self.written_back.next())?;
        self.ages.age(self.geometry.slot_of(oldest), now)
    }
}
