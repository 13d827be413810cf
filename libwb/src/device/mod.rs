//! What the cache stands on: block devices with owned, aligned buffers.

pub mod fit;
mod held;
mod identity;
mod layer;
mod mem;
mod overlay;
pub mod probe;
#[cfg(feature = "blkid")]
pub mod signatures;
#[cfg(feature = "sim")]
pub mod sim;
pub mod sparse;
mod uring;
mod watched;

pub use crate::buf::{IoBuf, SharedBuf};
pub use crate::pending::Pending;
pub use layer::DeviceLayer;
pub use mem::MemDevice;
pub use overlay::Overlay;
pub use uring::UringDevice;
pub use watched::{Gone, Watched};

use crate::format::to_u64;
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt};
use nix::errno::Errno;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// An operation on a block device, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Making earlier writes durable.
    Flush,
    /// Giving up a range; it reads as zeros afterwards.
    Discard,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
        })
    }
}

/// An operation on a device failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{device}: {operation} of {length} bytes at byte {offset} failed: {}", describe(*cause))]
pub struct DeviceError {
    /// The device's path.
    pub device: Arc<str>,
    /// What was tried.
    pub operation: Operation,
    /// Where it began, in bytes.
    pub offset: u64,
    /// How many bytes it concerned.
    pub length: u64,
    /// What the system said; [`DeviceError::ALTERED`] when the data itself is wrong.
    pub cause: Errno,
}

impl DeviceError {
    /// The cause when what was read is not what was written.
    pub const ALTERED: Errno = Errno::EBADMSG;
}

fn describe(cause: Errno) -> &'static str {
    match cause {
        DeviceError::ALTERED => {
            "the data does not match its checksum; the device has altered it. Detach the volume, \
             run wbcheck on its cache device, then attach it with --salvage"
        }
        Errno::ENOSPC => {
            "No space left on device: the filesystem below it is full. Make room there"
        }
        Errno::EFBIG => "File too large for the limit of this process (ulimit -f)",
        other => other.desc(),
    }
}

/// The future of an operation on a device. It owns what it needs; dropping it does not undo the
/// operation.
pub type IoFuture<T> = BoxFuture<'static, Result<T, DeviceError>>;

/// A block device. Offsets and lengths are bytes, multiples of [`BlockDevice::block_size`], inside
/// the device.
///
/// Completed writes may still be lost or reordered by a power cut until a later flush completes; a
/// single 512-byte sector is written whole or not at all. Concurrent operations complete in any
/// order.
pub trait BlockDevice: Send + Sync + 'static {
    /// What to call it in messages.
    fn name(&self) -> &Arc<str>;

    /// Its size in bytes.
    fn size(&self) -> u64;

    /// What tells it from others wherever it is plugged in: a serial number or the like. Empty
    /// where it has none.
    fn identity(&self) -> &str {
        ""
    }

    /// The unit of its I/O in bytes: 512 or a larger power of two, at most 4096.
    fn block_size(&self) -> u32;

    /// For how long it was busy since the system started, whoever used it; none where nobody knows.
    fn busy(&self) -> Option<Duration> {
        None
    }

    /// The requests that it has not answered yet; nothing where nobody counts them.
    fn pending(&self) -> Pending {
        Pending::default()
    }

    /// Fills the whole buffer from `offset` on.
    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf>;

    /// As [`BlockDevice::read`], for a caller that does nothing else before it has the data. May
    /// block the thread until then.
    fn read_alone(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        self.read(offset, buf)
    }

    /// Writes all the data from `offset` on.
    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()>;

    /// Writes several pieces of data, one after the other, from `offset` on.
    fn write_parts(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        let mut at = offset;
        let mut writes = Vec::with_capacity(parts.len());
        for part in parts {
            let length = to_u64(part.len());
            writes.push(self.write(at, part));
            at += length;
        }
        // All of them, even after a failure: who tries again must not be overtaken by a write that
        // is still out.
        Box::pin(async move { futures_util::future::join_all(writes).await.into_iter().collect() })
    }

    /// Makes every write that completed before the call durable.
    fn flush(&self) -> IoFuture<()>;

    /// Makes a range read as zeros, and gives up its space where that can be done.
    fn discard(&self, offset: u64, length: u64) -> IoFuture<()>;

    /// Makes a range read as zeros, and keeps its space where that can be told.
    fn zero(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.discard(offset, length)
    }
}

/// Runs operations to their end, even after a failure, and gives the first error. An operation that
/// is dropped goes on: who tries again, or reuses what it works on, must not be overtaken by it.
pub(crate) async fn all(
    operations: impl Stream<Item = Result<(), DeviceError>>,
) -> Result<(), DeviceError> {
    operations.fold(Ok(()), async |result: Result<(), DeviceError>, done| result.and(done)).await
}

/// A device, shared.
pub type Device = Arc<dyn BlockDevice>;
