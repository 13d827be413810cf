//! Slots that must not be overwritten while they are read.

use crate::cache::engine::Engine;
use crate::cache::state::State;
use crate::format::Slot;
use std::sync::Arc;

/// Keeps a slot from being overwritten, until it is dropped.
pub(crate) struct Pinned {
    engine: Arc<Engine>,
    slot: Slot,
}

impl Pinned {
    pub(crate) fn new(engine: &Arc<Engine>, state: &mut State, slot: Slot) -> Pinned {
        state.log.pin(slot);
        Pinned { engine: engine.clone(), slot }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.engine.state.lock().log.unpin(self.slot);
    }
}
