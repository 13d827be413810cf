//! A seeded executor with a virtual clock, on one thread. A seed determines the whole run.

use crate::runtime::Runtime;
use async_task::Runnable;
use fastrand::Rng;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use slab::Slab;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// Steps that one [`Simulation::block_on`] may take before it counts as a livelock.
const MAX_STEPS: u64 = 3_000_000;
/// Virtual time that one [`Simulation::block_on`] may take before its future counts as stuck.
/// Background tasks that wake up now and then hide a deadlock from the simplest test, which is that
/// nothing is left to do.
const MAX_TIME: Duration = Duration::from_secs(4 * 3600);
/// One step in this many lets time pass although a task is ready to run, as a busy machine does.
const TIME_PASSES: u32 = 8;

/// Why [`Simulation::block_on`] gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// [`SimRuntime::halt`] was called, or the point of I/O that was asked for is reached.
    #[error("halted")]
    Halted,
    /// The future is not done, and nothing is left that could wake it.
    #[error("deadlock: no task is ready, and no timer or I/O is pending")]
    Deadlock,
    /// Tasks run forever.
    #[error("livelock: not done after {MAX_STEPS} steps")]
    Livelock,
    /// Only timers and background tasks go on.
    #[error("stuck: not done after {MAX_TIME:?} of virtual time")]
    Stuck,
}

/// What happens when a timer expires.
enum Due {
    Wake(Waker),
    Call(Box<dyn FnOnce() + Send>),
}

struct State {
    rng: Rng,
    now: Duration,
    ready: Vec<Runnable>,
    /// By time, then by creation.
    due: BTreeMap<(Duration, u64), Due>,
    next_due: u64,
    /// A waker of every task that has not ended, to reach it when all are dropped.
    live: Slab<Waker>,
    /// Tasks are being dropped, and new ones end at once.
    dying: bool,
    halted: bool,
    /// Points of I/O until the halt.
    halt_after: Option<u64>,
    trace: u64,
    observer: Option<Observer>,
}

/// Called before anything changes on a device.
type Observer = Arc<dyn Fn() + Send + Sync>;

struct Shared(Mutex<State>);

/// Runs tasks in an order that a seed decides. Dropping it drops every task.
pub struct Simulation {
    runtime: SimRuntime,
}

/// A handle to a [`Simulation`], for tasks and devices.
#[derive(Clone)]
pub struct SimRuntime(Arc<Shared>);

enum Step {
    Main,
    Task(Runnable),
    Due(Due),
    Stop(Stop),
}

struct MainWaker(AtomicBool);

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Simulation {
    /// An executor with nothing to do, at time zero.
    pub fn new(seed: u64) -> Simulation {
        let state = State {
            rng: Rng::with_seed(seed),
            now: Duration::ZERO,
            ready: Vec::new(),
            due: BTreeMap::new(),
            next_due: 0,
            live: Slab::new(),
            dying: false,
            halted: false,
            halt_after: None,
            trace: 0,
            observer: None,
        };
        Simulation { runtime: SimRuntime(Arc::new(Shared(Mutex::new(state)))) }
    }

    /// The handle for tasks and devices.
    pub fn runtime(&self) -> &SimRuntime {
        &self.runtime
    }

    /// Runs everything until `future` is done.
    ///
    /// # Errors
    /// When it is halted, or cannot be done any more.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> Result<T, Stop> {
        let mut future = pin!(future);
        let woken = Arc::new(MainWaker(AtomicBool::new(true)));
        let waker = Waker::from(woken.clone());
        let limit = self.runtime.now() + MAX_TIME;
        for _ in 0..MAX_STEPS {
            match self.step(woken.0.load(Ordering::Relaxed), limit) {
                Step::Main => {
                    woken.0.store(false, Ordering::Relaxed);
                    if let Poll::Ready(value) =
                        future.as_mut().poll(&mut Context::from_waker(&waker))
                    {
                        return Ok(value);
                    }
                }
                Step::Task(runnable) => drop(runnable.run()),
                Step::Due(Due::Wake(waker)) => waker.wake(),
                Step::Due(Due::Call(call)) => call(),
                Step::Stop(stop) => return Err(stop),
            }
        }
        Err(Stop::Livelock)
    }

    fn step(&self, main_ready: bool, limit: Duration) -> Step {
        let mut guard = self.runtime.0.0.lock();
        let state = &mut *guard;
        if state.halted {
            return Step::Stop(Stop::Halted);
        }
        let choices = state.ready.len() + usize::from(main_ready);
        if choices == 0 || state.rng.u32(..TIME_PASSES) == 0 {
            match state.due.pop_first() {
                Some(((at, _), due)) if at <= limit => {
                    state.now = state.now.max(at);
                    return Step::Due(due);
                }
                Some((key, due)) => drop(state.due.insert(key, due)),
                None => {}
            }
        }
        if choices == 0 {
            return Step::Stop(if state.due.is_empty() { Stop::Deadlock } else { Stop::Stuck });
        }
        let choice = state.rng.usize(..choices);
        state.trace(choice as u64);
        if choice == state.ready.len() {
            Step::Main
        } else {
            Step::Task(state.ready.swap_remove(choice))
        }
    }

    /// Drops every task, timer and I/O, like the end of a process, and cancels a halt. Time goes
    /// on.
    pub fn kill_tasks(&self) {
        let shared = &self.runtime.0.0;
        shared.lock().dying = true;
        loop {
            // A dropped task may use the runtime, so no lock is held here.
            let (live, ready, due) = {
                let mut state = shared.lock();
                let live: Vec<Waker> = state.live.drain().collect();
                (live, std::mem::take(&mut state.ready), std::mem::take(&mut state.due))
            };
            if live.is_empty() && ready.is_empty() && due.is_empty() {
                break;
            }
            drop(ready);
            drop(due);
            live.into_iter().for_each(Waker::wake);
        }
        let mut state = shared.lock();
        state.dying = false;
        state.halted = false;
        state.halt_after = None;
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        self.kill_tasks();
    }
}

impl State {
    fn trace(&mut self, event: u64) {
        const FNV_PRIME: u64 = 0x100_0000_01b3;
        self.trace = (self.trace ^ event).wrapping_mul(FNV_PRIME).rotate_left(23);
    }

    fn at(&mut self, time: Duration, due: Due) -> (Duration, u64) {
        let key = (time, self.next_due);
        self.next_due += 1;
        self.due.insert(key, due);
        key
    }
}

impl SimRuntime {
    /// A random number generator that continues the seed's.
    pub fn fork_rng(&self) -> Rng {
        self.0.0.lock().rng.fork()
    }

    /// Makes [`Simulation::block_on`] give up after the step under way.
    pub fn halt(&self) {
        self.0.0.lock().halted = true;
    }

    /// Whether it gives up after the step under way.
    pub fn is_halted(&self) -> bool {
        self.0.0.lock().halted
    }

    /// Halts after this many more submissions and completions of I/O.
    pub fn halt_after_io(&self, points: u64) {
        self.0.0.lock().halt_after = Some(points);
    }

    /// Has a function called before any write begins or ends and before any flush ends: between two
    /// such calls, nothing changes of what a power cut could leave.
    pub fn observe(&self, observer: impl Fn() + Send + Sync + 'static) {
        self.0.0.lock().observer = Some(Arc::new(observer));
    }

    /// Ends [`SimRuntime::observe`].
    pub fn observe_no_more(&self) {
        let observer = self.0.0.lock().observer.take();
        drop(observer);
    }

    pub(super) fn about_to_change(&self) {
        let observer = self.0.0.lock().observer.clone();
        if let Some(observer) = observer {
            observer();
        }
    }

    /// A hash of everything that has happened. Equal seeds give equal hashes.
    pub fn trace(&self) -> u64 {
        self.0.0.lock().trace
    }

    /// Adds an event to the trace.
    pub fn record(&self, event: u64) {
        self.0.0.lock().trace(event);
    }

    /// Counts a submission or a completion of I/O.
    pub(super) fn io_point(&self, what: u64) {
        let mut state = self.0.0.lock();
        state.trace(what);
        if let Some(left) = &mut state.halt_after {
            *left = left.saturating_sub(1);
            if *left == 0 {
                state.halted = true;
            }
        }
    }

    /// Calls a function after a time, unless all tasks are killed before.
    pub(super) fn call_after(&self, delay: Duration, call: impl FnOnce() + Send + 'static) {
        let mut state = self.0.0.lock();
        if state.dying {
            drop(state);
            return drop(call);
        }
        let at = state.now + delay;
        state.at(at, Due::Call(Box::new(call)));
    }
}

impl Runtime for SimRuntime {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let mut state = self.0.0.lock();
        if state.dying {
            drop(state);
            return drop(task);
        }
        let entry = state.live.vacant_entry();
        let end = Ended { runtime: self.clone(), key: entry.key() };
        let queue = Arc::downgrade(&self.0);
        let schedule = move |runnable| match queue.upgrade() {
            Some(shared) => shared.0.lock().ready.push(runnable),
            None => drop(runnable),
        };
        let (runnable, task) = async_task::spawn(
            async move {
                let _end = end;
                task.await;
            },
            schedule,
        );
        entry.insert(runnable.waker());
        task.detach();
        state.ready.push(runnable);
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let deadline = self.now() + duration;
        Box::pin(Sleep { runtime: self.clone(), deadline, key: None })
    }

    fn now(&self) -> Duration {
        self.0.0.lock().now
    }

    fn wall_clock(&self) -> Duration {
        self.now()
    }
}

/// Takes a task off the list of those that have not ended.
struct Ended {
    runtime: SimRuntime,
    key: usize,
}

impl Drop for Ended {
    fn drop(&mut self) {
        // The waker must not be dropped under the lock: it may hold the last reference to the task.
        let waker = {
            let mut state = self.runtime.0.0.lock();
            if state.dying { None } else { state.live.try_remove(self.key) }
        };
        drop(waker);
    }
}

struct Sleep {
    runtime: SimRuntime,
    deadline: Duration,
    key: Option<(Duration, u64)>,
}

impl Sleep {
    fn cancel(&mut self, state: &mut State) -> Option<Due> {
        self.key.take().and_then(|key| state.due.remove(&key))
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let runtime = self.runtime.clone();
        let mut state = runtime.0.0.lock();
        let old = self.cancel(&mut state);
        let done = state.now >= self.deadline;
        if !done {
            self.key = Some(state.at(self.deadline, Due::Wake(context.waker().clone())));
        }
        drop(state);
        drop(old);
        if done { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let runtime = self.runtime.clone();
        let old = self.cancel(&mut runtime.0.0.lock());
        drop(old);
    }
}
