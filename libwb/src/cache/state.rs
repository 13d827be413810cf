//! The engine's state: pure, under one short lock. No I/O, no waiting, no clock.
//!
//! Segment ids divide the log, oldest first:
//!
//! ```text
//! … written_back │ dirty, durable … durable │ … written │ sealed, in RAM … │ open, in RAM
//! ```
//!
//! Up to `written_back` (which the superblock record holds durably) slots may be reused. `durable`
//! segments survive a power cut; `written` ones are on the device, perhaps in its volatile cache.
//! Of the segment after them, whether open or sealed, the first blocks may be durable or written,
//! too: see [`commits`](super::commits).

use super::access::Accesses;
use super::age::Ages;
use super::bypass::Bypass;
use super::commits::{Commits, Lost, Position};
use super::index::Index;
use super::rate::Rate;
use super::staging::Staging;
use super::stuck::Stuck;
use super::throttle::Throttle;
use super::tunables::Tunables;
use crate::device::{DeviceError, IoBuf};
use crate::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, PLACES, Place, Reason, SEGMENT_BYTES, SegmentId,
    Slot,
};
use crate::planted::{Bug, Planted};
use crate::sys::prefetch_to_write;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Sealed segments kept in RAM on their way to the device, 512 KiB each. Writers wait when there
/// are as many.
pub(super) const MAX_SEALED: usize = 8;

/// The segment that takes new blocks.
pub(super) struct OpenSegment {
    pub(super) id: SegmentId,
    pub(super) length: u8,
    /// A whole segment; the header block is unused.
    pub(super) buf: IoBuf,
    pub(super) commits: Commits,
    pub(super) lost: Lost,
}

/// A segment on its way to the device. Nothing changes in it any more.
pub(super) struct SealedSegment {
    pub(super) id: SegmentId,
    pub(super) reason: Reason,
    pub(super) length: u8,
    pub(super) buf: Arc<IoBuf>,
    pub(super) commits: Commits,
    pub(super) lost: Lost,
    pub(super) started: bool,
    pub(super) written: bool,
}

/// Whether a block may take one of the last free slots. They are kept for blocks that are moved:
/// see [`super::stuck`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reserve {
    Use,
    Keep,
}

/// Why something must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// For a slot: write-back must catch up.
    Slot,
    /// For the appender: too many sealed segments.
    Appender,
    /// For a fence around this block.
    Fence(BlockNo),
}

pub(super) struct State {
    pub(super) geometry: Geometry,
    pub(super) index: Index,
    pub(super) open: Option<OpenSegment>,
    /// Neighbouring ids, oldest first.
    pub(super) sealed: VecDeque<SealedSegment>,
    /// The newest segment, open or sealed or long written.
    pub(super) newest: SegmentId,
    pub(super) written: SegmentId,
    /// The whole segments up to `durable_to`.
    pub(super) durable: SegmentId,
    /// What survives a power cut, the commits of the segment after `durable` included.
    pub(super) durable_to: Position,
    pub(super) written_back: SegmentId,
    /// The record on the device may cover more: a write of it is under way, or has failed.
    pub(super) record_in_doubt: bool,
    /// Up to where somebody wants everything to be durable.
    pub(super) flush_wanted: BTreeSet<Position>,
    /// Write-back is to reach these segments, whatever the policy says.
    pub(super) drains: Vec<SegmentId>,
    /// Nothing is written back but for a drain, and when there is no choice.
    pub(super) paused: bool,
    pub(super) throttle: Throttle,
    pub(super) rate: Rate,
    pub(super) ages: Ages,
    /// For each slot whether an epoch of the write history ends with its segment: whether a flush
    /// came after it.
    epoch_ends: Box<[bool]>,
    /// Blocks that a discard or a write around the log is changing on the backing device. Writes to
    /// them wait.
    pub(super) fenced: Vec<Range<BlockNo>>,
    /// Up to where segments may hold what the backing device has newer, once they are written back.
    /// What had been written back or staged before the cache was opened is not in the index, so the
    /// first discard begins with all of that.
    pub(super) forgotten: SegmentId,
    /// Up to where they were emptied because of that, but for those in doubt.
    pub(super) emptied: SegmentId,
    /// Written-back segments that were to be emptied, or found damaged, and are not known to be
    /// empty durably.
    pub(super) in_doubt: BTreeSet<SegmentId>,
    /// Up to where the index does not know all that segments hold: those from before the cache was
    /// opened.
    pub(super) unindexed: SegmentId,
    /// Reads under way on a slot, which must not be overwritten meanwhile.
    pins: HashMap<Slot, u32>,
    /// Buffers for segments to come.
    spare: Vec<IoBuf>,
    /// Writers that wait for a slot.
    pub(super) waiting_for_slot: usize,
    /// Write-back has something to do.
    pub(super) writing_back: bool,
    /// The newest segment with a version of a block of which an older one cannot be read: once both
    /// are in one batch, nobody needs the older.
    pub(super) replaced_by: SegmentId,
    /// Blocks whose newest version is newer than the backing device.
    pub(super) dirty_blocks: u64,
    /// Blocks on their way into the log for reads alone.
    pub(super) staging: Staging,
    /// Which writes go around the log.
    pub(super) bypass: Bypass,
    /// What requests found in the cache.
    pub(super) accesses: Accesses,
    /// Blocks that cannot be written back while others can.
    pub(super) stuck: Stuck,
    /// How often write-back has stopped because a device failed.
    pub(super) stops: u64,
    /// Write-back has not got on for long: writes that would wait for a slot fail.
    pub(super) jammed: Option<DeviceError>,
    /// The cache device failed: nothing is acknowledged any more.
    pub(super) failure: Option<DeviceError>,
    /// No more requests are taken.
    pub(super) closing: bool,
    /// Background tasks are to end.
    pub(super) stopping: bool,
    /// Background tasks that have not ended.
    pub(super) tasks: usize,
    pub(super) planted: Planted,
}

impl State {
    /// A state in which everything up to `point` is durable and everything up to `written_back` is
    /// clean.
    pub(super) fn new(
        geometry: Geometry,
        index: Index,
        written_back: SegmentId,
        point: SegmentId,
    ) -> State {
        State {
            geometry,
            index,
            open: None,
            sealed: VecDeque::new(),
            newest: point,
            written: point,
            durable: point,
            durable_to: Position::end_of(point),
            written_back,
            record_in_doubt: false,
            flush_wanted: BTreeSet::new(),
            drains: Vec::new(),
            paused: false,
            throttle: Throttle::default(),
            rate: Rate::default(),
            ages: Ages::new(geometry.slots()),
            epoch_ends: vec![true; geometry.slots() as usize].into(),
            fenced: Vec::new(),
            forgotten: written_back,
            emptied: SegmentId::NONE,
            in_doubt: BTreeSet::new(),
            unindexed: written_back,
            pins: HashMap::new(),
            spare: Vec::new(),
            waiting_for_slot: 0,
            writing_back: false,
            replaced_by: SegmentId::NONE,
            dirty_blocks: 0,
            staging: Staging::new(geometry.lap() * u64::from(PLACES)),
            bypass: Bypass::default(),
            accesses: Accesses::default(),
            stuck: Stuck::default(),
            stops: 0,
            jammed: None,
            failure: None,
            closing: false,
            stopping: false,
            tasks: 0,
            planted: Planted::default(),
        }
    }

    /// Goes by these tunables from now on.
    pub(super) fn configure(&mut self, tunables: &Tunables) {
        self.staging.configure(tunables);
        self.bypass.configure(tunables);
    }

    /// The segment that a slot holds now, in RAM or on the device.
    pub(super) fn id_of(&self, slot: Slot) -> SegmentId {
        self.geometry.id_in_slot(slot, self.newest)
    }

    /// Whether a place lies in a segment that recovery would apply: one that is not written back.
    pub(super) fn is_live(&self, place: Place) -> bool {
        self.id_of(place.slot) > self.written_back
    }

    /// Whether a place holds data that the backing device lacks.
    pub(super) fn is_dirty(&self, place: Place, dirty: DirtyBits) -> bool {
        !dirty.is_clean() && self.is_live(place)
    }

    /// A place's data, while its segment is in RAM.
    pub(super) fn in_ram(&self, place: Place) -> Option<&[u8; BLOCK_BYTES]> {
        let id = self.id_of(place.slot);
        let at = BLOCK_BYTES * (1 + usize::from(place.index));
        if let Some(open) = self.open.as_ref().filter(|open| open.id == id) {
            return Some(open.buf.block_at(at));
        }
        let front = self.sealed.front()?.id;
        let nth = usize::try_from(id.0.checked_sub(front.0)?).ok()?;
        Some(self.sealed.get(nth)?.buf.block_at(at))
    }

    /// Whether a place lies in RAM and holds a block that is lost.
    pub(super) fn is_lost(&self, place: Place) -> bool {
        let id = self.id_of(place.slot);
        let open = self.open.as_ref().filter(|open| open.id == id).map(|open| open.lost);
        let sealed = || self.sealed.iter().find(|sealed| sealed.id == id).map(|sealed| sealed.lost);
        open.or_else(sealed).is_some_and(|lost| lost.has(place.index))
    }

    /// The newest sealed segment, or one that was written long ago.
    pub(super) fn last_sealed(&self) -> SegmentId {
        match &self.open {
            Some(open) => open.id.minus(1),
            None => self.newest,
        }
    }

    /// Slots that can take a segment at once, without the reserve.
    pub(super) fn free_slots(&self) -> u64 {
        // A small log has none to spare.
        let reserve = (self.geometry.lap() / 8).min(2);
        self.all_free_slots().saturating_sub(reserve)
    }

    /// The same with the reserve.
    pub(super) fn all_free_slots(&self) -> u64 {
        self.geometry.lap() - self.newest.since(self.written_back)
    }

    /// Segments, sealed or open, that are not written back.
    pub(super) fn dirty_segments(&self) -> u64 {
        self.newest.since(self.written_back)
    }

    /// Takes the next place of the open segment for a block, and makes it the block's newest
    /// version. The place holds old data of other blocks until the caller fills it. Nothing older
    /// can be staged any more: while this version is live, a read of the whole block does not go to
    /// the backing device.
    pub(super) fn take_place(
        &mut self,
        block: BlockNo,
        dirty: DirtyBits,
    ) -> Result<&mut [u8; BLOCK_BYTES], Wait> {
        self.take_place_of(block, dirty, Reserve::Keep)
    }

    pub(super) fn take_place_of(
        &mut self,
        block: BlockNo,
        dirty: DirtyBits,
        reserve: Reserve,
    ) -> Result<&mut [u8; BLOCK_BYTES], Wait> {
        if self.open.as_ref().is_some_and(|open| open.length == PLACES) {
            self.seal(Reason::Full)?;
        }
        if self.open.is_none() {
            self.open_next(reserve)?;
        }
        let was_dirty =
            self.index.get(block).is_some_and(|old| self.is_dirty(old.place, old.dirty));
        self.dirty_blocks += u64::from(!dirty.is_clean() && !was_dirty);
        if !self.planted.has(Bug::CellOutlivesWrite) {
            self.staging.cancel(block);
        }
        let open = self.open.as_mut().expect("opened above");
        let place = Place { slot: self.geometry.slot_of(open.id), index: open.length };
        open.length += 1;
        let outlives = self.planted.has(Bug::DiscardOutlivesSlot) && self.index.is_discarded(place);
        self.index.insert(block, dirty, place);
        if outlives {
            self.index.set_discarded(place);
        }
        if open.length < PLACES {
            prefetch_to_write(open.buf.block_at_mut(BLOCK_BYTES * (1 + usize::from(open.length))));
        }
        Ok(open.buf.block_at_mut(BLOCK_BYTES * usize::from(open.length)))
    }

    /// The data of a block in the open segment, to be overwritten in place, unless a commit holds
    /// it. Its dirty bits grow by `dirty`.
    pub(super) fn overwrite(
        &mut self,
        place: Place,
        old: DirtyBits,
        dirty: DirtyBits,
    ) -> Option<&mut [u8; BLOCK_BYTES]> {
        let id = self.id_of(place.slot);
        let in_place = self.planted.has(Bug::CommittedOverwritten);
        let may_change = |open: &&mut OpenSegment| in_place || !open.commits.has(place);
        let open = self.open.as_mut().filter(|open| open.id == id).filter(may_change)?;
        if open.lost.has(place.index) {
            return None;
        }
        self.dirty_blocks += u64::from(old.is_clean() && !dirty.is_clean());
        self.index.set_dirty(place, old.union(dirty));
        Some(open.buf.block_at_mut(BLOCK_BYTES * (1 + usize::from(place.index))))
    }

    fn open_next(&mut self, reserve: Reserve) -> Result<(), Wait> {
        let free = if reserve == Reserve::Use { self.all_free_slots() } else { self.free_slots() };
        if free == 0 {
            return Err(Wait::Slot);
        }
        let id = self.newest.next();
        self.index.forget(self.geometry.slot_of(id));
        self.newest = id;
        let buf = self.spare.pop().unwrap_or_else(|| IoBuf::zeroed(SEGMENT_BYTES));
        self.open = Some(OpenSegment {
            id,
            length: 0,
            buf,
            commits: Commits::default(),
            lost: Lost::default(),
        });
        Ok(())
    }

    /// Whether there is room for another sealed segment.
    pub(super) fn may_seal(&self) -> bool {
        self.sealed.len() < MAX_SEALED
    }

    /// Sends a full segment on its way at once, if there is room for it.
    pub(super) fn seal_if_full(&mut self) {
        if self.open.as_ref().is_some_and(|open| open.length == PLACES) {
            // Without room, the next write waits for it.
            let _ = self.seal(Reason::Full);
        }
    }

    /// Closes the open segment, if it holds anything.
    pub(super) fn seal(&mut self, reason: Reason) -> Result<(), Wait> {
        if !self.may_seal() {
            return Err(Wait::Appender);
        }
        let Some(open) = self.open.take_if(|open| open.length > 0) else { return Ok(()) };
        let slot = self.geometry.slot_of(open.id);
        self.epoch_ends[slot.0 as usize] = false;
        self.sealed.push_back(SealedSegment {
            id: open.id,
            reason,
            length: open.length,
            buf: Arc::new(open.buf),
            commits: open.commits,
            lost: open.lost,
            started: false,
            written: false,
        });
        Ok(())
    }

    /// Blocks of a segment from `first` on have reached the device, with these CRCs.
    pub(super) fn note_crcs(&mut self, id: SegmentId, first: u8, crcs: &[u32]) {
        let slot = self.geometry.slot_of(id);
        for (index, &crc) in (first..).zip(crcs) {
            self.index.set_crc(Place { slot, index }, crc);
        }
    }

    /// All of a sealed segment has reached the device. Frees the RAM of all segments that lie there
    /// without a gap.
    pub(super) fn segment_written(&mut self, id: SegmentId) {
        if let Some(segment) = self.sealed.iter_mut().find(|segment| segment.id == id) {
            segment.written = true;
        }
        if self.planted.has(Bug::WrittenOverGap) {
            self.written = self.written.max(id);
        }
        while let Some(segment) = self.sealed.pop_front_if(|segment| segment.written) {
            self.written = segment.id;
            if self.spare.len() < MAX_SEALED {
                self.spare.extend(Arc::into_inner(segment.buf));
            }
        }
    }

    /// Segment `id`, the one after `written_back`, is written back, and that is recorded durably.
    pub(super) fn segment_written_back(&mut self, id: SegmentId) {
        debug_assert_eq!(id, self.written_back.next());
        let slot = self.geometry.slot_of(id);
        let newest_here = |place| {
            let (block, dirty) = self.index.at(place)?;
            (!dirty.is_clean() && self.index.get(block)?.place == place).then_some(())
        };
        let clean = (0..PLACES).filter_map(|index| newest_here(Place { slot, index })).count();
        self.dirty_blocks -= crate::format::to_u64(clean);
        self.written_back = id;
    }

    /// The newest segment that a drain is to reach.
    pub(super) fn drain_to(&self) -> SegmentId {
        self.drains.iter().copied().max().unwrap_or_default()
    }

    /// A flush covers everything up to this segment, which is sealed.
    pub(super) fn end_epoch(&mut self, id: SegmentId) {
        if id != SegmentId::NONE {
            self.epoch_ends[self.geometry.slot_of(id).0 as usize] = true;
        }
    }

    /// Whether an epoch of the write history ends with a segment of the log. Of one from before the
    /// cache was opened nobody knows; it counts as such, which is the safer answer.
    pub(super) fn ends_epoch(&self, id: SegmentId) -> bool {
        self.epoch_ends[self.geometry.slot_of(id).0 as usize]
    }

    /// Keeps a slot from being overwritten until it is unpinned as often.
    pub(super) fn pin(&mut self, slot: Slot) {
        *self.pins.entry(slot).or_insert(0) += 1;
    }

    /// Ends a [`State::pin`]. Returns whether a segment may have waited for that.
    pub(super) fn unpin(&mut self, slot: Slot) -> bool {
        let Some(count) = self.pins.get_mut(&slot) else { return false };
        *count -= 1;
        if *count > 0 {
            return false;
        }
        self.pins.remove(&slot);
        let waiting =
            self.sealed.iter().filter(|segment| !segment.started).map(|segment| segment.id);
        waiting
            .chain(self.open.as_ref().map(|open| open.id))
            .any(|id| self.geometry.slot_of(id) == slot)
    }

    pub(super) fn is_pinned(&self, slot: Slot) -> bool {
        self.pins.contains_key(&slot)
    }
}
