//! Read admission: which blocks that are read from the backing device go into the log as clean
//! entries.
//!
//! A read of a whole block that the cache does not hold *reserves* the block's admission, in the
//! same visit to the state that plans the read, and hands over the data when it has come. Whatever
//! makes that data old, a write or a discard, *cancels* the admission in its own visit. Blocks that
//! have come wait until there is a segment's worth. A background task then puts them into the open
//! segment, as long as no writer could come to wait because of that.
//!
//! Not every miss is worth the wear:
//!
//! - A sequence of more than `read_cache_threshold` neighbouring blocks is not admitted, as in the
//!   kernel module.
//! - A block is only admitted at its second miss, so that what is read once is not written to the
//!   cache device. A table of hashed block numbers remembers misses for a while.

use super::index::hash;
use crate::cache::tunables::Tunables;
use crate::device::IoBuf;
use crate::format::{BlockNo, PLACES, to_usize};
use std::collections::BTreeMap;

/// Entries of the table of misses, four bytes each: one for each place of the log, within these
/// limits.
const FEWEST_MISSES: usize = 1 << 12;
const MOST_MISSES: usize = 1 << 20;

/// Tells reads with reservations apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// How many misses in a row were of neighbouring blocks, and the block that would go on with them.
#[derive(Clone, Copy)]
pub(crate) struct Sequence {
    length: u64,
    next: BlockNo,
}

impl Sequence {
    const NONE: Sequence = Sequence { length: 0, next: BlockNo(0) };
}

/// Blocks on their way into the log.
pub(crate) struct ReadAdmission {
    /// Sequences of more blocks than this are not admitted. 0: nothing is.
    threshold: u64,
    /// The most blocks, reserved and waiting.
    limit: usize,
    /// Places of the log.
    places: usize,
    reserved: BTreeMap<BlockNo, Ticket>,
    /// In the order of their addresses, so that neighbours come to lie side by side on the cache
    /// device.
    waiting: BTreeMap<BlockNo, IoBuf>,
    tickets: u64,
    /// How often a block came to wait while it was time to put waiting blocks into the log.
    ripened: u64,
    /// The last misses.
    sequence: Sequence,
    misses: Option<Misses>,
    /// What the backing device shows is not to be kept.
    suspended: bool,
}

impl ReadAdmission {
    /// For a log of this many places. Nothing is admitted until this is configured.
    pub(crate) fn new(places: u64) -> ReadAdmission {
        ReadAdmission {
            threshold: 0,
            limit: 0,
            places: to_usize(places),
            reserved: BTreeMap::new(),
            waiting: BTreeMap::new(),
            tickets: 0,
            ripened: 0,
            sequence: Sequence::NONE,
            misses: None,
            suspended: false,
        }
    }

    /// Admits nothing more of what comes from the backing device.
    pub(crate) fn suspend(&mut self) {
        self.suspended = true;
        self.reserved.clear();
        self.waiting.clear();
    }

    pub(crate) fn configure(&mut self, tunables: &Tunables) {
        self.threshold = tunables.read_cache_threshold.into();
        self.limit = to_usize(tunables.nr_read_cache_cells.into());
        if self.threshold == 0 {
            self.reserved.clear();
            self.waiting.clear();
            self.misses = None;
        } else if self.misses.is_none() {
            self.misses = Some(Misses::new(self.places));
        }
        while self.waiting.len() > self.limit {
            self.waiting.pop_last();
        }
    }

    /// For a read that is being planned: its ticket, and the sequence that it may go on with.
    /// Misses of other reads may come between its own, and must not hide that these are neighbours.
    pub(crate) fn begin_read(&mut self) -> (Ticket, Sequence) {
        self.tickets += 1;
        (Ticket(self.tickets), self.sequence)
    }

    /// A whole block is to be read from the backing device. Returns whether its admission was
    /// reserved.
    pub(crate) fn missed(
        &mut self,
        block: BlockNo,
        ticket: Ticket,
        sequence: &mut Sequence,
    ) -> bool {
        if self.misses.is_none() {
            return false;
        }
        let length = if block == sequence.next { sequence.length + 1 } else { 1 };
        *sequence = Sequence { length, next: BlockNo(block.0 + 1) };
        self.sequence = *sequence;
        if length > self.threshold {
            if length == self.threshold + 1 {
                // Its first blocks looked like single misses. They are not to be admitted, either.
                (block.0 - self.threshold..block.0).for_each(|before| self.cancel(BlockNo(before)));
            }
            return false;
        }
        // Of two reads of the same block, the first has the reservation. Without room for one, the
        // next miss counts again.
        let again = self.misses.as_mut().is_some_and(|misses| misses.again(block));
        let wanted = again && self.has_room() && !self.holds(block);
        if wanted && let Some(misses) = &mut self.misses {
            misses.forget(block);
            self.reserved.insert(block, ticket);
        }
        wanted
    }

    /// Whether a block is reserved or waiting.
    fn holds(&self, block: BlockNo) -> bool {
        self.reserved.contains_key(&block) || self.waiting.contains_key(&block)
    }

    fn has_room(&self) -> bool {
        !self.suspended && self.reserved.len() + self.waiting.len() < self.limit
    }

    /// Lets the newest version of a block wait for admission, if there is room. Returns whether
    /// there was.
    pub(crate) fn keep(&mut self, block: BlockNo, data: IoBuf) -> bool {
        let kept = self.has_room();
        if kept {
            self.add(block, data);
        }
        kept
    }

    /// The data of a reserved block has come. Returns whether it is still wanted.
    pub(crate) fn fill(&mut self, block: BlockNo, ticket: Ticket, data: IoBuf) -> bool {
        let kept = self.give_up(block, ticket);
        if kept {
            self.add(block, data);
        }
        kept
    }

    fn add(&mut self, block: BlockNo, data: IoBuf) {
        self.waiting.insert(block, data);
        self.ripened += u64::from(self.is_ripe());
    }

    /// Changes when a block came to wait while it was time to put waiting blocks into the log.
    #[inline]
    pub(crate) fn ripened(&self) -> u64 {
        self.ripened
    }

    /// Ends a reservation. Returns whether it was still there.
    pub(crate) fn give_up(&mut self, block: BlockNo, ticket: Ticket) -> bool {
        let reserved = self.reserved.get(&block) == Some(&ticket);
        if reserved {
            self.reserved.remove(&block);
        }
        reserved
    }

    /// What is read, or was read, of a block is old.
    #[inline]
    pub(crate) fn cancel(&mut self, block: BlockNo) {
        self.reserved.remove(&block);
        self.waiting.remove(&block);
    }

    /// Takes the waiting block with the lowest address.
    pub(crate) fn pop(&mut self) -> Option<(BlockNo, IoBuf)> {
        self.waiting.pop_first()
    }

    /// Whether it is time to put waiting blocks into the log: there is a segment's worth of them,
    /// or as many as may wait. A read hands its blocks over a few at a time, so those that are
    /// still reserved come soon.
    pub(crate) fn is_ripe(&self) -> bool {
        !self.waiting.is_empty() && self.waiting.len() >= self.limit.min(usize::from(PLACES))
    }
}

/// Blocks that were missed of late. A later miss may take the entry of an earlier one.
struct Misses(Box<[u32]>);

impl Misses {
    fn new(places: usize) -> Misses {
        Misses(vec![0; places.next_power_of_two().clamp(FEWEST_MISSES, MOST_MISSES)].into())
    }

    /// Whether a block was missed before. From now on, it was.
    fn again(&mut self, block: BlockNo) -> bool {
        let (entry, tag) = self.entry(block);
        std::mem::replace(entry, tag) == tag
    }

    fn forget(&mut self, block: BlockNo) {
        *self.entry(block).0 = 0;
    }

    /// The entry of a block, and the tag that stands for it.
    fn entry(&mut self, block: BlockNo) -> (&mut u32, u32) {
        let hash = hash(block);
        let nth = to_usize(hash) % self.0.len();
        // 0 stands for none. The bits that choose the entry are not among these.
        let tag = u32::try_from(hash >> 32).unwrap_or_default() | 1;
        (&mut self.0[nth], tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BLOCK_BYTES;

    fn admission(threshold: u32, limit: u32) -> ReadAdmission {
        let mut admission = ReadAdmission::new(1000);
        admission.configure(&Tunables {
            read_cache_threshold: threshold,
            nr_read_cache_cells: limit,
            ..Tunables::default()
        });
        admission
    }

    /// Blocks that a read reserves after one read missed them before.
    fn reserved(admission: &mut ReadAdmission, blocks: &[u64]) -> Vec<u64> {
        for &block in blocks {
            let (first, mut sequence) = admission.begin_read();
            assert!(!admission.missed(BlockNo(block), first, &mut sequence), "read only once");
        }
        admission.sequence = Sequence::NONE;
        let (ticket, mut sequence) = admission.begin_read();
        for &block in blocks {
            admission.missed(BlockNo(block), ticket, &mut sequence);
        }
        admission
            .reserved
            .iter()
            .filter(|(_, of)| **of == ticket)
            .map(|(block, _)| block.0)
            .collect()
    }

    fn data() -> IoBuf {
        IoBuf::zeroed(BLOCK_BYTES)
    }

    #[test]
    fn a_block_is_admitted_when_it_is_missed_again_but_not_in_a_sequence_that_is_too_long() {
        let mut short = admission(3, 100);
        assert_eq!(reserved(&mut short, &[7, 20, 21, 22, 40]), [7, 20, 21, 22, 40]);
        let mut long = admission(3, 100);
        assert_eq!(
            reserved(&mut long, &[7, 20, 21, 22, 23, 24, 40]),
            [7, 40],
            "its beginning is given up"
        );
        assert!(reserved(&mut admission(0, 100), &[7]).is_empty());
    }

    #[test]
    fn a_cancelled_reservation_is_filled_neither_by_its_read_nor_by_another() {
        let mut admission = admission(100, 100);
        reserved(&mut admission, &[1, 5]);
        let ticket = Ticket(admission.tickets);
        admission.cancel(BlockNo(5));
        assert!(
            admission.fill(BlockNo(1), ticket, data())
                && !admission.fill(BlockNo(5), ticket, data())
        );
        // Read again, twice, with a reservation of its own.
        assert_eq!(reserved(&mut admission, &[5]), [5]);
        assert!(!admission.fill(BlockNo(5), ticket, data()));
        assert!(admission.fill(BlockNo(5), Ticket(admission.tickets), data()));
        admission.cancel(BlockNo(5));
        assert!(!admission.holds(BlockNo(5)) && admission.holds(BlockNo(1)));
    }

    #[test]
    fn no_more_blocks_are_held_than_allowed_and_when_all_of_them_wait_they_are_ripe() {
        let mut admission = admission(100, 3);
        assert_eq!(reserved(&mut admission, &[1, 3, 5, 7]), [1, 3, 5]);
        let ticket = Ticket(admission.tickets);
        assert!(!admission.is_ripe(), "nothing has come yet");
        admission.fill(BlockNo(3), ticket, data());
        admission.fill(BlockNo(5), ticket, data());
        assert!(!admission.is_ripe(), "the rest of the read comes soon");
        admission.fill(BlockNo(1), ticket, data());
        assert!(admission.is_ripe());
        admission.cancel(BlockNo(1));
        assert!(!admission.is_ripe());
        let (next, mut sequence) = admission.begin_read();
        assert!(
            admission.missed(BlockNo(7), next, &mut sequence),
            "it found no room, and was missed twice all the same"
        );
        admission.configure(&Tunables::default());
        assert!(!admission.holds(BlockNo(3)) && admission.misses.is_none(), "switched off");
    }
}
