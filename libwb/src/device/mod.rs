//! Block devices with owned, aligned buffers. A cache stands on two of them.

#[cfg(feature = "uring")]
pub mod fit;
#[cfg(feature = "uring")]
mod held;
#[cfg(feature = "uring")]
mod identity;
mod layer;
mod link;
mod mem;
#[cfg(feature = "nbd-client")]
pub mod nbd;
mod overlay;
#[cfg(all(feature = "nbd", feature = "uring"))]
mod place;
#[cfg(feature = "uring")]
pub mod probe;
#[cfg(feature = "blkid")]
pub mod signatures;
#[cfg(feature = "sim")]
pub mod sim;
#[cfg(feature = "uring")]
pub mod sparse;
#[cfg(feature = "uring")]
mod uring;
#[cfg(feature = "uring")]
mod watched;

pub use crate::buf::{IoBuf, SharedBuf};
pub use crate::pending::Pending;
pub use layer::DeviceLayer;
pub use link::LinkStatus;
pub use mem::MemDevice;
pub use overlay::Overlay;
#[cfg(all(feature = "nbd", feature = "uring"))]
pub use place::{Place, absolute_uri, is_same_device};
#[cfg(feature = "uring")]
pub use uring::UringDevice;
#[cfg(feature = "uring")]
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
#[non_exhaustive]
pub enum Operation {
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Making earlier writes durable.
    Flush,
    /// Discarding a range; it reads as zeros afterwards.
    Discard,
    /// Writing bytes that are durable at once.
    DurableWrite,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::DurableWrite => "durable write",
        })
    }
}

/// An operation on a device failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{device}: {operation} of {length} bytes at byte {offset} failed: {}", describe(*cause))]
pub struct DeviceError {
    /// The name of the device.
    pub device: Arc<str>,
    /// The operation.
    pub operation: Operation,
    /// Its offset in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// The system's error; [`DeviceError::ALTERED`] if the data itself is wrong.
    pub cause: Errno,
}

impl DeviceError {
    /// The cause if the data read is not the data written.
    pub const ALTERED: Errno = Errno::EBADMSG;
    /// The cause if a slot of a cache device contradicts the log that is served.
    pub const CONTRADICTS: Errno = Errno::EBADSLT;
}

fn describe(cause: Errno) -> &'static str {
    match cause {
        DeviceError::ALTERED => {
            "the data does not match its checksum; the device has altered it. Detach the volume, \
             run wbcheck on its cache device, then attach it with --salvage"
        }
        DeviceError::CONTRADICTS => {
            "what lies there contradicts the log that is served; the device has lost or altered \
             segments. Detach the volume, run wbcheck on its cache device, then attach it with \
             --salvage"
        }
        Errno::ENOSPC => {
            "No space left on device: the filesystem below it is full. Make room there"
        }
        Errno::EFBIG => "File too large for the limit of this process (ulimit -f)",
        other => other.desc(),
    }
}

/// The future of an operation on a device. It owns all that it needs. Dropping it does not cancel
/// what of the operation is under way.
pub type IoFuture<T> = BoxFuture<'static, Result<T, DeviceError>>;

/// A block device. Offsets and lengths are in bytes, multiples of [`BlockDevice::block_size`], and
/// inside the device.
///
/// A power cut may lose or reorder completed writes until a later flush completes. It does not tear
/// a 512-byte sector. Concurrent operations complete in any order.
pub trait BlockDevice: Send + Sync + 'static {
    /// Its name in messages.
    fn name(&self) -> &Arc<str>;

    /// Its size in bytes.
    fn size(&self) -> u64;

    /// What identifies it wherever it is plugged in: a serial number or similar. Empty if it has
    /// none.
    fn identity(&self) -> &str {
        ""
    }

    /// Its unit of I/O in bytes: a power of two from 512 to 4096.
    fn block_size(&self) -> u32;

    /// How long it was busy since the system started, with all its users; none if unknown.
    fn busy(&self) -> Option<Duration> {
        None
    }

    /// Its requests; all zeros if they are not counted.
    fn pending(&self) -> Pending {
        Pending::default()
    }

    /// How the connection to it is, if it is on a server.
    fn link(&self) -> Option<LinkStatus> {
        None
    }

    /// Sets how long requests wait for a lost connection before they fail with `ETIMEDOUT`: those
    /// that wait now, and all that come. `None` sets no limit. A local device has no connection.
    fn set_timeout(&self, _timeout: Option<Duration>) {}

    /// Lets writes and flushes go ahead of all else from now on, where there is a queue for this
    /// device: requests wait for them.
    fn put_writes_first(&self) {}

    /// Fills the whole buffer with the data from `offset` on.
    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf>;

    /// As [`BlockDevice::read`], for a caller with nothing else to do. May block the thread until
    /// the data is there.
    fn read_alone(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        self.read(offset, buf)
    }

    /// Writes all the data from `offset` on.
    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()>;

    /// Writes several pieces of data back to back from `offset` on.
    fn write_parts(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        let mut at = offset;
        let mut writes = Vec::with_capacity(parts.len());
        for part in parts {
            let length = to_u64(part.len());
            writes.push(self.write(at, part));
            at += length;
        }
        // Waits for all writes, even after a failure. Otherwise a write under way could overwrite a
        // retry.
        Box::pin(async move { futures_util::future::join_all(writes).await.into_iter().collect() })
    }

    /// Whether [`BlockDevice::write_durably`] is there, and takes less time than a write and a
    /// flush.
    fn prefers_durable_writes(&self) -> bool {
        false
    }

    /// Writes several pieces of data back to back from `offset` on. When this is done, they are
    /// durable; earlier writes need not be. If it fails, any write that is not durable yet may be
    /// lost, and later flushes need not report that.
    fn write_durably(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        let length = to_u64(parts.iter().map(|part| part.len()).sum());
        let (device, operation) = (self.name().clone(), Operation::DurableWrite);
        let cause = Errno::EOPNOTSUPP;
        let refused = DeviceError { device, operation, offset, length, cause };
        Box::pin(std::future::ready(Err(refused)))
    }

    /// Makes every write that completed before the call durable.
    fn flush(&self) -> IoFuture<()>;

    /// Makes a range read as zeros, and frees its space if possible.
    fn discard(&self, offset: u64, length: u64) -> IoFuture<()>;

    /// Makes a range read as zeros, and keeps its space if possible.
    fn zero(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.discard(offset, length)
    }
}

/// Waits for all operations, even after a failure, and returns the first error. A dropped operation
/// would still run, and could overwrite a retry or a reused range.
pub(crate) async fn all(
    operations: impl Stream<Item = Result<(), DeviceError>>,
) -> Result<(), DeviceError> {
    operations.fold(Ok(()), async |result: Result<(), DeviceError>, done| result.and(done)).await
}

/// A shared device.
pub type Device = Arc<dyn BlockDevice>;
