//! The runtime of the programs: one thread that owns an io_uring, serves the requests
//! of a front end, and runs the tasks.
//!
//! Any thread may start a task and poll it once itself; the reactor's thread runs the rest. Other
//! threads pass I/O to that thread in batches. So the ring has one user and needs no lock.

mod inbox;
mod operation;
mod queue;
#[cfg_attr(
    not(any(feature = "serve-loop", feature = "socket")),
    allow(dead_code, reason = "for FUSE and sockets alone")
)]
mod readiness;
mod ring;
#[cfg_attr(not(feature = "serve-ublk"), allow(dead_code, reason = "for ublk alone"))]
mod served;
mod sleep;
#[cfg(feature = "socket")]
mod socket;
mod spin;
mod tasks;
#[cfg(test)]
mod tests;
mod timers;

pub(crate) use operation::{Addresses, OpKind, OpResult, Target};
#[cfg(feature = "serve-loop")]
pub(crate) use readiness::Readiness;
#[cfg(feature = "serve-ublk")]
pub(crate) use served::{Command, Server};
#[cfg(feature = "socket")]
pub use socket::{Address, Listener, Socket, resolve};

use crate::pending::InFlight;
use crate::runtime::Runtime;
use crate::runtime::thread;
use crate::sys::keep_freed_memory;
use async_task::Runnable;
use futures_channel::oneshot;
use futures_util::future::BoxFuture;
use inbox::Shared;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use operation::{Op, class};
use parking_lot::Mutex;
use ring::Ring;
#[cfg(feature = "serve-ublk")]
use served::Served;
use sleep::Sleep;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Starts tasks and I/O on a reactor. Cloning is cheap. Once the reactor has ended, I/O fails, and
/// tasks are dropped.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    fn task(&self, future: impl Future<Output = ()> + Send + 'static) -> Option<Runnable> {
        let shared = self.0.clone();
        let schedule = move |runnable| shared.post(|inbox| inbox.work.tasks.push_back(runnable));
        self.0.live.task(future, schedule)
    }

    /// Polls a future once on this thread. If it is not ready, the reactor's thread continues it.
    pub fn run_now(&self, future: impl Future<Output = ()> + Send + 'static) {
        let Some(task) = self.task(future) else { return };
        let waker = task.waker();
        task.run();
        if self.0.live.have_ended() {
            // It may have missed the end, and must be dropped.
            waker.wake();
        }
    }

    /// Runs a future on the reactor and waits for its output. While it waits, it calls `meanwhile`
    /// once per `every`.
    ///
    /// `None` if the reactor ends first, or `meanwhile` returns false. In the second case the
    /// future keeps running.
    pub fn run_watched<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
        every: Duration,
        mut meanwhile: impl FnMut() -> bool,
    ) -> Option<T> {
        let (done, result) = mpsc::channel();
        self.run_now(async move {
            let _ = done.send(work.await);
        });
        loop {
            match result.recv_timeout(every) {
                Ok(output) => return Some(output),
                Err(mpsc::RecvTimeoutError::Timeout) if meanwhile() => {}
                Err(_) => return None,
            }
        }
    }

    pub(crate) async fn submit(
        &self,
        target: Target,
        in_flight: Option<InFlight>,
        kind: OpKind,
    ) -> OpResult {
        let result = self.begin(target, in_flight, kind);
        result.await.unwrap_or((Err(Errno::ECANCELED), None))
    }

    fn begin(
        &self,
        target: Target,
        in_flight: Option<InFlight>,
        kind: OpKind,
    ) -> oneshot::Receiver<OpResult> {
        let (done, result) = oneshot::channel();
        let class = class(&target, &kind);
        let op = Op { target, in_flight, kind, class, progress: 0, done };
        self.0.post(|inbox| inbox.work.ops.push(op));
        result
    }

    /// Gives the driver of a served device commands. The server gets their completions. If they fit
    /// the ring, the kernel takes all of them in one call: whenever the process is killed, it has
    /// got all or none.
    #[cfg(feature = "serve-ublk")]
    pub(crate) fn serve(
        &self,
        device: &Target,
        server: &Arc<impl Server + 'static>,
        commands: impl IntoIterator<Item = Command>,
    ) {
        let served = commands.into_iter().map(|command| {
            let (device, server) = (device.clone(), server.clone());
            Served { device, server, command: Some(command) }
        });
        self.0.post(|inbox| inbox.work.served.extend(served));
    }
}

/// A read under way.
pub(crate) struct Reading(Arc<Shared>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.reads.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Handle {
    /// Counts a read. Keep the value while the read is under way.
    pub(crate) fn reading(&self) -> Reading {
        self.0.reads.fetch_add(1, Ordering::Relaxed);
        Reading(self.0.clone())
    }

    /// As [`Handle::reading`], for a read during which this thread would block. `None` if other
    /// reads are under way, or if this is the reactor's thread, which must not block.
    pub(crate) fn reading_alone(&self) -> Option<Reading> {
        if self.0.is_own_thread() {
            return None;
        }
        self.0.reads.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).ok()?;
        Some(Reading(self.0.clone()))
    }
}

impl Runtime for Handle {
    fn spawn(&self, future: BoxFuture<'static, ()>) {
        if let Some(task) = self.task(future) {
            task.schedule();
        }
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(Sleep::new(self.0.clone(), duration))
    }

    fn is_thread_shared(&self) -> bool {
        self.0.is_own_thread()
    }

    fn now(&self) -> Duration {
        self.0.started.elapsed()
    }

    fn wall_clock(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// The reactor's thread. Dropping this waits for I/O under way, drops all tasks and joins the
/// thread.
pub struct Reactor {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Reactor {
    /// Starts the thread and its io_uring.
    ///
    /// # Errors
    /// When the kernel has no io_uring or forbids its use.
    pub fn start() -> io::Result<Reactor> {
        keep_freed_memory();
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            live: Arc::default(),
            parked: AtomicBool::new(false),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            thread: OnceLock::new(),
            reads: AtomicUsize::new(0),
            started: Instant::now(),
        });
        let (made, result) = mpsc::sync_channel(1);
        let of_thread = shared.clone();
        // Only the thread that makes a ring may use it.
        let run = move || match Ring::new(of_thread) {
            Err(error) => drop(made.send(Err(error))),
            Ok(ring) => {
                let _ = made.send(Ok(()));
                ring.run();
            }
        };
        let thread = thread("wb-reactor").spawn(run)?;
        result
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the reactor's thread has ended")))?;
        Ok(Reactor { handle: Handle(shared), thread: Some(thread) })
    }

    /// A handle to start tasks and I/O with.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Runs a future to its end on this thread, while the reactor serves its I/O.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        futures_lite::future::block_on(future)
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.handle.0.post(|inbox| inbox.stop = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
