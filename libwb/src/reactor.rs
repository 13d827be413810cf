//! The runtime of the programs: one thread that owns an io_uring and runs the background tasks.
//!
//! Any thread may start a task and poll it the first time itself; what is left of it then runs on
//! the reactor's thread. I/O is handed to that thread in batches, so that the ring has one user and
//! needs no lock.
#![allow(unsafe_code)] // io_uring takes addresses; each use below says why its memory stays valid

use crate::buf::{IoBuf, SharedBuf};
use crate::format::to_u64;
use crate::pending::InFlight;
use crate::runtime::Runtime;
use crate::sys::keep_freed_memory;
use async_task::Runnable;
use futures_channel::oneshot;
use futures_util::future::BoxFuture;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};
use parking_lot::Mutex;
use slab::Slab;
use std::collections::VecDeque;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Entries of the submission queue; the completion queue has twice as many.
const RING_ENTRIES: u32 = 256;
/// Operations handed to the kernel at a time, so that the completion queue cannot overflow. The
/// rest wait.
const MAX_IN_FLIGHT: usize = 2 * RING_ENTRIES as usize - 1;
/// The `user_data` of the poll that wakes the reactor up.
const WAKE: u64 = u64::MAX;

/// What an operation is to do. It owns all memory that the kernel touches.
pub(crate) enum OpKind {
    /// Fill the buffer.
    Read { offset: u64, buf: IoBuf },
    /// Write the data.
    Write { offset: u64, data: SharedBuf },
    /// Write several pieces of data, one after the other, as one operation.
    WriteParts { offset: u64, parts: Vec<SharedBuf>, addresses: Addresses },
    /// fdatasync.
    Sync,
    /// fallocate.
    Zero { mode: i32, offset: u64, length: u64 },
    /// Nothing but time.
    Sleep(Box<types::Timespec>),
}

/// Where the rest of the parts of a write lies, as the kernel wants to be told.
#[derive(Default)]
pub(crate) struct Addresses(Vec<libc::iovec>);

// SAFETY: they point into buffers that the operation owns beside them, and are read by the kernel
// alone.
unsafe impl Send for Addresses {}

impl Addresses {
    /// Takes down all but the first bytes of some parts.
    fn note(&mut self, parts: &[SharedBuf], mut skip: usize) {
        self.0.clear();
        for part in parts {
            let rest = &part[skip.min(part.len())..];
            skip -= part.len() - rest.len();
            if !rest.is_empty() {
                self.0.push(libc::iovec {
                    iov_base: rest.as_ptr().cast_mut().cast(),
                    iov_len: rest.len(),
                });
            }
        }
    }
}

/// How an operation ended, with the buffer of a read.
pub(crate) type OpResult = (Result<(), Errno>, Option<IoBuf>);

/// What an operation is done to.
#[derive(Clone)]
pub(crate) struct Target {
    file: Arc<File>,
    /// The kernel may wait for the device while it takes the operation, as on FUSE. Then a thread
    /// of its own has to do that, or one device that hangs would stop the reactor, and with it the
    /// other.
    may_block: bool,
}

impl Target {
    pub(crate) fn new(file: File) -> Target {
        let may_block =
            fstatfs(&file).is_ok_and(|found| found.filesystem_type() == FUSE_SUPER_MAGIC);
        Target { file: Arc::new(file), may_block }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

struct Op {
    /// Keeps the descriptor open until the kernel is done with it.
    target: Option<Target>,
    /// Counts it until the kernel is done with it, even if nobody waits any more.
    in_flight: Option<InFlight>,
    kind: OpKind,
    /// Bytes that earlier, short completions have moved.
    progress: usize,
    done: oneshot::Sender<OpResult>,
}

#[derive(Default)]
struct Inbox {
    tasks: VecDeque<Runnable>,
    ops: Vec<Op>,
    stop: bool,
    /// The reactor's thread is past taking anything.
    ended: bool,
}

struct Shared {
    inbox: Mutex<Inbox>,
    /// True while the reactor sleeps, or is about to, and wants to be woken.
    parked: AtomicBool,
    wake: EventFd,
    /// The reactor's thread, once it runs.
    thread: OnceLock<ThreadId>,
    /// Reads that are under way, on whatever thread.
    reads: AtomicUsize,
    started: Instant,
}

impl Shared {
    fn post(&self, put: impl FnOnce(&mut Inbox)) {
        let (tasks, ops) = {
            let mut inbox = self.inbox.lock();
            put(&mut inbox);
            match inbox.ended {
                // Nobody takes them any more.
                true => (std::mem::take(&mut inbox.tasks), std::mem::take(&mut inbox.ops)),
                false => Default::default(),
            }
        };
        // Dropped, operations fail; and not under the lock, which they may want.
        drop(ops);
        if !tasks.is_empty() {
            // Whoever wakes a task may hold a lock that the task takes as it is dropped. So another
            // thread drops it.
            let _ =
                std::thread::Builder::new().name("wb-late-tasks".into()).spawn(move || drop(tasks));
        }
        if self.parked.swap(false, Ordering::SeqCst) {
            // Nobody reads the counter. At a million a second it overflows in half a million years.
            let _ = self.wake.write(1);
        }
    }
}

/// Starts tasks and I/O on a reactor. Cheap to clone; outlives the reactor harmlessly (I/O then
/// fails).
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Polls a future once on this thread; if it is not done then, the reactor's thread takes it
    /// over.
    pub fn run_now(&self, future: impl Future<Output = ()> + Send + 'static) {
        let shared = self.0.clone();
        let (runnable, task) = async_task::spawn(future, move |runnable| {
            shared.post(|inbox| inbox.tasks.push_back(runnable))
        });
        task.detach();
        runnable.run();
    }

    /// Runs a future on the reactor, waits for its end, and calls `meanwhile` every so often.
    /// `None` when the reactor ends first, or when `meanwhile` says that it is not to be waited for
    /// any more: then it goes on.
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
        target: Option<Target>,
        in_flight: Option<InFlight>,
        kind: OpKind,
    ) -> OpResult {
        let (done, result) = oneshot::channel();
        self.0.post(|inbox| inbox.ops.push(Op { target, in_flight, kind, progress: 0, done }));
        result.await.unwrap_or((Err(Errno::ECANCELED), None))
    }
}

/// A read that is under way.
pub(crate) struct Reading(Arc<Shared>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.reads.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Handle {
    /// To be kept while a read is under way.
    pub(crate) fn reading(&self) -> Reading {
        self.0.reads.fetch_add(1, Ordering::Relaxed);
        Reading(self.0.clone())
    }

    /// As [`Handle::reading`], for a read that this thread would wait for itself: `None` when
    /// others are under way, or this is the reactor's thread, which never waits.
    pub(crate) fn reading_alone(&self) -> Option<Reading> {
        if self.0.thread.get() == Some(&std::thread::current().id()) {
            return None;
        }
        self.0.reads.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).ok()?;
        Some(Reading(self.0.clone()))
    }
}

impl Runtime for Handle {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let shared = self.0.clone();
        let (runnable, task) = async_task::spawn(task, move |runnable| {
            shared.post(|inbox| inbox.tasks.push_back(runnable))
        });
        task.detach();
        runnable.schedule();
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let handle = self.clone();
        let time = Box::new(types::Timespec::from(duration));
        Box::pin(async move {
            let _ = handle.submit(None, None, OpKind::Sleep(time)).await;
        })
    }

    fn now(&self) -> Duration {
        self.0.started.elapsed()
    }

    fn wall_clock(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// The reactor's thread. Dropping it lets I/O under way end, drops all tasks, and joins the thread.
pub struct Reactor {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Reactor {
    /// Starts the thread and its io_uring.
    ///
    /// # Errors
    /// When the kernel offers no io_uring or forbids it.
    pub fn start() -> io::Result<Reactor> {
        keep_freed_memory();
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            parked: AtomicBool::new(false),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            thread: OnceLock::new(),
            reads: AtomicUsize::new(0),
            started: Instant::now(),
        });
        let (made, result) = mpsc::sync_channel(1);
        let of_thread = shared.clone();
        // The ring belongs to the thread that makes it.
        let run = move || match build_ring() {
            Err(error) => drop(made.send(Err(error))),
            Ok(ring) => {
                let _ = made.send(Ok(()));
                let (ops, backlog) = (Slab::new(), VecDeque::new());
                Ring { shared: of_thread, ring, ops, backlog, armed: false }.run();
            }
        };
        let thread = std::thread::Builder::new().name("wb-reactor".into()).spawn(run)?;
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

/// Makes an io_uring that runs what completes only when it is asked to, where the kernel can do
/// that (6.1); it costs the least.
fn build_ring() -> io::Result<IoUring> {
    let deferred = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(RING_ENTRIES);
    let ring = match deferred {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::new(RING_ENTRIES),
        made => made,
    }?;
    // The kernel's threads for what it cannot take without waiting: by default a few for each
    // processor, all of which one device that hangs could keep. Where there is no such limit to be
    // set, it stays.
    let workers = u32::try_from(MAX_IN_FLIGHT).unwrap_or(u32::MAX);
    let _ = ring.submitter().register_iowq_max_workers(&mut [workers, 0]);
    Ok(ring)
}

struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// The reactor as its own thread sees it.
struct Ring {
    shared: Arc<Shared>,
    ring: IoUring,
    /// Operations that the kernel knows or that are in the backlog. Their memory stays here until
    /// they are done.
    ops: Slab<Op>,
    /// Keys of operations that are still to be handed to the kernel.
    backlog: VecDeque<usize>,
    /// Whether the poll on the wake-up descriptor is under way.
    armed: bool,
}

impl Ring {
    fn run(mut self) {
        // Unwinding would free memory that the kernel still writes to.
        let _guard = AbortOnUnwind;
        let _ = self.shared.thread.set(std::thread::current().id());
        loop {
            let (tasks, ops, stop) = {
                let mut inbox = self.shared.inbox.lock();
                (std::mem::take(&mut inbox.tasks), std::mem::take(&mut inbox.ops), inbox.stop)
            };
            if stop {
                return self.finish(tasks);
            }
            for op in ops {
                let key = self.ops.insert(op);
                self.backlog.push_back(key);
            }
            for task in tasks {
                task.run();
            }
            self.push_backlog();
            self.park();
            self.reap();
        }
    }

    /// Hands operations to the kernel, and waits for a completion or a wake-up, unless something is
    /// there already.
    fn park(&mut self) {
        self.shared.parked.store(true, Ordering::SeqCst);
        let nothing_to_do = {
            let inbox = self.shared.inbox.lock();
            inbox.tasks.is_empty() && inbox.ops.is_empty() && !inbox.stop
        };
        self.enter(usize::from(nothing_to_do));
        self.shared.parked.store(false, Ordering::SeqCst);
    }

    fn enter(&mut self, want: usize) {
        let submission = self.ring.submission();
        if want == 0 && submission.is_empty() && !submission.taskrun() {
            return;
        }
        drop(submission);
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            // Interrupted, or the kernel is short of memory or of room for completions: reap and
            // come again.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            Err(e) => panic!("io_uring_enter failed: {e}"),
        }
    }

    fn push_backlog(&mut self) {
        if !self.armed {
            let wake = types::Fd(self.shared.wake.as_raw_fd());
            let poll = opcode::PollAdd::new(wake, libc::POLLIN as u32).multi(true).build();
            // SAFETY: the entry refers to no memory, and the descriptor lives as long as the ring.
            self.armed = unsafe { self.ring.submission().push(&poll.user_data(WAKE)) }.is_ok();
        }
        while self.ops.len() - self.backlog.len() < MAX_IN_FLIGHT {
            let Some(key) = self.backlog.pop_front() else { return };
            let op = &mut self.ops[key];
            let may_block = op.target.as_ref().is_some_and(|target| target.may_block);
            let flags = if may_block { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
            let entry = entry(op).user_data(to_u64(key)).flags(flags);
            // SAFETY: `entry` points into the operation's own buffers. They stay in `ops` until the
            // completion has been reaped, and `finish` waits for that before `ops` is dropped.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                self.backlog.push_front(key);
                self.enter(0);
                if self.ring.submission().is_full() {
                    return;
                }
            }
        }
    }

    fn reap(&mut self) {
        let completions: Vec<cqueue::Entry> = self.ring.completion().collect();
        for completion in completions {
            let (user_data, result) = (completion.user_data(), completion.result());
            if user_data == WAKE {
                // It reports each write once, without the counter being read.
                self.armed = cqueue::more(completion.flags());
                continue;
            }
            let key = crate::format::to_usize(user_data);
            if let Some(outcome) = outcome(&mut self.ops[key], result) {
                let op = self.ops.remove(key);
                if let (Ok(()), Some(in_flight)) = (&outcome, &op.in_flight) {
                    in_flight.succeeded();
                }
                let buf = match op.kind {
                    OpKind::Read { buf, .. } => Some(buf),
                    _ => None,
                };
                let _ = op.done.send((outcome, buf));
            } else {
                self.backlog.push_back(key);
            }
        }
    }

    /// Lets I/O that the kernel knows end before its memory goes away. Sleeps own nothing that the
    /// kernel still reads, and are left.
    fn finish(mut self, tasks: VecDeque<Runnable>) {
        for key in std::mem::take(&mut self.backlog) {
            self.ops.remove(key);
        }
        while self.ops.iter().any(|(_, op)| !matches!(op.kind, OpKind::Sleep(_))) {
            self.enter(1);
            self.reap();
            for key in std::mem::take(&mut self.backlog) {
                self.ops.remove(key);
            }
        }
        drop(tasks);
        // What is dropped may wake other tasks, which then come here.
        loop {
            let (tasks, ops) = {
                let mut inbox = self.shared.inbox.lock();
                inbox.ended = inbox.tasks.is_empty() && inbox.ops.is_empty();
                if inbox.ended {
                    return;
                }
                (std::mem::take(&mut inbox.tasks), std::mem::take(&mut inbox.ops))
            };
            drop((tasks, ops));
        }
    }
}

fn fd(op: &Op) -> types::Fd {
    types::Fd(op.target.as_ref().map_or(-1, |target| target.file.as_raw_fd() as RawFd))
}

fn length(bytes: usize) -> u32 {
    // A longer transfer is cut here and goes on as after a short completion.
    u32::try_from(bytes).unwrap_or(1 << 30)
}

fn entry(op: &mut Op) -> squeue::Entry {
    let fd = fd(op);
    let done = op.progress;
    match &mut op.kind {
        OpKind::Read { offset, buf } => {
            let rest = &mut buf[done..];
            opcode::Read::new(fd, rest.as_mut_ptr(), length(rest.len()))
                .offset(*offset + to_u64(done))
                .build()
        }
        OpKind::Write { offset, data } => {
            let rest = &data[done..];
            opcode::Write::new(fd, rest.as_ptr(), length(rest.len()))
                .offset(*offset + to_u64(done))
                .build()
        }
        OpKind::WriteParts { offset, parts, addresses } => {
            addresses.note(parts, done);
            // There are a few.
            let count = u32::try_from(addresses.0.len()).unwrap_or(u32::MAX);
            opcode::Writev::new(fd, addresses.0.as_ptr(), count)
                .offset(*offset + to_u64(done))
                .build()
        }
        OpKind::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        OpKind::Zero { mode, offset, length } => opcode::Fallocate::new(fd, *length)
            .offset(*offset)
            .mode(*mode | libc::FALLOC_FL_KEEP_SIZE)
            .build(),
        OpKind::Sleep(time) => opcode::Timeout::new(&raw const **time).build(),
    }
}

/// How the operation ended, or `None` when it has to go on.
fn outcome(op: &mut Op, result: i32) -> Option<Result<(), Errno>> {
    if matches!(op.kind, OpKind::Sleep(_)) {
        return Some(Ok(()));
    }
    let Ok(moved) = usize::try_from(result) else {
        let cause = Errno::from_raw(-result);
        return if matches!(cause, Errno::EINTR | Errno::EAGAIN) { None } else { Some(Err(cause)) };
    };
    let wanted = match &op.kind {
        OpKind::Read { buf, .. } => buf.len(),
        OpKind::Write { data, .. } => data.len(),
        OpKind::WriteParts { parts, .. } => parts.iter().map(|part| part.len()).sum(),
        _ => return Some(Ok(())),
    };
    op.progress += moved;
    match (op.progress >= wanted, moved) {
        (true, _) => Some(Ok(())),
        // The device ends here: it is shorter than it was when it was opened.
        (false, 0) => Some(Err(Errno::EIO)),
        (false, _) => None,
    }
}

#[cfg(test)]
mod tests;
