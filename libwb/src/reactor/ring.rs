//! The io_uring, as the reactor's thread uses it.
#![allow(unsafe_code)] // each submission says why its memory stays valid

use super::inbox::Shared;
use super::operation::{Lent, Op, OpKind, entry, outcome};
use crate::format::{to_u64, to_usize};
use async_task::Runnable;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::libc::{EAGAIN, EBUSY, EINTR, EINVAL};
use nix::poll::PollFlags;
use slab::Slab;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Entries of the submission queue.
const RING_ENTRIES: u32 = 256;
/// Entries of the completion queue: enough for all I/O, and for what a front end waits for.
const COMPLETIONS: u32 = 8 * RING_ENTRIES;
/// I/O that the kernel has at a time. Other I/O waits.
const MAX_IN_FLIGHT: usize = 2 * RING_ENTRIES as usize - 1;
/// The `user_data` of the poll that wakes the reactor.
const WAKE: u64 = u64::MAX;

/// Makes an io_uring. On Linux 6.1 and later, completions run only when the reactor asks for them,
/// which costs least.
fn build_ring() -> io::Result<IoUring> {
    let deferred = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(COMPLETIONS)
        .build(RING_ENTRIES);
    let ring = match deferred {
        Err(e) if e.raw_os_error() == Some(EINVAL) => {
            IoUring::builder().setup_cqsize(COMPLETIONS).build(RING_ENTRIES)
        }
        made => made,
    }?;
    // The kernel has worker threads for operations whose submission may wait. By default there are
    // a few for each processor, and one hanging device could occupy them all. An older kernel keeps
    // its default.
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

/// The reactor's own side: the ring and the operations under way.
pub(super) struct Ring {
    shared: Arc<Shared>,
    ring: IoUring,
    /// Operations that the kernel has, or that are in the backlog. Each keeps its memory until it
    /// has completed.
    ops: Slab<Op>,
    /// Keys of operations that have not been submitted yet.
    backlog: VecDeque<usize>,
    /// How much I/O the kernel has.
    io_in_flight: usize,
    /// Whether the poll on the wake-up descriptor is under way.
    armed: bool,
}

impl Ring {
    /// Makes the ring, for the thread that calls this.
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<Ring> {
        let (ops, backlog) = (Slab::new(), VecDeque::new());
        Ok(Ring { shared, ring: build_ring()?, ops, backlog, io_in_flight: 0, armed: false })
    }

    /// Runs until the reactor is dropped.
    pub(super) fn run(mut self) {
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

    /// Submits operations. Then waits for a completion or a wake-up, unless the inbox has something
    /// already.
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
            // Interrupted, or the kernel is short of memory or of space for completions. Reap, then
            // try again.
            Err(e) if matches!(e.raw_os_error(), Some(EINTR | EAGAIN | EBUSY)) => {}
            Err(e) => panic!("io_uring_enter failed: {e}"),
        }
    }

    fn push_backlog(&mut self) {
        if !self.armed {
            let wake = types::Fd(self.shared.wake.as_raw_fd());
            let poll = opcode::PollAdd::new(wake, PollFlags::POLLIN.bits().cast_unsigned().into())
                .multi(true)
                .build();
            // SAFETY: the entry refers to no memory, and the descriptor lives as long as the ring.
            self.armed = unsafe { self.ring.submission().push(&poll.user_data(WAKE)) }.is_ok();
        }
        while self.io_in_flight < MAX_IN_FLIGHT {
            let Some(key) = self.backlog.pop_front() else { return };
            let op = &mut self.ops[key];
            let is_io = op.is_io();
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
            } else if is_io {
                self.io_in_flight += 1;
            }
        }
    }

    fn reap(&mut self) {
        let completions: Vec<cqueue::Entry> = self.ring.completion().collect();
        for completion in completions {
            let (user_data, result) = (completion.user_data(), completion.result());
            if user_data == WAKE {
                // The poll reports each wake-up once; the counter need not be read.
                self.armed = cqueue::more(completion.flags());
                continue;
            }
            let key = to_usize(user_data);
            if self.ops[key].is_io() {
                self.io_in_flight -= 1;
            }
            if let Some(outcome) = outcome(&mut self.ops[key], result) {
                let op = self.ops.remove(key);
                if let (Ok(()), Some(in_flight)) = (&outcome, &op.in_flight) {
                    in_flight.succeeded();
                }
                let lent = match op.kind {
                    OpKind::Read { buf, .. } => Some(Lent::Read(buf)),
                    OpKind::Serve { buffer, .. } => Some(Lent::Serve(buffer)),
                    _ => None,
                };
                let _ = op.done.send((outcome, lent));
            } else {
                self.backlog.push_back(key);
            }
        }
    }

    /// Waits for the I/O that the kernel has, before its memory is freed. Of the rest, only a
    /// command of a device that is still being served owns memory that the kernel accesses. Its
    /// memory is never freed.
    fn finish(mut self, tasks: VecDeque<Runnable>) {
        for key in std::mem::take(&mut self.backlog) {
            self.ops.remove(key);
        }
        while self.io_in_flight > 0 {
            self.enter(1);
            self.reap();
            for key in std::mem::take(&mut self.backlog) {
                self.ops.remove(key);
            }
        }
        for op in self.ops.drain().filter(|op| matches!(op.kind, OpKind::Serve { .. })) {
            std::mem::forget(op.kind);
        }
        drop(tasks);
        // Dropping a task may wake other tasks, which are then posted to the inbox.
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
