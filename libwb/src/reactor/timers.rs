//! Sleeps. The reactor's thread waits no longer than until the first of them ends. So a sleep is no
//! operation of the ring, and nothing is left of it when it is dropped.

use std::collections::BTreeMap;
use std::task::Waker;
use std::time::Instant;

/// A sleep that has not ended: when it does, and a number of its own.
pub(super) type Timer = (Instant, u64);

/// Who is to be woken when.
#[derive(Default)]
pub(super) struct Timers {
    due: BTreeMap<Timer, Waker>,
    /// How many there have been.
    made: u64,
}

impl Timers {
    pub(super) fn add(&mut self, at: Instant, waker: Waker) -> Timer {
        self.made += 1;
        self.due.insert((at, self.made), waker);
        (at, self.made)
    }

    /// The waker must not be dropped under the lock of these timers: with it, a task may be
    /// dropped.
    #[must_use]
    pub(super) fn remove(&mut self, timer: Timer) -> Option<Waker> {
        self.due.remove(&timer)
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    /// Takes those that are due.
    #[must_use]
    pub(super) fn take_due(&mut self) -> BTreeMap<Timer, Waker> {
        let now = match self.next() {
            None => return BTreeMap::new(),
            Some(_) => Instant::now(),
        };
        let later = self.due.split_off(&(now, u64::MAX));
        std::mem::replace(&mut self.due, later)
    }

    #[must_use]
    pub(super) fn take_all(&mut self) -> BTreeMap<Timer, Waker> {
        std::mem::take(&mut self.due)
    }
}
