//! What a read has reserved for admission.

use crate::cache::engine::Engine;
use crate::cache::state::read_admission::Ticket;
use crate::device::IoBuf;
use crate::format::{BLOCK_BYTES, BlockNo};
use std::sync::Arc;

/// Blocks whose admission a read has reserved. Dropping this cancels the remaining reservations.
pub(super) struct Reservation {
    engine: Arc<Engine>,
    ticket: Ticket,
    /// Each block, and where it begins in the request, in bytes.
    blocks: Vec<(BlockNo, usize)>,
}

impl Reservation {
    pub(super) fn new(
        engine: &Arc<Engine>,
        ticket: Ticket,
        blocks: Vec<(BlockNo, usize)>,
    ) -> Option<Reservation> {
        (!blocks.is_empty()).then(|| Reservation { engine: engine.clone(), ticket, blocks })
    }

    /// Hands over what was read, except for what was cancelled meanwhile.
    pub(super) fn fill(mut self, data: &[u8]) {
        let copies: Vec<(BlockNo, IoBuf)> = self
            .blocks
            .drain(..)
            .map(|(block, at)| (block, IoBuf::copy_of(&data[at..at + BLOCK_BYTES])))
            .collect();
        let mut state = self.engine.state.lock();
        let filled = copies.into_iter().filter_map(|(block, data)| {
            state.admission.fill(block, self.ticket, data).then_some(1)
        });
        self.engine.counters.staged_blocks.add(filled.sum());
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        let mut state = self.engine.state.lock();
        for (block, _) in &self.blocks {
            state.admission.give_up(*block, self.ticket);
        }
    }
}
