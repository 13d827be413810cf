//! Versions of blocks: where the newest one lies, what it holds, and what write-back must take.

use super::SegmentLog;
use crate::cache::state::index::Cached;
use crate::format::{BLOCK_BYTES, BlockNo, DirtyBits, PLACES, Place, SegmentId};
use crate::rules::Rule;
use std::collections::BTreeSet;
use std::ops::Range;

/// A version of a block, or some sectors of it, to be written back.
#[derive(Clone, Copy)]
pub(crate) struct Item {
    pub(crate) block: BlockNo,
    pub(crate) place: Place,
    pub(crate) sectors: DirtyBits,
    /// These are the zeros of a discard.
    pub(crate) discarded: bool,
}

impl SegmentLog {
    /// The newest version of a block, if the cache holds any.
    #[inline]
    pub(crate) fn newest_version(&self, block: BlockNo) -> Option<Cached> {
        self.index.get(block)
    }

    /// The CRC-32C of what a place holds, if it is known.
    pub(crate) fn crc(&self, place: Place) -> Option<u32> {
        self.index.crc(place)
    }

    /// How many blocks the cache holds a version of.
    pub(crate) fn used_blocks(&self) -> usize {
        self.index.len()
    }

    /// Drops the version of a block that the cache holds. The place stays taken.
    pub(crate) fn drop_version(&mut self, block: BlockNo) {
        self.index.remove(block);
    }

    /// Whether a place lies in a segment that recovery would apply: one that is not written back.
    #[inline]
    pub(crate) fn is_live(&self, place: Place) -> bool {
        self.id_of(place.slot) > self.written_back
    }

    /// Whether a version holds data that the backing device lacks.
    #[inline]
    pub(crate) fn is_dirty(&self, version: Cached) -> bool {
        !version.dirty.is_clean() && self.is_live(version.place)
    }

    /// Whether the log that recovery would apply holds anything of a block.
    pub(crate) fn is_logged(&self, block: BlockNo) -> bool {
        self.index.get(block).is_some_and(|cached| self.is_live(cached.place))
    }

    /// Which sectors of a block are to be read from where the cache holds this version.
    pub(crate) fn readable_sectors(&self, cached: Cached) -> DirtyBits {
        match cached.dirty {
            bits if bits.is_clean() || bits.is_all() => DirtyBits::ALL,
            bits if self.is_live(cached.place) => bits,
            // Written back: the backing device has all of it.
            _ => DirtyBits::CLEAN,
        }
    }

    /// A place's data, while its segment is in RAM.
    #[inline]
    pub(crate) fn in_ram(&self, place: Place) -> Option<&[u8; BLOCK_BYTES]> {
        let id = self.id_of(place.slot);
        if let Some(open) = self.open.as_ref().filter(|open| open.id == id) {
            return Some(open.frame.block(place.index));
        }
        let front = self.sealed.front()?.id;
        let nth = usize::try_from(id.0.checked_sub(front.0)?).ok()?;
        Some(self.sealed.get(nth)?.frame.block(place.index))
    }

    /// Whether a place lies in RAM and holds a lost block.
    pub(crate) fn is_lost(&self, place: Place) -> bool {
        let id = self.id_of(place.slot);
        let open = self.open.as_ref().filter(|open| open.id == id).map(|open| open.lost);
        let sealed = || self.sealed.iter().find(|sealed| sealed.id == id).map(|it| it.lost);
        open.or_else(sealed).is_some_and(|lost| lost.has(place.index))
    }

    /// What a segment holds: each block and its place.
    fn entries(&self, id: SegmentId) -> impl Iterator<Item = (Place, BlockNo, DirtyBits)> {
        self.entries_in(id, 0..PLACES)
    }

    /// The same of some of its places.
    fn entries_in(
        &self,
        id: SegmentId,
        places: Range<u8>,
    ) -> impl Iterator<Item = (Place, BlockNo, DirtyBits)> {
        let slot = self.geometry.slot_of(id);
        places.filter_map(move |index| {
            let place = Place { slot, index };
            self.index.at(place).map(|(block, dirty)| (place, block, dirty))
        })
    }

    /// Whether a segment holds some of these blocks, in whatever version.
    pub(crate) fn holds_any(&self, id: SegmentId, blocks: &Range<BlockNo>) -> bool {
        self.entries(id).any(|(_, block, _)| blocks.contains(&block))
    }

    /// Takes those blocks out of `wanted` that a segment holds, in whatever version.
    pub(crate) fn take_held(
        &self,
        id: SegmentId,
        wanted: &mut BTreeSet<BlockNo>,
    ) -> Vec<(SegmentId, BlockNo)> {
        let held = self.entries(id).filter(|(_, block, _)| wanted.remove(block));
        held.map(|(_, block, _)| (id, block)).collect()
    }

    /// What of these places of a segment a batch that ends with `last` must write back.
    pub(crate) fn items_of(
        &self,
        id: SegmentId,
        places: Range<u8>,
        last: SegmentId,
    ) -> impl Iterator<Item = Item> {
        let item = move |(place, block, sectors): (Place, BlockNo, DirtyBits)| {
            if sectors.is_clean() {
                return None;
            }
            let newest = self.index.get(block)?;
            if newest.place == place {
                let discarded = self.index.is_discarded(place) && sectors.is_all();
                return Some(Item { block, place, sectors, discarded });
            }
            // A newer version in this batch includes all dirty sectors of this one. A newer version
            // beyond the batch is no substitute. A power cut may undo it, or the cache device may
            // be lost before it is written back. Then the backing device would hold neither.
            let newer = self.id_of(newest.place.slot);
            let superseded = newer <= last
                || !self.rules.keep(Rule::OlderWrittenUnlessNewerInBatch)
                || !self.rules.keep(Rule::OlderWrittenThoughNewerDurable)
                    && newer <= self.durable();
            // Sectors that the newest version lacks were written back before it was made, though
            // the record may not say so. There, the backing device may hold newer data than this
            // version.
            let sectors = sectors.intersection(newest.dirty);
            (!sectors.is_clean() && !superseded).then_some(Item {
                block,
                place,
                sectors,
                discarded: false,
            })
        };
        self.entries_in(id, places).filter_map(item)
    }

    /// The newest segment with a newer version of one of these neighbouring places.
    pub(crate) fn newest_replacement(&self, first: Place, blocks: usize) -> Option<SegmentId> {
        let places = (first.index..).take(blocks).map(|index| Place { index, ..first });
        let newer = |place: Place| {
            let newest = self.index.get(self.index.at(place)?.0)?;
            (newest.place != place).then(|| self.id_of(newest.place.slot))
        };
        places.filter_map(newer).max()
    }

    /// Segment `id`, the one after `written_back`, is written back, and that is recorded durably.
    pub(crate) fn segment_written_back(&mut self, id: SegmentId) {
        debug_assert_eq!(id, self.written_back.next());
        let is_newest = |&(place, block, dirty): &(Place, BlockNo, DirtyBits)| {
            !dirty.is_clean() && self.index.get(block).is_some_and(|newest| newest.place == place)
        };
        let clean = self.entries(id).filter(is_newest).count();
        self.dirty_blocks -= crate::format::to_u64(clean);
        self.written_back = id;
    }
}
