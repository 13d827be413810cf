//! The one lock around the state, and who is woken when it changes.
//!
//! Whoever changes the state need not know who waits for that. A [`Visit`] compares the state's
//! [`Landmarks`] when it ends with those when it began. [`Landmarks::wakes`] is the one table of
//! what wakes whom.

use super::State;
use super::lifecycle::LifecycleMark;
use super::segment_log;
use super::writeback_state;
use crate::runtime::Runtime;
use event_listener::{Event, EventListener};
use parking_lot::{Mutex, MutexGuard};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// The most blocks that one visit deals with. What has more of them makes several visits, and lets
/// others come in between.
pub(crate) const VISIT: u8 = 16;

/// Who can wait for a change of the state.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiter {
    Request,
    Appender,
    Flusher,
    Writeback,
    Admission,
}

const EVERYBODY: &[Waiter] =
    &[Waiter::Request, Waiter::Appender, Waiter::Flusher, Waiter::Writeback, Waiter::Admission];

/// The state, its lock, and those who wait for changes.
pub(crate) struct SharedState {
    state: Mutex<State>,
    events: [Event; EVERYBODY.len()],
    runtime: Arc<dyn Runtime>,
}

/// What of the state others wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Landmarks {
    log: segment_log::Landmarks,
    /// Range locks that ended.
    unlocked: u64,
    writeback: writeback_state::Happened,
    /// How often read admission had enough blocks for the log.
    ripened: u64,
    lifecycle: LifecycleMark,
}

impl Landmarks {
    #[inline]
    fn of(state: &State) -> Landmarks {
        Landmarks {
            log: state.log.landmarks(),
            unlocked: state.locks.released(),
            writeback: state.writeback.happened(),
            ripened: state.admission.ripened(),
            lifecycle: state.lifecycle.mark(),
        }
    }

    /// Which changes since `before` wake whom.
    fn wakes(&self, before: &Landmarks) -> [(bool, &'static [Waiter]); 12] {
        use Waiter::{Admission, Appender, Flusher, Request, Writeback};
        let (log, old) = (&self.log, &before.log);
        let (writeback, old_writeback) = (&self.writeback, &before.writeback);
        [
            // A segment was opened: a slot is taken.
            (log.newest != old.newest, &[Writeback]),
            // A segment was sealed.
            (log.last_sealed != old.last_sealed, &[Appender]),
            // A commit or a segment reached the device: there is room for another sealed one.
            (log.appended != old.appended, &[Request, Flusher, Writeback, Admission]),
            (log.durable_to != old.durable_to, EVERYBODY),
            // Slots came free.
            (log.written_back != old.written_back, &[Request, Admission]),
            // A request wants durability: perhaps a commit, then a flush.
            (log.wanted != old.wanted, &[Appender, Flusher]),
            // A slot may be overwritten.
            (log.unpinned != old.unpinned, &[Appender]),
            (self.unlocked != before.unlocked, &[Request]),
            // A drain or a writer waits, or write-back is resumed.
            (writeback.asked != old_writeback.asked, &[Writeback]),
            // A batch ended, well or not.
            (writeback.ended != old_writeback.ended, &[Request]),
            (self.ripened != before.ripened, &[Admission]),
            // A failure, the beginning of the end, or the end of a task.
            (self.lifecycle != before.lifecycle, EVERYBODY),
        ]
    }
}

impl SharedState {
    pub(crate) fn new(state: State, runtime: Arc<dyn Runtime>) -> SharedState {
        SharedState { state: Mutex::new(state), events: Default::default(), runtime }
    }

    #[inline]
    pub(crate) fn lock(&self) -> Visit<'_> {
        let state = self.state.lock();
        Visit { before: Landmarks::of(&state), state: Some(state), is_fair: false, shared: self }
    }

    fn event(&self, waiter: Waiter) -> &Event {
        &self.events[waiter as usize]
    }

    /// Is notified when what this one waits for may have changed.
    pub(crate) fn listen(&self, waiter: Waiter) -> EventListener {
        self.event(waiter).listen()
    }

    /// Wakes one kind of waiter directly. Needed only if the change is not part of the state.
    pub(crate) fn wake(&self, waiter: Waiter) {
        self.event(waiter).notify(usize::MAX);
    }

    /// Waits until the state gives an answer.
    pub(crate) async fn wait<T>(
        &self,
        waiter: Waiter,
        mut answer: impl FnMut(&mut State) -> Option<T>,
    ) -> T {
        loop {
            if let Some(answer) = answer(&mut self.lock()) {
                return answer;
            }
            let listener = self.listen(waiter);
            if let Some(answer) = answer(&mut self.lock()) {
                return answer;
            }
            listener.await;
        }
    }
}

/// A visit to the state, under the lock. Its end wakes those who wait for what it changed.
pub(crate) struct Visit<'a> {
    before: Landmarks,
    /// There until the drop.
    state: Option<MutexGuard<'a, State>>,
    is_fair: bool,
    shared: &'a SharedState,
}

impl Visit<'_> {
    /// Ends the visit, and gives the lock to the thread that has waited for it longest, if one
    /// does. The next visit then comes after that one's.
    pub(crate) fn give_way(mut self) {
        self.is_fair = true;
    }
}

impl Deref for Visit<'_> {
    type Target = State;

    #[inline]
    fn deref(&self) -> &State {
        self.state.as_ref().expect("a visit has the lock")
    }
}

impl DerefMut for Visit<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut State {
        self.state.as_mut().expect("a visit has the lock")
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let Some(mut state) = self.state.take() else { return };
        let after = Landmarks::of(&state);
        if after.log.newest != self.before.log.newest {
            let now = self.shared.runtime.wall_clock();
            state.log.note_begun(self.before.log.newest, now);
        }
        // Those who are woken need the lock.
        match self.is_fair {
            true => MutexGuard::unlock_fair(state),
            false => drop(state),
        }
        if after == self.before {
            return;
        }
        let wakes = after.wakes(&self.before);
        let woken =
            wakes.iter().filter(|(happened, _)| *happened).flat_map(|(_, waiters)| *waiters);
        let mut done = [false; EVERYBODY.len()];
        for &waiter in woken {
            if !std::mem::replace(&mut done[waiter as usize], true) {
                self.shared.wake(waiter);
            }
        }
    }
}
