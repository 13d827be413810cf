//! The cache engine.
//!
//! Runtime-agnostic: it knows block devices and a [`Runtime`], but no file, thread or front end, so
//! that the daemon and the simulator run the same code. Its state is pure and lives under one short
//! lock; no I/O and no waiting happens while that is held. Requests are futures that their callers
//! poll; appending, flushing and write-back are background tasks.

mod background;
mod busy_meter;
mod engine;
mod error;
mod figures;
mod head;
mod life;
mod request;
mod shared_flush;
mod state;
#[cfg(test)]
mod tests;
mod tunables;

pub use error::CacheError;
pub use figures::accesses::{Access, Accesses};
pub use figures::counters::Counters;
pub use figures::latency::{Histogram, Latencies, Timed};
pub use figures::statistics::Statistics;
pub use figures::status::Status;
pub use head::Head;
pub use life::open::refuse_size;
pub use life::options::OpenOptions;
pub use state::pacing::PACING_DIVISOR;
pub use state::rate::Pace;
pub use state::stuck::StuckBlocks;
pub use state::writeback_state::URGENT_BELOW;
pub use tunables::{TunableError, TunableValue, Tunables, WriteMode, WritebackOrder};

use crate::device::{BlockDevice, Device, IoBuf};
use crate::format::Sector;
use crate::log::live::Totals;
use crate::log::reach::{Reach, Seen};
use crate::log::recovery::Recovery;
use crate::runtime::Runtime;
use engine::Engine;
use request::Space;
use state::shared::Waiter;
use std::sync::Arc;
use std::time::Duration;

/// A cached volume. Cheap to clone; all clones are the same volume.
#[derive(Clone)]
pub struct Cache {
    engine: Arc<Engine>,
}

impl Cache {
    /// Recovers the log of a cache device, and starts to serve the volume. Until the log has been
    /// found sound and to fit the backing device, nothing is written to either.
    ///
    /// # Errors
    /// - A device fails.
    /// - The cache device holds no cache, or its log is corrupt.
    /// - The log does not fit the backing device.
    /// - What the options refuse.
    pub async fn open(
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        options: OpenOptions,
    ) -> Result<Cache, CacheError> {
        let engine = life::open::open(cache, backing, runtime, options).await?;
        Ok(Cache { engine })
    }

    /// What [`Cache::open`] would recover with [`OpenOptions::replay`]. Refuses what that would
    /// refuse, and changes nothing.
    ///
    /// # Errors
    /// As [`Cache::open`].
    pub async fn examine(
        cache: &Device,
        backing: &Device,
        known: Option<Reach>,
    ) -> Result<(Recovery, Totals), CacheError> {
        life::open::examine(cache, backing, known).await
    }

    /// The volume's size in bytes: that of the backing device.
    pub fn size(&self) -> u64 {
        self.engine.backing.size()
    }

    /// Reads the newest acknowledged data, from wherever it lies, and fills the whole buffer.
    ///
    /// # Errors
    /// When the request lies outside the volume, or a device fails that alone holds the data.
    pub async fn read(&self, sector: Sector, buf: IoBuf) -> Result<IoBuf, CacheError> {
        self.engine.read(sector, buf).await
    }

    /// Writes as much as can be acknowledged without waiting, from the front. Returns how many
    /// bytes that is.
    ///
    /// # Errors
    /// When the request lies outside the volume, the cache is being closed, or the cache device
    /// failed.
    pub fn write_ready(&self, sector: Sector, data: &[u8]) -> Result<usize, CacheError> {
        self.engine.write_ready(sector, data)
    }

    /// Goes on with a write whose front [`Cache::write_ready`] has taken. `sector` and `data` are
    /// the rest.
    ///
    /// # Errors
    /// When the cache is being closed or a device fails. Parts may have been written.
    pub async fn write_rest(&self, sector: Sector, data: &[u8]) -> Result<(), CacheError> {
        self.engine.write_rest(sector, data).await
    }

    /// Writes. The data is acknowledged from RAM, as a disk with a volatile write cache does;
    /// [`Cache::flush`] makes it durable. A write around the log is durable when this returns.
    ///
    /// # Errors
    /// As [`Cache::write_ready`] and [`Cache::write_rest`].
    pub async fn write(&self, sector: Sector, data: &[u8]) -> Result<(), CacheError> {
        self.engine.write(sector, data).await
    }

    /// Writes, and makes it durable before it is acknowledged ("force unit access").
    ///
    /// # Errors
    /// As [`Cache::write`] and [`Cache::flush`].
    pub async fn write_fua(&self, sector: Sector, data: &[u8]) -> Result<(), CacheError> {
        self.write(sector, data).await?;
        self.flush().await
    }

    /// Makes `length` bytes from `sector` on read as zeros, and gives up their space. Durable when
    /// it returns.
    ///
    /// # Errors
    /// The [`CacheError::errno`] is `EOPNOTSUPP` when the backing device cannot discard, or
    /// write-back is in strict order. It also fails
    ///
    /// - when the range is not within the volume, or the cache is being closed;
    /// - when a device fails, also where data of the range in a written-back segment cannot be
    ///   erased. Parts may have been discarded.
    pub async fn discard(&self, sector: Sector, length: u64) -> Result<(), CacheError> {
        self.engine.clear(sector, length, Space::GivenUp).await
    }

    /// As [`Cache::discard`], but the range keeps its space on the backing device.
    ///
    /// # Errors
    /// As [`Cache::discard`].
    pub async fn zero(&self, sector: Sector, length: u64) -> Result<(), CacheError> {
        self.engine.clear(sector, length, Space::Kept).await
    }

    /// Makes everything that was acknowledged before survive a power cut. In the modes `through`
    /// and `around`, it also survives the loss of the cache device then.
    ///
    /// # Errors
    /// - The cache device fails. Nothing is known then of what was not flushed before.
    /// - In the modes `through` and `around`, the backing device fails.
    /// - The cache is being closed.
    pub async fn flush(&self) -> Result<(), CacheError> {
        self.engine.flush().await
    }

    /// Writes everything back that is dirty at the time of the call. Dropped, it leaves the rest to
    /// the usual policy.
    ///
    /// # Errors
    /// When a device fails, and write-back goes on trying by itself; or when the cache is being
    /// closed.
    pub async fn drain(&self) -> Result<(), CacheError> {
        self.engine.drain().await
    }

    /// Takes no more requests, makes everything durable, ends the background tasks, and prepares
    /// the cache for the kernel module.
    ///
    /// # Errors
    /// When the cache device fails. The tasks are ended all the same. With
    /// [`CacheError::NotHandedOver`], nothing is lost.
    pub async fn close(&self) -> Result<(), CacheError> {
        self.engine.close().await
    }

    /// The tunables in force.
    pub fn tunables(&self) -> Tunables {
        self.engine.tunables.lock().clone()
    }

    /// Changes the tunables, from now on.
    pub fn set_tunables(&self, tunables: Tunables) {
        self.engine.state.lock().configure(&tunables);
        self.engine.backing.set_timeout(tunables.link_timeout());
        *self.engine.tunables.lock() = tunables;
        self.engine.state.wake(Waiter::Writeback);
        self.engine.state.wake(Waiter::Admission);
    }

    /// Pauses write-back. A drain is still served, and write-back goes on while the log is full and
    /// writes wait.
    pub fn pause(&self) {
        self.engine.state.lock().writeback.pause();
    }

    /// Waits until no batch is being written back. After a [`Cache::pause`], that is the end of the
    /// batch under way, if there is one, and of drains that were asked for.
    pub async fn batch_ended(&self) {
        let state = &self.engine.state;
        state.wait(Waiter::Request, |it| (!it.writeback.is_working()).then_some(())).await;
    }

    /// Whether write-back is paused.
    pub fn is_paused(&self) -> bool {
        self.engine.state.lock().writeback.is_paused()
    }

    /// Ends a [`Cache::pause`].
    pub fn resume(&self) {
        self.engine.state.lock().writeback.resume();
    }

    /// The state at this moment.
    pub fn status(&self) -> Status {
        self.engine.status()
    }

    /// Which cache it is, and how far it has come for good; `None` for one of the base format,
    /// which has no identity.
    pub fn seen(&self) -> Option<Seen> {
        self.engine.seen()
    }

    /// Lets all counters start anew.
    pub fn clear_statistics(&self) {
        self.engine.clear_statistics();
    }

    /// Notes how long a request took, as its front end saw it.
    pub fn took(&self, request: Timed, time: Duration) {
        self.engine.took(request, time);
    }
}
