//! The io_uring, as the reactor's thread uses it.
#![allow(unsafe_code)] // each submission says why its memory stays valid

use super::inbox::{Shared, Work};
use super::operation::{Op, OpKind, entry, outcome};
use super::queue::Queue;
use super::served::Served;
use super::spin::Spin;
use crate::format::{to_u64, to_usize};
use async_task::Runnable;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::libc::{EAGAIN, EBUSY, EINTR, EINVAL, ETIME};
use nix::poll::PollFlags;
use slab::Slab;
use std::collections::VecDeque;
use std::io;
use std::mem::take;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::Instant;

/// Entries of the submission queue.
const RING_ENTRIES: u32 = 256;
/// Entries of the completion queue: room for all operations and all commands of a front end.
const COMPLETIONS: u32 = 4 * RING_ENTRIES;
/// Operations that the kernel has at a time. Others wait.
const MAX_IN_FLIGHT: usize = 2 * RING_ENTRIES as usize - 1;
/// The `user_data` of the poll that wakes the reactor.
const WAKE: u64 = u64::MAX;
/// The `user_data` of what ends a wait that was given up.
const GIVE_UP: u64 = u64::MAX - 1;
/// A flag in `user_data`: the rest is the key of a front end's command.
const SERVED: u64 = 1 << 62;

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
    /// Operations that the kernel has, or that are in the queue. Each keeps its memory until it
    /// has completed.
    ops: Slab<Op>,
    /// Those that have not been submitted yet.
    queue: Queue,
    /// The commands of front ends.
    served: Slab<Served>,
    /// Those that have not been submitted yet.
    to_serve: Vec<usize>,
    /// Whether the poll on the wake-up descriptor is under way.
    armed: bool,
    /// Waits were given up, and may still be in the kernel.
    given_up: bool,
    spin: Spin,
}

impl Ring {
    /// Makes the ring, for the thread that calls this.
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<Ring> {
        let (ops, queue) = (Slab::new(), Queue::default());
        let (served, to_serve) = (Slab::new(), Vec::new());
        let (ring, spin) = (build_ring()?, Spin::new());
        Ok(Ring { shared, ring, ops, queue, served, to_serve, armed: false, given_up: false, spin })
    }

    /// Runs until the reactor is dropped.
    pub(super) fn run(mut self) {
        // Unwinding would free memory that the kernel still writes to.
        let _guard = AbortOnUnwind;
        let _ = self.shared.thread.set(std::thread::current().id());
        loop {
            let (Work { tasks, ops, served, given_up }, due, stop) = {
                let mut inbox = self.shared.inbox.lock();
                (take(&mut inbox.work), inbox.timers.take_due(), inbox.stop)
            };
            if stop {
                // Other threads may wait for these sleeps.
                due.into_values().for_each(Waker::wake);
                return self.finish(tasks);
            }
            for command in served {
                self.to_serve.push(self.served.insert(command));
            }
            for op in ops {
                let class = op.class;
                self.queue.push(self.ops.insert(op), class);
            }
            for task in tasks {
                task.run();
            }
            due.into_values().for_each(Waker::wake);
            self.push_queue();
            self.given_up |= given_up;
            self.end_waits();
            self.park();
            self.reap();
        }
    }

    /// Submits operations. Then waits for a completion, a wake-up or the end of a sleep, unless the
    /// inbox has something already.
    fn park(&mut self) {
        self.shared.parked.store(true, Ordering::SeqCst);
        let (nothing_to_do, until) = {
            let inbox = self.shared.inbox.lock();
            let nothing_to_do = inbox.work.is_empty() && !inbox.stop;
            (nothing_to_do, inbox.timers.next())
        };
        let begun = Instant::now();
        let want = usize::from(nothing_to_do && !self.finds_news(begun));
        self.enter(want, until);
        if nothing_to_do {
            self.spin.waited(begun.elapsed());
        }
        self.shared.parked.store(false, Ordering::SeqCst);
    }

    /// Submits operations, and looks for a completion or a wake-up without sleeping.
    fn finds_news(&mut self, begun: Instant) -> bool {
        if !self.spin.is_worth_it() {
            return false;
        }
        self.enter(0, None);
        let ring = &mut self.ring;
        self.spin.look(begun, || ring.submission().taskrun() || !ring.completion().is_empty())
    }

    /// Submits operations. Then waits for `want` completions, but no longer than until `until`.
    fn enter(&mut self, want: usize, until: Option<Instant>) {
        let submission = self.ring.submission();
        if want == 0 && submission.is_empty() && !submission.taskrun() {
            return;
        }
        drop(submission);
        let entered = match until.filter(|_| want > 0) {
            None => self.ring.submit_and_wait(want),
            Some(until) => {
                let rest = until.saturating_duration_since(Instant::now()).into();
                let args = types::SubmitArgs::new().timespec(&rest);
                self.ring.submitter().submit_with_args(want, &args)
            }
        };
        match entered {
            Ok(_) => {}
            // The time is over. Or the kernel was interrupted, or is short of memory or of space
            // for completions: reap, then try again.
            Err(e) if matches!(e.raw_os_error(), Some(ETIME | EINTR | EAGAIN | EBUSY)) => {}
            Err(e) => panic!("io_uring_enter failed: {e}"),
        }
    }

    fn push_queue(&mut self) {
        if !self.armed {
            let wake = types::Fd(self.shared.wake.as_raw_fd());
            let poll = opcode::PollAdd::new(wake, PollFlags::POLLIN.bits().cast_unsigned().into())
                .multi(true)
                .build();
            // SAFETY: the entry refers to no memory, and the descriptor lives as long as the ring.
            self.armed = unsafe { self.ring.submission().push(&poll.user_data(WAKE)) }.is_ok();
        }
        self.push_served();
        if self.queue.is_empty() {
            return;
        }
        let now = Instant::now();
        loop {
            if self.ring.submission().is_full() {
                self.enter(0, None);
                if self.ring.submission().is_full() {
                    return;
                }
            }
            let Some(key) = self.queue.pop(now, MAX_IN_FLIGHT) else { return };
            if self.ops[key].is_given_up() {
                self.queue.done(self.ops.remove(key).class, now);
                continue;
            }
            let op = &mut self.ops[key];
            let flags = match op.target.may_block {
                true => squeue::Flags::ASYNC,
                false => squeue::Flags::empty(),
            };
            let entry = entry(op).user_data(to_u64(key)).flags(flags);
            // SAFETY: `entry` points into the operation's own buffers. They stay in `ops` until the
            // completion has been reaped, and `finish` waits for that before `ops` is dropped.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            pushed.expect("there is room");
        }
    }

    /// Has the kernel end the waits that were given up, so that it lets go of their files.
    fn end_waits(&mut self) {
        if !self.given_up {
            return;
        }
        let given_up = self.ops.iter().filter(|(_, op)| op.is_given_up());
        for key in given_up.map(|(key, _)| key).collect::<Vec<_>>() {
            // One whose turn has not come yet is not in the kernel. That does no harm.
            let entry = opcode::PollRemove::new(to_u64(key)).build().user_data(GIVE_UP);
            if self.ring.submission().is_full() {
                self.enter(0, None);
            }
            // SAFETY: the entry refers to no memory.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return;
            }
        }
        self.given_up = false;
    }

    fn push_served(&mut self) {
        let submission = self.ring.submission();
        let room = submission.capacity() - submission.len();
        drop(submission);
        if self.to_serve.len() > room {
            // Commands that came together go together.
            self.enter(0, None);
        }
        while let Some(key) = self.to_serve.pop() {
            if self.ring.submission().is_full() {
                self.enter(0, None);
            }
            let Some(entry) = self.served[key].entry() else { continue };
            let entry = entry.user_data(SERVED | to_u64(key));
            // SAFETY: the kernel accesses the buffer of the command. It stays in `served` until the
            // completion has been reaped; `finish` never frees it.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                self.to_serve.push(key);
                return;
            }
        }
    }

    fn reap_served(&mut self, key: usize, result: i32) {
        if self.served[key].completed(result) {
            self.to_serve.push(key);
        } else {
            self.served.remove(key);
        }
    }

    fn reap(&mut self) {
        let completions: Vec<cqueue::Entry> = self.ring.completion().collect();
        let now = Instant::now();
        for completion in completions {
            let (user_data, result) = (completion.user_data(), completion.result());
            if user_data == WAKE {
                // The poll reports each wake-up once; the counter need not be read.
                self.armed = cqueue::more(completion.flags());
                continue;
            }
            if user_data == GIVE_UP {
                continue;
            }
            if user_data & SERVED != 0 {
                self.reap_served(to_usize(user_data & !SERVED), result);
                continue;
            }
            let key = to_usize(user_data);
            let op = &mut self.ops[key];
            self.queue.done(op.class, now);
            let Some(outcome) = outcome(op, result) else {
                self.queue.push(key, op.class);
                continue;
            };
            let op = self.ops.remove(key);
            if let (Ok(()), Some(in_flight)) = (&outcome, &op.in_flight) {
                in_flight.succeeded();
            }
            let buf = match op.kind {
                OpKind::Read { buf, .. } => Some(buf),
                _ => None,
            };
            let _ = op.done.send((outcome, buf));
        }
    }

    /// Waits for the I/O that the kernel has, before its memory is freed. Then drops all tasks.
    ///
    /// The kernel may still have commands of a device that is being served, and access their
    /// memory. So that memory is never freed.
    fn finish(mut self, tasks: VecDeque<Runnable>) {
        self.drop_queue();
        while self.ops.iter().any(|(_, op)| op.is_io()) {
            self.enter(1, None);
            self.reap();
            self.drop_queue();
        }
        for command in self.served.drain() {
            std::mem::forget(command.command);
        }
        drop(tasks);
        self.shared.live.end();
        // Dropping a task may wake other tasks, which are then posted to the inbox.
        loop {
            let (left, timers) = {
                let mut inbox = self.shared.inbox.lock();
                inbox.ended = inbox.work.is_empty();
                (take(&mut inbox.work), inbox.timers.take_all())
            };
            if left.is_empty() && timers.is_empty() {
                return;
            }
            drop(left);
            // Other threads may wait for them.
            timers.into_values().for_each(Waker::wake);
        }
    }

    /// Drops the operations that the kernel does not have.
    fn drop_queue(&mut self) {
        for key in self.queue.take_all() {
            self.ops.remove(key);
        }
    }
}
