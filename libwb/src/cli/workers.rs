//! Threads for CPU-bound work, such as verifying data.

use async_task::{Runnable, Task};
use parking_lot::Mutex;
use std::io;
use std::sync::{Arc, mpsc};
use std::thread::available_parallelism;

/// One thread per processor. The threads end when this value and all its tasks are gone.
pub(super) struct Workers {
    tasks: mpsc::Sender<Runnable>,
}

impl Workers {
    pub(super) fn start() -> io::Result<Workers> {
        let (tasks, queue) = mpsc::channel::<Runnable>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..available_parallelism().map_or(1, Into::into) {
            let queue = queue.clone();
            std::thread::Builder::new().name("wb-worker".into()).spawn(move || {
                while let Some(task) = next(&queue) {
                    task.run();
                }
            })?;
        }
        Ok(Workers { tasks })
    }

    /// Runs a future on these threads. Dropping the task cancels it.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let tasks = self.tasks.clone();
        let (runnable, task) = async_task::spawn(work, move |runnable| {
            // The threads live as long as there is a sender.
            let _ = tasks.send(runnable);
        });
        runnable.schedule();
        task
    }
}

/// Waits for a task; the lock is held meanwhile, but not while it runs.
fn next(queue: &Mutex<mpsc::Receiver<Runnable>>) -> Option<Runnable> {
    queue.lock().recv().ok()
}
