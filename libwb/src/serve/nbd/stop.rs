//! How sessions are told to end.

use event_listener::Event;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Tells sessions to end. Cloning it gives another handle of the same.
#[derive(Clone, Default)]
pub struct Stop(Arc<(AtomicBool, Event)>);

impl Stop {
    /// Tells all sessions to take no more requests, to answer those that were taken, and to end.
    pub fn stop(&self) {
        self.0.0.store(true, Ordering::SeqCst);
        self.0.1.notify(usize::MAX);
    }

    /// Completes once [`Stop::stop`] was called.
    pub async fn stopped(&self) {
        while !self.0.0.load(Ordering::SeqCst) {
            let news = self.0.1.listen();
            if !self.0.0.load(Ordering::SeqCst) {
                news.await;
            }
        }
    }
}
