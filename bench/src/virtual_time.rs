//! A runtime on one thread whose time passes only if nothing is left to do. So a model of a disk
//! takes no real time.

use async_task::Runnable;
use futures_lite::future::poll_once;
use futures_util::future::BoxFuture;
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

#[derive(Default)]
struct State {
    now: Duration,
    tasks: VecDeque<Runnable>,
    /// By time, then in the order of their making.
    timers: BTreeMap<(Duration, u64), Waker>,
    timers_made: u64,
}

/// The runtime. All clones share it.
#[derive(Clone, Default)]
pub(crate) struct VirtualTime(Arc<Mutex<State>>);

impl VirtualTime {
    /// Runs everything until a future ends. `None` if nothing is left that could end it.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        futures_lite::future::block_on(async {
            loop {
                if let Some(output) = poll_once(future.as_mut()).await {
                    return Some(output);
                }
                let mut any = false;
                while let Some(task) = { self.0.lock().tasks.pop_front() } {
                    task.run();
                    any = true;
                }
                if !any {
                    self.pass_time()?.wake();
                }
            }
        })
    }

    fn pass_time(&self) -> Option<Waker> {
        let mut state = self.0.lock();
        let ((time, _), waker) = state.timers.pop_first()?;
        state.now = state.now.max(time);
        Some(waker)
    }
}

impl Runtime for VirtualTime {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let shared = self.0.clone();
        let (runnable, task) =
            async_task::spawn(task, move |runnable| shared.lock().tasks.push_back(runnable));
        task.detach();
        runnable.schedule();
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let shared = self.0.clone();
        let timer = {
            let mut state = shared.lock();
            state.timers_made += 1;
            (state.now + duration, state.timers_made)
        };
        Box::pin(poll_fn(move |context| {
            let mut state = shared.lock();
            if state.now >= timer.0 {
                return Poll::Ready(());
            }
            // One timer, however often it is polled. Otherwise futures that are polled together
            // would add timers each time.
            state.timers.insert(timer, context.waker().clone());
            Poll::Pending
        }))
    }

    fn now(&self) -> Duration {
        self.0.lock().now
    }

    fn wall_clock(&self) -> Duration {
        self.now()
    }
}
