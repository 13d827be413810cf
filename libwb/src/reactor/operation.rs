//! Operations: what they do, what they own, and how they end.
#![allow(unsafe_code)] // io_uring takes addresses, which the operation owns

use super::queue::Class;
use crate::buf::{IoBuf, SharedBuf};
use crate::format::to_u64;
use crate::pending::InFlight;
use futures_channel::oneshot;
use io_uring::{opcode, squeue, types};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::libc::{RWF_DSYNC, iovec};
use nix::poll::PollFlags;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What an operation does. It owns all memory that the kernel accesses for it.
pub(crate) enum OpKind {
    /// Fill the buffer.
    Read { offset: u64, buf: IoBuf },
    /// Write the data.
    Write { offset: u64, data: SharedBuf },
    /// Write several pieces of data back to back, as one operation; perhaps so that they are
    /// durable when it ends.
    WriteParts { offset: u64, parts: Vec<SharedBuf>, addresses: Addresses, durably: bool },
    /// `fdatasync`.
    Sync,
    /// `fallocate` with this mode, keeping the size.
    Zero { mode: FallocateFlags, offset: u64, length: u64 },
    /// Wait until the file can be read.
    Readable,
    /// Wait until the file can be written.
    Writable,
}

/// The addresses of the parts that are still to be written, in the form of `writev`.
#[derive(Default)]
pub(crate) struct Addresses(Vec<iovec>);

// SAFETY: the addresses point into buffers that the same operation owns. Only the kernel reads
// them.
unsafe impl Send for Addresses {}

impl Addresses {
    /// Notes the addresses of `parts` without their first `skip` bytes.
    fn note(&mut self, parts: &[SharedBuf], mut skip: usize) {
        self.0.clear();
        for part in parts {
            let rest = &part[skip.min(part.len())..];
            skip -= part.len() - rest.len();
            if !rest.is_empty() {
                self.0
                    .push(iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() });
            }
        }
    }
}

/// How an operation ended, and the buffer of a read.
pub(crate) type OpResult = (Result<(), Errno>, Option<IoBuf>);

/// The file that an operation works on.
#[derive(Clone)]
pub(crate) struct Target {
    file: Arc<File>,
    /// Submitting an operation may wait for the device, as on FUSE. The kernel then gets a thread
    /// for it. Otherwise one hanging device would stop the reactor, and the other device with it.
    pub(super) may_block: bool,
    /// It holds the log.
    writes_first: Arc<AtomicBool>,
}

impl Target {
    pub(crate) fn new(file: File) -> Target {
        let may_block =
            fstatfs(&file).is_ok_and(|found| found.filesystem_type() == FUSE_SUPER_MAGIC);
        Target { file: Arc::new(file), may_block, writes_first: Arc::default() }
    }

    /// Writes and flushes go ahead of all else from now on.
    pub(crate) fn put_writes_first(&self) {
        self.writes_first.store(true, Ordering::Relaxed);
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

pub(super) struct Op {
    /// Keeps the descriptor open until the kernel has finished.
    pub(super) target: Target,
    /// Counts the operation until the kernel has finished it, even if its caller has gone.
    pub(super) in_flight: Option<InFlight>,
    pub(super) kind: OpKind,
    pub(super) class: Class,
    /// Bytes that earlier short completions have transferred.
    pub(super) progress: usize,
    pub(super) done: oneshot::Sender<OpResult>,
}

impl Op {
    /// Whether it moves data of a device, and ends by itself in time. To wait until a file is ready
    /// may take forever.
    pub(super) fn is_io(&self) -> bool {
        !matches!(self.kind, OpKind::Readable | OpKind::Writable)
    }

    /// Whether it only waits, and its caller no longer does.
    pub(super) fn is_given_up(&self) -> bool {
        !self.is_io() && self.done.is_canceled()
    }
}

/// When an operation may be submitted.
pub(super) fn class(target: &Target, kind: &OpKind) -> Class {
    let fd = target.file.as_raw_fd();
    let writes_first = target.writes_first.load(Ordering::Relaxed);
    match kind {
        OpKind::Readable | OpKind::Writable => Class::Wait,
        OpKind::Sync | OpKind::WriteParts { durably: true, .. } if writes_first => Class::Flush(fd),
        OpKind::Write { .. } | OpKind::WriteParts { .. } if writes_first => Class::Urgent,
        OpKind::Read { .. }
        | OpKind::Write { .. }
        | OpKind::WriteParts { .. }
        | OpKind::Sync
        | OpKind::Zero { .. } => Class::InTurn(fd),
    }
}

fn length(bytes: usize) -> u32 {
    // A longer transfer is cut off here and continues like after a short completion.
    u32::try_from(bytes).unwrap_or(1 << 30)
}

/// The submission of an operation, or of its rest after a short completion.
pub(super) fn entry(op: &mut Op) -> squeue::Entry {
    let fd = types::Fd(op.target.file.as_raw_fd());
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
        OpKind::WriteParts { offset, parts, addresses, durably } => {
            addresses.note(parts, done);
            let count = u32::try_from(addresses.0.len()).unwrap_or(u32::MAX);
            opcode::Writev::new(fd, addresses.0.as_ptr(), count)
                .offset(*offset + to_u64(done))
                .rw_flags(if *durably { RWF_DSYNC } else { 0 })
                .build()
        }
        OpKind::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        OpKind::Zero { mode, offset, length } => opcode::Fallocate::new(fd, *length)
            .offset(*offset)
            .mode((*mode | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits())
            .build(),
        OpKind::Readable => poll(fd, PollFlags::POLLIN),
        OpKind::Writable => poll(fd, PollFlags::POLLOUT),
    }
}

fn poll(fd: types::Fd, what: PollFlags) -> squeue::Entry {
    opcode::PollAdd::new(fd, what.bits().cast_unsigned().into()).build()
}

/// How the operation ended, or `None` when it must be submitted again.
pub(super) fn outcome(op: &mut Op, result: i32) -> Option<Result<(), Errno>> {
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
        // The device ends here: it has shrunk since it was opened.
        (false, 0) => Some(Err(Errno::EIO)),
        (false, _) => None,
    }
}
