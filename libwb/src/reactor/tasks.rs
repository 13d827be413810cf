//! Tasks, and the list of those that have not ended: the end of the reactor drops them all. A task
//! that waits for something other than I/O would otherwise keep what it owns for ever, such as the
//! lock of a device.

use async_task::Runnable;
use futures_util::FutureExt;
use parking_lot::Mutex;
use slab::Slab;
use std::future::Future;
use std::sync::Arc;
use std::task::Waker;

/// A waker of each task that has not ended. `None` once the reactor takes no more.
pub(super) struct Tasks(Mutex<Option<Slab<Waker>>>);

impl Default for Tasks {
    fn default() -> Tasks {
        Tasks(Mutex::new(Some(Slab::new())))
    }
}

impl Tasks {
    pub(super) fn have_ended(&self) -> bool {
        self.0.lock().is_none()
    }

    /// Takes no more, and wakes all. Each is then scheduled, so that it can be dropped.
    pub(super) fn end(&self) {
        let live = self.0.lock().take();
        live.into_iter().flatten().for_each(|(_, waker)| waker.wake());
    }

    /// Makes a task of a future. After the end, drops it instead.
    pub(super) fn task(
        self: &Arc<Self>,
        future: impl Future<Output = ()> + Send + 'static,
        schedule: impl Fn(Runnable) + Send + Sync + 'static,
    ) -> Option<Runnable> {
        let mut live = self.0.lock();
        let entry = live.as_mut()?.vacant_entry();
        let ended = Ended { tasks: self.clone(), key: entry.key() };
        let (runnable, task) = async_task::spawn(future.map(|()| drop(ended)), schedule);
        task.detach();
        entry.insert(runnable.waker());
        Some(runnable)
    }
}

/// Takes a task off the list.
struct Ended {
    tasks: Arc<Tasks>,
    key: usize,
}

impl Drop for Ended {
    fn drop(&mut self) {
        // Not dropped under the lock: it may be the last that is left of the task.
        let waker = self.tasks.0.lock().as_mut().and_then(|live| live.try_remove(self.key));
        drop(waker);
    }
}
