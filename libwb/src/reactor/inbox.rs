//! What the reactor's thread shares with the others: the inbox for tasks and operations.

use super::operation::Op;
use super::served::Served;
use super::tasks::Tasks;
use super::timers::Timers;
use async_task::Runnable;
use nix::sys::eventfd::EventFd;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;
use std::time::Instant;

/// What the reactor's thread is to do.
#[derive(Default)]
pub(super) struct Work {
    pub(super) tasks: VecDeque<Runnable>,
    pub(super) ops: Vec<Op>,
    pub(super) served: Vec<Served>,
    /// Operations that only wait were given up.
    pub(super) given_up: bool,
}

impl Work {
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty() && self.ops.is_empty() && self.served.is_empty() && !self.given_up
    }
}

#[derive(Default)]
pub(super) struct Inbox {
    pub(super) work: Work,
    pub(super) timers: Timers,
    pub(super) stop: bool,
    /// The reactor's thread takes nothing any more.
    pub(super) ended: bool,
}

pub(super) struct Shared {
    pub(super) inbox: Mutex<Inbox>,
    pub(super) live: Arc<Tasks>,
    /// True while the reactor sleeps, or is about to sleep, and must be woken.
    pub(super) parked: AtomicBool,
    pub(super) wake: EventFd,
    /// The reactor's thread, once it runs.
    pub(super) thread: OnceLock<ThreadId>,
    /// Reads under way, on any thread.
    pub(super) reads: AtomicUsize,
    pub(super) started: Instant,
}

impl Shared {
    /// Whether this is the reactor's thread.
    pub(super) fn is_own_thread(&self) -> bool {
        self.thread.get() == Some(&std::thread::current().id())
    }

    pub(super) fn post(&self, put: impl FnOnce(&mut Inbox)) {
        let late = {
            let mut inbox = self.inbox.lock();
            put(&mut inbox);
            // If the reactor's thread has ended, they are dropped here.
            if inbox.ended { std::mem::take(&mut inbox.work) } else { Work::default() }
        };
        // Dropping an operation makes it fail. Its waiter may take the lock.
        drop(late);
        // Whoever parks looks at the inbox after that. So it sees this, or this sees that it parks.
        if self.parked.load(Ordering::SeqCst) && self.parked.swap(false, Ordering::SeqCst) {
            // The counter is never read. It overflows after 2^64 wake-ups, which is never.
            let _ = self.wake.write(1);
        }
    }
}
