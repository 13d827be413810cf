//! A hash table of numbers that is allocated once and may be filled almost to the last cell.
//!
//! It is a cuckoo hash table. Each entry lies in one of two buckets that its hash names. A bucket
//! is a cache line. So a search looks at two lines, however full the table is, and a removal leaves
//! nothing behind. When both buckets are full, an entry moves to its other bucket, and so on, at
//! most [`MAX_MOVES`] times. If that makes no room, the entry is kept aside, where a search looks
//! at all entries. Since the hash is secret, that hardly happens.

use crate::format::{to_u64, to_usize};
use crate::sys::prefer_huge_pages;
use std::hint::black_box;

/// Numbers in a bucket: as many as fit a cache line.
const CELLS: usize = 16;
/// No number.
const FREE: u32 = 0;
/// Entries that one insertion may move.
const MAX_MOVES: u32 = 1000;

type Bucket = [u32; CELLS];

/// Finds numbers by the hash of what they stand for, which the caller knows.
pub(crate) struct Table {
    /// Each cell is [`FREE`], or holds a number plus one in its low bits. The bits above hold as
    /// much of the hash as fits. Cells are zeros from the start, so unused memory stays untouched.
    cells: Box<[u32]>,
    /// Where the first bucket begins, so that each is one cache line.
    start: usize,
    buckets: usize,
    /// What found no room.
    aside: Vec<u32>,
    /// Bits of a cell that the number takes, and the same as a mask.
    number_bits: u32,
    number_mask: u32,
    /// Entries in buckets and aside.
    len: usize,
    /// Chooses what is moved.
    turn: usize,
}

/// Where an entry lies.
#[derive(Clone, Copy)]
pub(crate) enum At {
    Bucket { bucket: usize, cell: usize },
    Aside(usize),
}

impl Table {
    /// A table for numbers below `limit`, each at most once. All of them leave it far from full.
    pub(crate) fn new(limit: u32) -> Table {
        // One cell in eight stays free, so that hardly one insertion in a hundred finds both
        // buckets full.
        let cells = to_usize(limit.into()) + to_usize(limit.into()) / 7;
        let number_bits = u32::BITS - limit.leading_zeros();
        let buckets = cells.div_ceil(CELLS).max(2);
        let cells = vec![FREE; (buckets + 1) * CELLS].into_boxed_slice();
        prefer_huge_pages(&cells);
        Table {
            start: cells.as_ptr().align_offset(size_of::<Bucket>()).min(CELLS),
            cells,
            buckets,
            aside: Vec::new(),
            number_bits,
            number_mask: low_half(!(u64::MAX << number_bits)),
            len: 0,
            turn: 0,
        }
    }

    fn bucket(&self, nth: usize) -> &Bucket {
        &self.cells[self.start..].as_chunks().0[nth]
    }

    fn bucket_mut(&mut self, nth: usize) -> &mut Bucket {
        &mut self.cells[self.start..].as_chunks_mut().0[nth]
    }

    /// Removes all entries.
    pub(crate) fn clear(&mut self) {
        self.cells.fill(FREE);
        self.aside.clear();
        self.len = 0;
    }

    /// How many entries there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The entry with this hash that `is_it` recognizes by its number.
    pub(crate) fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Option<(At, u32)> {
        let tag = self.tag(hash);
        let buckets = self.buckets_of(hash);
        // Both at once: if they have to be fetched from memory, that is under way at the same time.
        let [one, other] = buckets.map(|bucket| self.alike(self.bucket(bucket), tag));
        let mut alike = one | other << CELLS;
        while alike != 0 {
            let nth = to_usize(alike.trailing_zeros().into());
            alike &= alike - 1;
            let (bucket, cell) = (buckets[nth / CELLS], nth % CELLS);
            if let Some(number) =
                self.number(self.bucket(bucket)[cell]).filter(|&number| is_it(number))
            {
                return Some((At::Bucket { bucket, cell }, number));
            }
        }
        let aside = self.aside.iter().position(|&number| is_it(number))?;
        Some((At::Aside(aside), self.aside[aside]))
    }

    /// Has the processor fetch what a search for this hash looks at. For several searches it is
    /// quicker to fetch for all first than to wait in each.
    pub(crate) fn fetch(&self, hash: u64) {
        let [one, other] = self.buckets_of(hash);
        black_box(self.bucket(one)[0] ^ self.bucket(other)[0]);
    }

    /// A bit for each cell that may hold an entry of this tag. Without branches, so that cells are
    /// compared at once.
    fn alike(&self, cells: &Bucket, tag: u32) -> u32 {
        let mut alike = 0;
        for (nth, cell) in cells.iter().enumerate() {
            alike |= u32::from(cell & !self.number_mask == tag) << nth;
        }
        alike
    }

    /// Puts another number, whose hash is the same, in the place of one that was found.
    pub(crate) fn replace(&mut self, at: At, number: u32) {
        match at {
            At::Bucket { bucket, cell } => {
                let number_mask = self.number_mask;
                let cell = &mut self.bucket_mut(bucket)[cell];
                *cell = *cell & !number_mask | (number + 1);
            }
            At::Aside(nth) => self.aside[nth] = number,
        }
    }

    /// Removes an entry that was found.
    pub(crate) fn remove(&mut self, at: At) {
        match at {
            At::Bucket { bucket, cell } => self.bucket_mut(bucket)[cell] = FREE,
            At::Aside(nth) => drop(self.aside.swap_remove(nth)),
        }
        self.len -= 1;
    }

    /// Adds an entry that is not there yet. `hash_of` gives the hashes of others, by their numbers.
    pub(crate) fn insert(&mut self, hash: u64, number: u32, hash_of: impl Fn(u32) -> u64) {
        self.len += 1;
        let mut cell = self.tag(hash) | (number + 1);
        let [one, other] = self.buckets_of(hash);
        // The emptier of the two, so that both are seldom full.
        let mut bucket = if self.free(one) >= self.free(other) { one } else { other };
        for _ in 0..MAX_MOVES {
            let turn = self.turn;
            let cells = self.bucket_mut(bucket);
            if let Some(free) = cells.iter_mut().find(|cell| **cell == FREE) {
                *free = cell;
                return;
            }
            std::mem::swap(&mut cell, &mut cells[turn % CELLS]);
            self.turn = turn.wrapping_add(1);
            let Some(moved) = self.number(cell) else { return };
            let [one, other] = self.buckets_of(hash_of(moved));
            bucket = if bucket == one { other } else { one };
        }
        self.aside.extend(self.number(cell));
    }

    fn free(&self, bucket: usize) -> usize {
        self.bucket(bucket).iter().filter(|&&cell| cell == FREE).count()
    }

    /// The two buckets of a hash. They may be the same.
    fn buckets_of(&self, hash: u64) -> [usize; 2] {
        let buckets = to_u64(self.buckets);
        [hash >> 32, hash & u64::from(u32::MAX)].map(|half| to_usize((half * buckets) >> 32))
    }

    /// The upper bits of a cell: lower bits of the hash, which say little about its buckets.
    fn tag(&self, hash: u64) -> u32 {
        low_half(hash << self.number_bits)
    }

    fn number(&self, cell: u32) -> Option<u32> {
        (cell & self.number_mask).checked_sub(1)
    }

    #[cfg(test)]
    pub(crate) fn aside(&self) -> usize {
        self.aside.len()
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        std::mem::size_of_val(&*self.cells)
    }
}

#[allow(clippy::cast_possible_truncation)] // that is the purpose
fn low_half(n: u64) -> u32 {
    n as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is known of these numbers is that they differ: no hash helps.
    #[test]
    fn numbers_that_all_have_the_same_hash_are_found_all_the_same() {
        const LIMIT: u32 = 500;
        let mut table = Table::new(LIMIT);
        for number in 0..LIMIT {
            table.insert(7, number, |_| 7);
        }
        // Both buckets are the same one, and it is full.
        assert_eq!((table.len(), table.aside()), (LIMIT as usize, LIMIT as usize - CELLS));
        for wanted in (0..LIMIT).rev() {
            let (at, number) = table.find(7, |number| number == wanted).expect("it was put there");
            assert_eq!(number, wanted);
            table.remove(at);
        }
        assert_eq!((table.len(), table.aside()), (0, 0));
        assert!(table.find(7, |_| true).is_none());
    }

    #[test]
    fn a_table_takes_every_number_below_its_limit_at_once() {
        let hash = |n: u32| u64::from(n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).swap_bytes();
        for limit in [1, 2, 15, 16, 17, 33, 127, 128, 1000, 65_535, 65_536] {
            let mut table = Table::new(limit);
            for number in 0..limit {
                table.insert(hash(number), number, hash);
            }
            assert_eq!(table.len(), limit as usize);
            for wanted in 0..limit {
                assert!(
                    table.find(hash(wanted), |number| number == wanted).is_some(),
                    "{wanted} of {limit}"
                );
            }
        }
    }
}
