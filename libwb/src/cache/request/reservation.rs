//! What a read has reserved for admission.

use crate::cache::engine::Engine;
use crate::cache::state::State;
use crate::cache::state::read_admission::{Sequence, Ticket};
use crate::cache::state::shared::VISIT;
use crate::device::IoBuf;
use crate::format::{BLOCK_BYTES, BlockNo};
use std::sync::Arc;

/// Blocks whose admission a read has reserved. Dropping this cancels the remaining reservations.
pub(super) struct Reservation {
    engine: Arc<Engine>,
    /// None as long as nothing is missing.
    read: Option<(Ticket, Sequence)>,
    /// Each block, and where it begins in the request, in bytes.
    blocks: Vec<(BlockNo, usize)>,
}

impl Reservation {
    pub(super) fn new(engine: &Arc<Engine>) -> Reservation {
        Reservation { engine: engine.clone(), read: None, blocks: Vec::new() }
    }

    /// Reserves the admission of a block that is missing, if it is worth it. It begins at `at` in
    /// the request, in bytes.
    pub(super) fn reserve(&mut self, state: &mut State, block: BlockNo, at: usize) {
        let (ticket, sequence) = self.read.get_or_insert_with(|| state.admission.begin_read());
        if state.admission.missed(block, *ticket, sequence) {
            self.blocks.push((block, at));
        }
    }

    /// Hands over what was read, except for what was cancelled meanwhile. Each block has a
    /// reservation of its own, so it does not matter what comes between two visits to the state.
    pub(super) async fn fill(mut self, data: &[u8]) {
        let Some((ticket, _)) = self.read else { return };
        while !self.blocks.is_empty() {
            let rest = self.blocks.len().saturating_sub(VISIT.into());
            let copies: Vec<(BlockNo, IoBuf)> = self.blocks[rest..]
                .iter()
                .map(|&(block, at)| (block, IoBuf::copy_of(&data[at..at + BLOCK_BYTES])))
                .collect();
            self.blocks.truncate(rest);
            {
                let mut visit = self.engine.state.lock();
                let filled = copies.into_iter().filter_map(|(block, data)| {
                    visit.admission.fill(block, ticket, data).then_some(1)
                });
                self.engine.counters.staged_blocks.add(filled.sum());
                visit.give_way();
            }
            if rest > 0 {
                self.engine.let_others().await;
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some((ticket, _)) = self.read else { return };
        for blocks in self.blocks.chunks(VISIT.into()) {
            let mut visit = self.engine.state.lock();
            for (block, _) in blocks {
                visit.admission.give_up(*block, ticket);
            }
            visit.give_way();
        }
    }
}
