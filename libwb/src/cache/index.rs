//! Block → place: where the newest version of each cached block lies.
//!
//! All of it allocated once: what each place of the device holds, eight bytes each; the CRCs of their data, where
//! the cache keeps any; and a hash table from a block to the place of its newest version, which looks the block up in
//! the first part.

use crate::format::{BlockNo, DirtyBits, Geometry, PLACES, Place, Slot};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

/// Nothing is known of the place.
const EMPTY: u64 = u64::MAX;
/// Set where the CRC of the place's data is known.
const HAS_CRC: u64 = 1 << 63;

/// An entry of the log as the index keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cached {
    pub(super) place: Place,
    pub(super) dirty: DirtyBits,
}

pub(super) struct Index {
    /// From the lowest bit: 8 dirty bits, a block number of 55 bits, [`HAS_CRC`]; or [`EMPTY`].
    places: Box<[u64]>,
    /// One for each place, or none at all.
    crcs: Box<[u32]>,
    /// Numbers of places.
    newest: HashTable<u32>,
}

impl Index {
    /// An empty index, with room for CRCs or without.
    pub(super) fn new(geometry: Geometry, with_crcs: bool) -> Index {
        let places = geometry.slots() as usize * usize::from(PLACES);
        Index {
            places: vec![EMPTY; places].into_boxed_slice(),
            crcs: vec![0; if with_crcs { places } else { 0 }].into_boxed_slice(),
            newest: HashTable::with_capacity(places),
        }
    }

    /// The newest version of a block.
    pub(super) fn get(&self, block: BlockNo) -> Option<Cached> {
        let number = *self.newest.find(hash(block), |&n| holds(&self.places, n, block))?;
        Some(Cached { place: place(number), dirty: dirty_of(self.places[number as usize]) })
    }

    /// What a place holds, whether or not it is the newest version of its block.
    pub(super) fn at(&self, place: Place) -> Option<(BlockNo, DirtyBits)> {
        let held = self.places[number(place) as usize];
        (held != EMPTY).then(|| (block_of(held), dirty_of(held)))
    }

    /// The CRC-32C of what a place holds, if it is known.
    pub(super) fn crc(&self, place: Place) -> Option<u32> {
        let number = number(place) as usize;
        let held = self.places[number];
        (held != EMPTY && held & HAS_CRC != 0).then(|| self.crcs[number])
    }

    /// Notes the CRC-32C of what a place holds. Forgotten where the cache keeps none, or the place holds nothing.
    pub(super) fn set_crc(&mut self, place: Place, crc: u32) {
        let number = number(place) as usize;
        let held = &mut self.places[number];
        if *held != EMPTY
            && let Some(kept) = self.crcs.get_mut(number)
        {
            *kept = crc;
            *held |= HAS_CRC;
        }
    }

    /// Makes a place the newest version of a block.
    pub(super) fn insert(&mut self, block: BlockNo, dirty: DirtyBits, place: Place) {
        self.hold(block, dirty, place);
        self.link(block, place);
    }

    /// Notes what a place holds, which no lookup finds before [`Index::link`].
    pub(super) fn hold(&mut self, block: BlockNo, dirty: DirtyBits, place: Place) {
        self.places[number(place) as usize] = block.0 << 8 | u64::from(dirty.0);
    }

    /// Makes a place the newest version of the block that it holds.
    pub(super) fn link(&mut self, block: BlockNo, place: Place) {
        let number = number(place);
        let places = &self.places;
        let found = self.newest.entry(
            hash(block),
            |&n| holds(places, n, block),
            |&n| hash(block_of(places[n as usize])),
        );
        match found {
            Entry::Occupied(mut entry) => *entry.get_mut() = number,
            Entry::Vacant(entry) => {
                entry.insert(number);
            }
        }
    }

    /// Changes the dirty bits of a place that holds something.
    pub(super) fn set_dirty(&mut self, place: Place, dirty: DirtyBits) {
        let held = &mut self.places[number(place) as usize];
        debug_assert_ne!(*held, EMPTY);
        *held = *held & !0xff | u64::from(dirty.0);
    }

    /// Forgets a block. The place that holds it stays taken.
    pub(super) fn remove(&mut self, block: BlockNo) {
        if let Ok(entry) = self.newest.find_entry(hash(block), |&n| holds(&self.places, n, block)) {
            entry.remove();
        }
    }

    /// Forgets all that a slot holds, before it is written anew.
    pub(super) fn forget(&mut self, slot: Slot) {
        for index in 0..PLACES {
            let place = Place { slot, index };
            if let Some((block, _)) = self.at(place) {
                if let Ok(entry) = self.newest.find_entry(hash(block), |&n| n == number(place)) {
                    entry.remove();
                }
                self.places[number(place) as usize] = EMPTY;
            }
        }
    }

    /// How many blocks are cached.
    pub(super) fn len(&self) -> usize {
        self.newest.len()
    }
}

fn number(place: Place) -> u32 {
    place.slot.0 * u32::from(PLACES) + u32::from(place.index)
}

#[allow(clippy::cast_possible_truncation)] // a remainder of 127 fits a byte
fn place(number: u32) -> Place {
    Place { slot: Slot(number / u32::from(PLACES)), index: (number % u32::from(PLACES)) as u8 }
}

fn block_of(held: u64) -> BlockNo {
    BlockNo((held & !HAS_CRC) >> 8)
}

fn holds(places: &[u64], number: u32, block: BlockNo) -> bool {
    block_of(places[number as usize]) == block
}

#[allow(clippy::cast_possible_truncation)] // the lower 8 bits
fn dirty_of(held: u64) -> DirtyBits {
    DirtyBits(held as u8)
}

/// The finalizer of MurmurHash3: every bit of the block number reaches every bit of the hash.
pub(super) fn hash(block: BlockNo) -> u64 {
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

    proptest! {
        #[test]
        fn behaves_like_a_map_under_a_wrapping_log(blocks in prop::collection::vec((0..300u64, any::<u8>()), 0..1500)) {
            let geometry = Geometry::of_device(SUPERBLOCK_REGION_BYTES + 3 * to_u64(SEGMENT_BYTES)).expect("three slots");
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
}
