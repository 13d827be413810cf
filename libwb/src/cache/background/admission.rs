//! Blocks that are admitted to the cache for reads, into the log.

use crate::cache::engine::Engine;
use crate::cache::state::State;
use crate::cache::state::shared::{VISIT, Waiter};
use crate::format::PLACES;
use std::sync::Arc;

impl Engine {
    /// The background task that puts waiting blocks into the log as clean entries.
    pub(crate) async fn admitter(self: Arc<Self>) {
        let next = |state: &mut State| match state.lifecycle.is_over() {
            true => Some(false),
            false => (state.admission.is_ripe() && state.may_admit()).then_some(true),
        };
        while self.state.wait(Waiter::Admission, next).await {
            // Several short visits, so that requests come in between.
            for _ in 0..PLACES.div_ceil(VISIT) {
                let admitted = self.state.lock().admit_some(VISIT.into());
                self.counters.injected_blocks.add(admitted);
            }
        }
        self.task_ended();
    }
}
