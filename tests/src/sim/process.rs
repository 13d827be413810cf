//! A process that may die alone, without the rest of the simulated machine.

use futures_util::future::{AbortHandle, BoxFuture, abortable};
use libwb::device::sim::SimRuntime;
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

/// What runs the tasks of a process, and drops them when it dies.
pub struct Process {
    runtime: SimRuntime,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Process {
    /// A process that lives.
    pub fn on(runtime: &SimRuntime) -> Arc<Process> {
        Arc::new(Process { runtime: runtime.clone(), tasks: Mutex::default() })
    }

    /// Drops all its tasks.
    pub fn die(&self) {
        self.tasks.lock().iter().for_each(AbortHandle::abort);
    }
}

impl Runtime for Process {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let (task, abort) = abortable(task);
        self.tasks.lock().push(abort);
        self.runtime.spawn(Box::pin(async move {
            let _ = task.await;
        }));
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.runtime.sleep(duration)
    }

    fn now(&self) -> Duration {
        self.runtime.now()
    }

    fn wall_clock(&self) -> Duration {
        self.runtime.wall_clock()
    }
}
