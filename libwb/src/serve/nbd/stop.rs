//! How sessions are told to end.

use event_listener::Event;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Tells sessions to end. Cloning it gives another handle of the same.
#[derive(Clone, Default)]
pub struct Stop(Arc<State>);

#[derive(Default)]
struct State {
    is_stopped: AtomicBool,
    is_held: AtomicBool,
    stopped: Event,
}

impl Stop {
    /// Tells all sessions to take no more requests, to answer those that were taken, and to end.
    pub fn stop(&self) {
        self.0.is_stopped.store(true, Ordering::SeqCst);
        self.0.stopped.notify(usize::MAX);
    }

    /// Tells all sessions to take and answer no more requests. They never end: their connections
    /// break with the process.
    pub fn hold(&self) {
        self.0.is_held.store(true, Ordering::SeqCst);
        self.stop();
    }

    /// Completes once [`Stop::stop`] or [`Stop::hold`] was called.
    pub async fn stopped(&self) {
        while !self.0.is_stopped.load(Ordering::SeqCst) {
            let news = self.0.stopped.listen();
            if !self.0.is_stopped.load(Ordering::SeqCst) {
                news.await;
            }
        }
    }

    pub(super) fn is_held(&self) -> bool {
        self.0.is_held.load(Ordering::SeqCst)
    }
}
