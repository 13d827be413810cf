//! Block → place: where the newest version of each cached block lies.
//!
//! All of it is allocated once, about 15 bytes for each place:
//!
//! - six bytes for what the place holds;
//! - four bytes and a bit for the CRC of its data, if the cache keeps any;
//! - between four and five bytes for a [`Table`], which finds the place of a block's newest
//!   version.

use super::table::Table;
use crate::format::{BlockNo, DirtyBits, Geometry, PLACES, Place, Slot};
use crate::sys::prefer_huge_pages;
use std::hash::{BuildHasher, RandomState};

/// The most blocks that a volume has, 4 PiB: a block number plus one fits five bytes. Opening a
/// cache checks it.
pub(crate) const MAX_BLOCKS: u64 = (1 << 40) - 1;

/// An entry of the log as the index keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cached {
    pub(crate) place: Place,
    pub(crate) dirty: DirtyBits,
}

pub(crate) struct Index {
    /// By the number of the place.
    places: Box<[Held]>,
    /// The CRC-32C of what each place holds; or none at all.
    crcs: Box<[u32]>,
    /// A bit for each place: whether its CRC is known. No number can stand for "not known": any may
    /// be a CRC, and a user who chooses what is written can choose it.
    known: Box<[u64]>,
    /// Which places hold the zeros of a discard, a bit for each; empty until there is one.
    discarded: Vec<u64>,
    /// Numbers of places.
    newest: Table,
    /// Keeps users from choosing blocks that meet in the table.
    secret: u64,
}

/// What a place holds, packed: a block number plus one in five bytes, little-endian, and its dirty
/// bits. Zeros stand for nothing, so that fresh memory need not be touched.
type Held = [u8; 6];

fn held(block: BlockNo, dirty: DirtyBits) -> Held {
    debug_assert!(block.0 < MAX_BLOCKS);
    let [a, b, c, d, e, ..] = (block.0 + 1).to_le_bytes();
    [a, b, c, d, e, dirty.0]
}

fn unpacked([a, b, c, d, e, dirty]: Held) -> Option<(BlockNo, DirtyBits)> {
    let block = u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]).checked_sub(1)?;
    Some((BlockNo(block), DirtyBits(dirty)))
}

impl Index {
    /// An empty index, with room for CRCs or without.
    pub(crate) fn new(geometry: Geometry, with_crcs: bool) -> Index {
        let places = geometry.slots() * u32::from(PLACES);
        let held = vec![[0; 6]; places as usize].into_boxed_slice();
        let with_crc = if with_crcs { places as usize } else { 0 };
        let crcs = vec![0; with_crc].into_boxed_slice();
        let known = vec![0; with_crc.div_ceil(64)].into_boxed_slice();
        prefer_huge_pages(&held);
        prefer_huge_pages(&crcs);
        Index {
            places: held,
            crcs,
            known,
            discarded: Vec::new(),
            newest: Table::new(places),
            secret: RandomState::new().hash_one(0),
        }
    }

    /// The newest version of a block.
    pub(crate) fn get(&self, block: BlockNo) -> Option<Cached> {
        let (_, number) = self.newest.find(self.hash(block), |number| self.holds(number, block))?;
        Some(self.cached(number))
    }

    /// What a place holds, whether or not it is the newest version of its block.
    pub(crate) fn at(&self, place: Place) -> Option<(BlockNo, DirtyBits)> {
        unpacked(self.places[number(place) as usize])
    }

    /// The CRC-32C of what a place holds, if it is known.
    pub(crate) fn crc(&self, place: Place) -> Option<u32> {
        self.at(place)?;
        let (word, bit) = bit_of(number(place));
        let known = self.known.get(word).is_some_and(|word| word & bit != 0);
        known.then(|| self.crcs[number(place) as usize])
    }

    /// Notes the CRC-32C of what a place holds. Does nothing where the cache keeps no CRCs, or the
    /// place holds nothing.
    pub(crate) fn set_crc(&mut self, place: Place, crc: u32) {
        if self.at(place).is_some()
            && let Some(kept) = self.crcs.get_mut(number(place) as usize)
        {
            *kept = crc;
            let (word, bit) = bit_of(number(place));
            self.known[word] |= bit;
        }
    }

    /// Notes that a place holds the zeros of a discard, until it holds something else.
    pub(crate) fn set_discarded(&mut self, place: Place) {
        if self.discarded.is_empty() {
            self.discarded = vec![0; self.places.len().div_ceil(64)];
        }
        let (word, bit) = bit_of(number(place));
        self.discarded[word] |= bit;
    }

    /// Whether a place holds the zeros of a discard.
    pub(crate) fn is_discarded(&self, place: Place) -> bool {
        let (word, bit) = bit_of(number(place));
        self.discarded.get(word).is_some_and(|word| word & bit != 0)
    }

    fn not_discarded(&mut self, number: u32) {
        let (word, bit) = bit_of(number);
        if let Some(word) = self.discarded.get_mut(word) {
            *word &= !bit;
        }
    }

    /// Makes a place the newest version of a block, which lies within the volume.
    pub(crate) fn insert(&mut self, block: BlockNo, dirty: DirtyBits, place: Place) {
        self.hold(block, dirty, place);
        self.link(block, place);
    }

    /// Notes what a place holds. No lookup finds that before [`Index::link`].
    pub(crate) fn hold(&mut self, block: BlockNo, dirty: DirtyBits, place: Place) {
        let number = number(place);
        // An entry must not outlive what its place holds: the table asks the place for its hash.
        self.vacate(number);
        self.places[number as usize] = held(block, dirty);
        self.not_discarded(number);
        let (word, bit) = bit_of(number);
        if let Some(word) = self.known.get_mut(word) {
            *word &= !bit;
        }
    }

    /// Prepares the lookup of a block: see [`Table::fetch`].
    pub(crate) fn fetch(&self, block: BlockNo) {
        self.newest.fetch(self.hash(block));
    }

    /// Makes a place the newest version of the block that it holds. Returns the one before.
    pub(crate) fn link(&mut self, block: BlockNo, place: Place) -> Option<Cached> {
        let (number, hash_of_block) = (number(place), self.hash(block));
        if let Some((at, old)) = self.newest.find(hash_of_block, |number| self.holds(number, block))
        {
            self.newest.replace(at, number);
            return Some(self.cached(old));
        }
        let (places, secret) = (&self.places, self.secret);
        let block_of = |n: u32| unpacked(places[n as usize]).map_or(0, |(block, _)| block.0);
        self.newest.insert(hash_of_block, number, |n| hash(BlockNo(block_of(n) ^ secret)));
        None
    }

    /// Undoes each [`Index::link`].
    pub(crate) fn unlink(&mut self) {
        self.newest.clear();
    }

    fn cached(&self, number: u32) -> Cached {
        let [.., dirty] = self.places[number as usize];
        Cached { place: place(number), dirty: DirtyBits(dirty) }
    }

    /// Changes the dirty bits of a place that holds something. It is about to hold other data of
    /// the same block.
    pub(crate) fn set_dirty(&mut self, place: Place, dirty: DirtyBits) {
        debug_assert!(self.at(place).is_some());
        self.not_discarded(number(place));
        let [.., bits] = &mut self.places[number(place) as usize];
        *bits = dirty.0;
    }

    /// Forgets a block. The place that holds it stays taken.
    pub(crate) fn remove(&mut self, block: BlockNo) {
        if let Some((at, _)) =
            self.newest.find(self.hash(block), |number| self.holds(number, block))
        {
            self.newest.remove(at);
        }
    }

    /// Forgets all that a slot holds, before it is written anew.
    pub(crate) fn forget(&mut self, slot: Slot) {
        for index in 0..PLACES {
            self.vacate(number(Place { slot, index }));
        }
    }

    fn vacate(&mut self, number: u32) {
        let Some((block, _)) = unpacked(self.places[number as usize]) else { return };
        if let Some((at, _)) = self.newest.find(self.hash(block), |n| n == number) {
            self.newest.remove(at);
        }
        self.places[number as usize] = [0; 6];
    }

    /// How many blocks are cached.
    pub(crate) fn len(&self) -> usize {
        self.newest.len()
    }

    fn holds(&self, number: u32, block: BlockNo) -> bool {
        unpacked(self.places[number as usize]).is_some_and(|(held, _)| held == block)
    }

    fn hash(&self, block: BlockNo) -> u64 {
        hash(BlockNo(block.0 ^ self.secret))
    }
}

/// Where a place has its bit: the word, and the bit in it.
fn bit_of(number: u32) -> (usize, u64) {
    (number as usize / 64, 1 << (number % 64))
}

fn number(place: Place) -> u32 {
    place.slot.0 * u32::from(PLACES) + u32::from(place.index)
}

#[allow(clippy::cast_possible_truncation)] // a remainder of 127 fits a byte
fn place(number: u32) -> Place {
    Place { slot: Slot(number / u32::from(PLACES)), index: (number % u32::from(PLACES)) as u8 }
}

/// The finalizer of MurmurHash3: every bit of the block number reaches every bit of the hash.
pub(crate) fn hash(block: BlockNo) -> u64 {
    let mut h = block.0;
    h = (h ^ h >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ h >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ h >> 33
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, to_u64};
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn three_slots() -> Geometry {
        let bytes = SUPERBLOCK_REGION_BYTES + 3 * to_u64(SEGMENT_BYTES);
        Geometry::of_device(bytes).expect("three slots")
    }

    proptest! {
        #[test]
        fn behaves_like_a_map_under_a_wrapping_log(
            blocks in prop::collection::vec((0..300u64, any::<u8>()), 0..1500),
        ) {
            let geometry = three_slots();
            let mut index = Index::new(geometry, true);
            let mut model: HashMap<u64, Cached> = HashMap::new();
            for (at, (block, dirty)) in blocks.into_iter().enumerate() {
                let slot = Slot(u32::try_from(at / 127 % 3).expect("small"));
                let place = Place { slot, index: u8::try_from(at % 127).expect("small") };
                if place.index == 0 {
                    index.forget(slot);
                    model.retain(|_, cached| cached.place.slot != slot);
                }
                index.insert(BlockNo(block), DirtyBits(dirty), place);
                model.insert(block, Cached { place, dirty: DirtyBits(dirty) });
                prop_assert_eq!(index.len(), model.len());
            }
            for block in 0..300 {
                prop_assert_eq!(index.get(BlockNo(block)), model.get(&block).copied());
            }
        }
    }

    /// The engine forgets a slot before it writes there. Without that, the old entries must be gone
    /// all the same.
    #[test]
    fn a_place_that_is_taken_again_leaves_no_entry_behind() {
        let geometry = three_slots();
        let mut index = Index::new(geometry, true);
        for lap in 0..100 {
            for number in 0..3 * u32::from(PLACES) {
                index.insert(
                    BlockNo(1000 * lap + u64::from(number)),
                    DirtyBits::ALL,
                    place(number),
                );
            }
        }
        assert_eq!((index.len(), index.newest.aside()), (3 * usize::from(PLACES), 0));
    }

    /// A log that is full of distinct blocks, and was for several laps.
    #[test]
    fn a_full_log_takes_less_than_fifteen_bytes_for_each_block_and_keeps_none_aside() {
        let geometry = Geometry::of_device(SUPERBLOCK_REGION_BYTES + 1000 * to_u64(SEGMENT_BYTES))
            .expect("slots");
        let mut index = Index::new(geometry, true);
        let places = to_u64(geometry.slots() as usize * usize::from(PLACES));
        let mut blocks = (0..).map(BlockNo);
        for slot in (0..4).flat_map(|_| geometry.all_slots()) {
            index.forget(slot);
            for (index_in_slot, block) in (0..PLACES).zip(&mut blocks) {
                index.insert(block, DirtyBits::ALL, Place { slot, index: index_in_slot });
            }
            assert_eq!(index.newest.aside(), 0);
        }
        assert_eq!(to_u64(index.len()), places);
        for block in (3 * places..4 * places).map(BlockNo) {
            assert!(index.get(block).is_some());
        }
        let bytes = size_of_val(&*index.places) + size_of_val(&*index.crcs) + index.newest.bytes();
        assert!(to_u64(bytes) < 15 * places, "{bytes} bytes for {places} places");
    }
}
