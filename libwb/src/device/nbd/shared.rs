//! The state of a device, who waits for it, and the clock.

use super::operation::Operation;
use super::state::State;
use crate::runtime::Runtime;
use event_listener::Event;
use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::time::Duration;

pub(super) struct Shared {
    state: Mutex<State>,
    pub(super) runtime: Arc<dyn Runtime>,
    /// Something may have become possible: to send, to end, or to let time pass.
    pub(super) news: Event,
}

impl Shared {
    pub(super) fn new(state: State, runtime: Arc<dyn Runtime>) -> Shared {
        Shared { state: Mutex::new(state), runtime, news: Event::new() }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(super) fn now(&self) -> Duration {
        self.runtime.now()
    }

    pub(super) fn tell(&self) {
        self.news.notify(usize::MAX);
    }

    pub(super) fn begin(&self, operation: Operation) {
        self.state().begin(operation);
        self.tell();
    }
}
