//! Front ends. They turn requests into calls of a [`Volume`], and make no policy.

#[cfg(feature = "serve-loop")]
mod fuse;
#[cfg(feature = "serve-loop")]
pub mod loopdev;
#[cfg(feature = "serve-nbd")]
pub mod nbd;
#[cfg(feature = "serve-loop")]
pub mod outside;
mod owner;
#[cfg(any(feature = "serve-loop", feature = "serve-nbd", feature = "serve-ublk"))]
mod request;
mod rights;
#[cfg(feature = "serve-ublk")]
pub mod ublk;

pub use owner::{Owner, Part};
pub use rights::refuse_without_root;

use crate::cache::{Cache, Timed};
use crate::device::IoBuf;
use crate::device::probe::Traits;
use crate::format::Sector;
use crate::sys;
use nix::errno::Errno;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io;
use std::time::Duration;

/// The longest discard that a device announces, in bytes. The kernel splits longer ones. So a disk
/// that discards slowly keeps other requests waiting for a piece at most.
const MAX_DISCARD: u64 = 64 << 20;

/// How a volume is served.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Logical sector size of the block device in bytes: 512 or 4096.
    pub sector_size: u32,
    /// Whether it takes no writes.
    pub read_only: bool,
    /// What users of the block device should know about the backing device.
    pub backing: Traits,
}

/// Why a volume cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct ServeError {
    /// The step that failed.
    pub what: String,
    /// The error of the system.
    pub cause: io::Error,
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> ServeError {
    let what = what.into();
    move |cause| ServeError { what, cause: cause.into() }
}

/// Prepares this process to serve a device that memory reclaim may wait for. Its memory stays
/// resident, and the kernel serves its allocations without waiting for I/O. Call it before other
/// threads start.
///
/// # Errors
/// Names what the system refused. The process can still serve, but may hang when memory is short.
pub fn guard_against_reclaim() -> Result<(), String> {
    let locked = rights::lock_memory();
    let flusher = sys::set_io_flusher().map_err(|cause| {
        format!("cannot mark the process as an I/O flusher: {}", not_flusher(cause))
    });
    let refused: Vec<String> = [locked, flusher].into_iter().filter_map(Result::err).collect();
    if refused.is_empty() { Ok(()) } else { Err(refused.join("; ")) }
}

/// The kernel reports only that it is not permitted.
fn not_flusher(cause: Errno) -> &'static str {
    match cause {
        Errno::EPERM => "it lacks CAP_SYS_RESOURCE, as in most containers",
        other => other.desc(),
    }
}

/// Aborts the process when any of its threads panics, after a `report` of the panic. A volume that
/// lost a thread would make its users hang. The next attach recovers everything acknowledged as
/// durable.
pub fn abort_on_panic(report: impl Fn(&str) + Send + Sync + 'static) {
    std::panic::set_hook(Box::new(move |panic| {
        let trace = Backtrace::capture();
        match trace.status() {
            BacktraceStatus::Captured => report(&format!("{panic}\n{trace}")),
            _ => report(&panic.to_string()),
        }
        std::process::abort();
    }));
}

/// A cache that serves only reads.
#[derive(Clone)]
pub struct ReadOnly(pub Cache);

impl Volume for ReadOnly {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn write_ready(&self, _sector: Sector, _data: &[u8]) -> Result<usize, Errno> {
        Err(Errno::EROFS)
    }

    async fn write_rest(&self, _sector: Sector, _data: Vec<u8>) -> Result<(), Errno> {
        Err(Errno::EROFS)
    }

    async fn read(&self, sector: Sector, buf: IoBuf) -> Result<IoBuf, Errno> {
        self.0.read(sector, buf).await.map_err(|error| error.errno())
    }

    async fn discard(&self, _sector: Sector, _length: u64) -> Result<(), Errno> {
        Err(Errno::EROFS)
    }

    /// Nothing was written.
    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn took(&self, request: Timed, time: Duration) {
        self.0.took(request, time);
    }
}

/// What a front end serves.
pub trait Volume: Clone + Send + Sync + 'static {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Writes from the front as much as it can acknowledge without waiting. Returns how many bytes
    /// that is.
    ///
    /// # Errors
    /// The error for the writer.
    fn write_ready(&self, sector: Sector, data: &[u8]) -> Result<usize, Errno>;

    /// Writes the rest.
    ///
    /// # Errors
    /// The error for the writer. Parts may have been written.
    fn write_rest(
        &self,
        sector: Sector,
        data: Vec<u8>,
    ) -> impl Future<Output = Result<(), Errno>> + Send;

    /// Fills a buffer.
    ///
    /// # Errors
    /// The error for the reader.
    fn read(&self, sector: Sector, buf: IoBuf)
    -> impl Future<Output = Result<IoBuf, Errno>> + Send;

    /// Makes a range of `length` bytes read as zeros, durably.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if it cannot discard, or another error for the caller. Parts may have been
    /// discarded.
    fn discard(
        &self,
        sector: Sector,
        length: u64,
    ) -> impl Future<Output = Result<(), Errno>> + Send;

    /// The same, but the range stays allocated.
    ///
    /// # Errors
    /// As [`Volume::discard`].
    fn zero(&self, sector: Sector, length: u64) -> impl Future<Output = Result<(), Errno>> + Send {
        self.discard(sector, length)
    }

    /// Makes everything acknowledged before durable.
    ///
    /// # Errors
    /// The error for the caller. The fate of data that was not flushed before is then unknown.
    fn flush(&self) -> impl Future<Output = Result<(), Errno>> + Send;

    /// Notes how long a request took.
    fn took(&self, _request: Timed, _time: Duration) {}
}

impl Volume for Cache {
    fn size(&self) -> u64 {
        self.size()
    }

    fn write_ready(&self, sector: Sector, data: &[u8]) -> Result<usize, Errno> {
        self.write_ready(sector, data).map_err(|error| error.errno())
    }

    async fn write_rest(&self, sector: Sector, data: Vec<u8>) -> Result<(), Errno> {
        self.write_rest(sector, &data).await.map_err(|error| error.errno())
    }

    async fn read(&self, sector: Sector, buf: IoBuf) -> Result<IoBuf, Errno> {
        self.read(sector, buf).await.map_err(|error| error.errno())
    }

    async fn discard(&self, sector: Sector, length: u64) -> Result<(), Errno> {
        self.discard(sector, length).await.map_err(|error| error.errno())
    }

    async fn zero(&self, sector: Sector, length: u64) -> Result<(), Errno> {
        self.zero(sector, length).await.map_err(|error| error.errno())
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.flush().await.map_err(|error| error.errno())
    }

    fn took(&self, request: Timed, time: Duration) {
        self.took(request, time);
    }
}
