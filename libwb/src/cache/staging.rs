//! Read caching: blocks that are read from the backing device again and again are put into the log
//! as clean entries.
//!
//! A read of a whole block that the cache does not hold reserves a *cell* for it, in the same visit
//! to the state that plans the read, and fills it when the data has come. Whatever makes that data
//! old (a write, a discard) cancels the cell, pending or filled, in its own visit. Filled cells
//! wait until a segment's worth is there. A background task then puts them into the open segment,
//! as long as no writer could come to wait because of that.
//!
//! Not every miss is worth the wear: a sequence of more than `read_cache_threshold` neighbouring
//! blocks is not staged, as in the kernel module; and a block is only staged when it was missed
//! before, so that what is read once is not written to the cache device. For this, a table of
//! hashed block numbers remembers misses for a while.

use super::Inner;
use super::index::hash;
use super::state::State;
use super::throttle::TIGHT;
use super::tunables::Tunables;
use crate::device::IoBuf;
use crate::format::{BLOCK_BYTES, BlockNo, DirtyBits, PLACES, to_usize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Blocks that are put into the log in one visit to the state.
const VISIT: u8 = 16;
/// Entries of the table of misses, four bytes each: one for each place of the log, within these
/// limits.
const FEWEST_MISSES: usize = 1 << 12;
const MOST_MISSES: usize = 1 << 20;

/// What tells the reads apart that have reserved cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// Blocks on their way into the log.
pub(super) struct Staging {
    /// Sequences of more blocks than this are not staged. 0: no read is.
    threshold: u64,
    /// The most cells, pending and filled.
    limit: usize,
    /// Places of the log.
    places: usize,
    pending: BTreeMap<BlockNo, Ticket>,
    /// In the order of their addresses, so that neighbours come to lie side by side on the cache
    /// device.
    filled: BTreeMap<BlockNo, IoBuf>,
    tickets: u64,
    /// How many misses in a row were of neighbouring blocks, and the block that would go on with
    /// them.
    sequence: u64,
    next: BlockNo,
    misses: Option<Misses>,
    /// What the backing device shows is not to be kept.
    suspended: bool,
}

impl Staging {
    /// Nothing is staged until this is configured. The log has so many places.
    pub(super) fn new(places: u64) -> Staging {
        Staging {
            threshold: 0,
            limit: 0,
            places: to_usize(places),
            pending: BTreeMap::new(),
            filled: BTreeMap::new(),
            tickets: 0,
            sequence: 0,
            next: BlockNo(0),
            misses: None,
            suspended: false,
        }
    }

    /// Keeps nothing any more that comes from the backing device.
    pub(super) fn suspend(&mut self) {
        self.suspended = true;
        self.pending.clear();
        self.filled.clear();
    }

    pub(super) fn configure(&mut self, tunables: &Tunables) {
        self.threshold = tunables.read_cache_threshold.into();
        self.limit = to_usize(tunables.nr_read_cache_cells.into());
        if self.threshold == 0 {
            self.pending.clear();
            self.filled.clear();
            self.misses = None;
        } else if self.misses.is_none() {
            self.misses = Some(Misses::new(self.places));
        }
        while self.filled.len() > self.limit {
            self.filled.pop_last();
        }
    }

    /// For a read that is being planned.
    pub(super) fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// A whole block is to be read from the backing device. Returns whether a cell was reserved for
    /// it.
    pub(super) fn missed(&mut self, block: BlockNo, ticket: Ticket) -> bool {
        if self.misses.is_none() {
            return false;
        }
        self.sequence = if block == self.next { self.sequence + 1 } else { 1 };
        self.next = BlockNo(block.0 + 1);
        if self.sequence > self.threshold {
            if self.sequence == self.threshold + 1 {
                // It began before anybody could know.
                (block.0 - self.threshold..block.0).for_each(|before| self.cancel(BlockNo(before)));
            }
            return false;
        }
        // Of two reads of the same block, the first has the cell. Without a free one, the next miss
        // counts again.
        let again = self.misses.as_mut().is_some_and(|misses| misses.again(block));
        let wanted = again && self.has_room() && !self.holds(block);
        if wanted && let Some(misses) = &mut self.misses {
            misses.forget(block);
            self.pending.insert(block, ticket);
        }
        wanted
    }

    /// Whether a block has a cell.
    fn holds(&self, block: BlockNo) -> bool {
        self.pending.contains_key(&block) || self.filled.contains_key(&block)
    }

    fn has_room(&self) -> bool {
        !self.suspended && self.pending.len() + self.filled.len() < self.limit
    }

    /// Fills a cell, if one is free, with the newest version of a block. Returns whether there was
    /// one.
    pub(super) fn keep(&mut self, block: BlockNo, data: IoBuf) -> bool {
        let kept = self.has_room();
        if kept {
            self.filled.insert(block, data);
        }
        kept
    }

    /// What was read of a block for which a cell was reserved. Returns whether it is kept.
    fn fill(&mut self, block: BlockNo, ticket: Ticket, data: IoBuf) -> bool {
        let kept = self.give_up(block, ticket);
        if kept {
            self.filled.insert(block, data);
        }
        kept
    }

    /// Ends a reservation. Returns whether it was still there.
    fn give_up(&mut self, block: BlockNo, ticket: Ticket) -> bool {
        let reserved = self.pending.get(&block) == Some(&ticket);
        if reserved {
            self.pending.remove(&block);
        }
        reserved
    }

    /// What is, or will be, in the cell of a block is old.
    pub(super) fn cancel(&mut self, block: BlockNo) {
        self.pending.remove(&block);
        self.filled.remove(&block);
    }

    /// Whether it is time to put filled cells into the log: there is a segment's worth, or there
    /// are no more cells.
    pub(super) fn is_ripe(&self) -> bool {
        self.filled.len() >= usize::from(PLACES) || (!self.filled.is_empty() && !self.has_room())
    }
}

/// Blocks that were missed of late, as far as the table has room: a later miss takes the entry of
/// an earlier one.
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

    /// Where a block is remembered, and as what.
    fn entry(&mut self, block: BlockNo) -> (&mut u32, u32) {
        let hash = hash(block);
        let nth = to_usize(hash) % self.0.len();
        // 0 stands for none. The bits that choose the entry are not among these.
        let tag = u32::try_from(hash >> 32).unwrap_or_default() | 1;
        (&mut self.0[nth], tag)
    }
}

/// Cells that a read has reserved, to be filled when it is done. What is left of them when this is
/// dropped is given up.
pub(super) struct Reserved {
    inner: Arc<Inner>,
    ticket: Ticket,
    /// Each block, and where it begins in the request, in bytes.
    blocks: Vec<(BlockNo, usize)>,
}

impl Reserved {
    pub(super) fn new(
        inner: &Arc<Inner>,
        ticket: Ticket,
        blocks: Vec<(BlockNo, usize)>,
    ) -> Option<Reserved> {
        (!blocks.is_empty()).then(|| Reserved { inner: inner.clone(), ticket, blocks })
    }

    /// Fills the cells with what was read, but for those that were cancelled meanwhile.
    pub(super) fn fill(mut self, data: &[u8]) {
        let copies: Vec<(BlockNo, IoBuf)> = self
            .blocks
            .drain(..)
            .map(|(block, at)| (block, IoBuf::copy_of(&data[at..at + BLOCK_BYTES])))
            .collect();
        let mut state = self.inner.lock();
        let filled = copies
            .into_iter()
            .filter_map(|(block, data)| state.staging.fill(block, self.ticket, data).then_some(1));
        self.inner.counters.staged_blocks.add(filled.sum());
        let ripe = state.staging.is_ripe();
        drop(state);
        if ripe {
            self.inner.events.staging.notify(usize::MAX);
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        let mut state = self.inner.lock();
        for (block, _) in &self.blocks {
            state.staging.give_up(*block, self.ticket);
        }
    }
}

impl Inner {
    /// The background task that puts filled cells into the log.
    pub(super) async fn stager(self: Arc<Self>) {
        let next = |state: &mut State| match state.stopping || state.failure.is_some() {
            true => Some(false),
            false => (state.staging.is_ripe() && state.may_stage()).then_some(true),
        };
        while self.wait(&self.events.staging, next).await {
            // Several short visits, so that requests come in between.
            for _ in 0..PLACES.div_ceil(VISIT) {
                let staged = self.noticing(self.lock(), State::stage_some);
                self.counters.injected_blocks.add(staged);
            }
        }
        self.task_ended();
    }
}

impl State {
    /// Whether clean blocks may be put into the log: it is nowhere near full, so that no writer
    /// comes to wait for a slot that they take, and the appender keeps up.
    fn may_stage(&self) -> bool {
        let has_room = self.free_slots() > 1 + self.geometry.lap() / TIGHT;
        has_room && self.may_seal() && self.failure.is_none() && !self.closing
    }

    /// Puts some filled cells into the log. Returns how many.
    fn stage_some(&mut self) -> u64 {
        let mut staged = 0;
        while staged < u64::from(VISIT)
            && self.may_stage()
            && let Some((block, data)) = self.staging.filled.pop_first()
        {
            match self.take_place(block, DirtyBits::CLEAN) {
                Ok(place) => place.copy_from_slice(&data),
                // There was room for it.
                Err(_) => break,
            }
            staged += 1;
        }
        self.seal_if_full();
        staged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staging(threshold: u32, cells: u32) -> Staging {
        let mut staging = Staging::new(1000);
        staging.configure(&Tunables {
            read_cache_threshold: threshold,
            nr_read_cache_cells: cells,
            ..Tunables::default()
        });
        staging
    }

    /// Blocks for which a read gets cells that missed them once before.
    fn reserved(staging: &mut Staging, blocks: &[u64]) -> Vec<u64> {
        for &block in blocks {
            let first = staging.ticket();
            assert!(!staging.missed(BlockNo(block), first), "read only once");
        }
        staging.sequence = 0;
        let ticket = staging.ticket();
        for &block in blocks {
            staging.missed(BlockNo(block), ticket);
        }
        staging.pending.iter().filter(|(_, of)| **of == ticket).map(|(block, _)| block.0).collect()
    }

    fn data() -> IoBuf {
        IoBuf::zeroed(BLOCK_BYTES)
    }

    #[test]
    fn a_block_is_staged_when_it_is_missed_again_and_no_sequence_that_is_too_long() {
        let mut short = staging(3, 100);
        assert_eq!(reserved(&mut short, &[7, 20, 21, 22, 40]), [7, 20, 21, 22, 40]);
        let mut long = staging(3, 100);
        assert_eq!(
            reserved(&mut long, &[7, 20, 21, 22, 23, 24, 40]),
            [7, 40],
            "its beginning is given up"
        );
        assert!(reserved(&mut staging(0, 100), &[7]).is_empty());
    }

    #[test]
    fn a_cell_that_was_cancelled_is_not_filled_and_not_by_another_read_either() {
        let mut staging = staging(100, 100);
        reserved(&mut staging, &[1, 5]);
        let ticket = Ticket(staging.tickets);
        staging.cancel(BlockNo(5));
        assert!(
            staging.fill(BlockNo(1), ticket, data()) && !staging.fill(BlockNo(5), ticket, data())
        );
        // Read again, twice, with a cell of its own.
        assert_eq!(reserved(&mut staging, &[5]), [5]);
        assert!(!staging.fill(BlockNo(5), ticket, data()));
        assert!(staging.fill(BlockNo(5), Ticket(staging.tickets), data()));
        staging.cancel(BlockNo(5));
        assert!(!staging.holds(BlockNo(5)) && staging.holds(BlockNo(1)));
    }

    #[test]
    fn there_are_no_more_cells_than_were_allowed_and_without_any_left_they_are_ripe() {
        let mut staging = staging(100, 3);
        assert_eq!(reserved(&mut staging, &[1, 3, 5, 7]), [1, 3, 5]);
        let ticket = Ticket(staging.tickets);
        assert!(!staging.is_ripe(), "nothing has come yet");
        staging.fill(BlockNo(3), ticket, data());
        assert!(staging.is_ripe());
        staging.cancel(BlockNo(1));
        assert!(!staging.is_ripe());
        let next = staging.ticket();
        assert!(
            staging.missed(BlockNo(7), next),
            "it found no cell, and was missed twice all the same"
        );
        staging.configure(&Tunables::default());
        assert!(!staging.holds(BlockNo(3)) && staging.misses.is_none(), "switched off");
    }
}
