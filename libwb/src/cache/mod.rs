//! The cache engine.
//!
//! Runtime-agnostic: it knows block devices and a [`Runtime`], but no file, thread or front end, so
//! that the daemon and the simulator run the same code. [`state`](self) is pure and lives under one
//! short lock; no I/O and no waiting happens while it is held. Requests are futures that their
//! callers poll; appending, flushing and write-back are background tasks.

mod access;
mod age;
mod ahead;
mod appender;
mod bypass;
mod commits;
mod direct;
mod discard;
mod fence;
mod handover;
mod index;
mod latency;
mod meter;
mod open;
mod policy;
mod purpose;
mod rate;
mod read;
mod staging;
mod state;
mod statistics;
mod status;
mod stuck;
mod table;
#[cfg(test)]
mod tests;
mod throttle;
mod tunables;
mod write;
mod writeback;

pub use access::{Access, Accesses};
pub use latency::{Histogram, Latencies, Timed};
pub use open::refuse_size;
pub use purpose::Purpose;
pub use rate::Pace;
pub use statistics::{Counters, Statistics};
pub use status::Status;
pub use stuck::StuckBlocks;
pub use tunables::{TunableError, TunableValue, Tunables, WriteMode, WritebackOrder};

use crate::device::{BlockDevice, Device, DeviceError, Operation};
use crate::format::{
    Reason, SECTOR_BYTES, SUPERBLOCK_REGION_BYTES, Sector, SegmentId, SuperblockExtension, to_u64,
};
use crate::log::LogError;
use crate::log::segment_writes::write_extension;
use crate::planted::{Bug, Planted};
use crate::runtime::Runtime;
use commits::Position;
use event_listener::Event;
use futures_util::lock::Mutex as AsyncMutex;
use latency::AtomicLatencies;
use meter::{Flushes, Metered};
use nix::errno::Errno;
use parking_lot::{Mutex, MutexGuard};
use state::State;
use statistics::{AtomicCounters, Baseline};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Writes are paced when less than this part of the log is free: one in so many.
pub const PACED_BELOW: u64 = throttle::TIGHT;
/// The log is written back, whatever the load, when less than this part of it is free: one in so
/// many.
pub const URGENT_BELOW: u64 = 8;

const _: () = assert!(SUPERBLOCK_REGION_BYTES.is_multiple_of(SECTOR_BYTES as u64));

/// Why a cache cannot do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CacheError {
    /// The log cannot be read or trusted.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The cache device failed earlier, so nothing more can be kept.
    #[error("writes are refused since the cache device failed: {0}")]
    Failed(DeviceError),
    /// The log is full.
    #[error("the log is full, and write-back does not get on: {0}")]
    Full(DeviceError),
    /// All that could be written back was.
    #[error("all else is written back, but {0}")]
    Stuck(StuckBlocks),
    /// The request does not lie within the volume.
    #[error("request of {length} bytes at sector {sector} is unaligned or outside the volume")]
    OutOfRange {
        /// Where it begins.
        sector: Sector,
        /// Its length in bytes.
        length: u64,
    },
    /// The backing device has more blocks than the index can name.
    #[error(
        "{backing}: too large for a backing device: {bytes} bytes, and at most {maximum} are \
         supported"
    )]
    TooLarge {
        /// The backing device.
        backing: String,
        /// Its size in bytes.
        bytes: u64,
        /// The largest size that would do, in bytes.
        maximum: u64,
    },
    /// The cache is being closed.
    #[error("the volume is being detached")]
    Closed,
    /// The cache was closed, but a segment that is written back could not be emptied.
    #[error(
        "all data is kept, but the kernel module must not get this cache yet, for it would take \
         old data for new: {0}. Attach and detach the volume once more, or use wbcheck --repair, \
         before it does"
    )]
    NotHandedOver(DeviceError),
}

impl CacheError {
    /// The error number that a front end reports.
    pub fn errno(&self) -> Errno {
        match self {
            CacheError::OutOfRange { .. } => Errno::EINVAL,
            CacheError::Closed => Errno::ESHUTDOWN,
            CacheError::Device(error) if error.operation == Operation::Discard => error.cause,
            CacheError::Log(_)
            | CacheError::Device(_)
            | CacheError::Failed(_)
            | CacheError::Full(_)
            | CacheError::Stuck(_)
            | CacheError::NotHandedOver(_) => Errno::EIO,
            CacheError::TooLarge { .. } => Errno::EFBIG,
        }
    }
}

/// A cached volume. Cheap to clone; all clones are the same volume.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

/// Who waits for what.
#[derive(Default)]
struct Events {
    /// Requests: something became durable, or written back, or written, or failed.
    changed: Event,
    /// The appender: a segment was sealed, a slot unpinned, or something became durable.
    appender: Event,
    /// The flusher: somebody wants durability, or something was written.
    flusher: Event,
    /// Write-back: there may be something to do.
    writeback: Event,
    /// Staging: enough blocks are there, or there may be room for them.
    staging: Event,
}

impl Events {
    fn wake_all(&self) {
        for event in [&self.changed, &self.appender, &self.flusher, &self.writeback, &self.staging]
        {
            event.notify(usize::MAX);
        }
    }
}

struct Inner {
    cache: Device,
    /// The backing device, as requests use it.
    backing: Metered,
    /// The same, as write-back uses it.
    writeback_device: Metered,
    backing_flushes: Flushes,
    runtime: Arc<dyn Runtime>,
    tunables: Mutex<Tunables>,
    state: Mutex<State>,
    events: Events,
    counters: AtomicCounters,
    latencies: AtomicLatencies,
    baseline: Baseline,
    /// Held while the cache device is flushed: of two flushes at once, one could take the other's
    /// error.
    flushing: AsyncMutex<()>,
    recovery_time: Duration,
    /// Bytes of the log that recovery read.
    recovery_bytes: u64,
    /// Held while segments are emptied for a discard.
    emptying: AsyncMutex<()>,
    /// The backing device has refused a discard.
    cannot_discard: AtomicBool,
    /// The same, of zeros for which it is to keep the space.
    cannot_zero: AtomicBool,
    /// What the cache device carries beyond the base format, if it does.
    extension: Option<SuperblockExtension>,
    /// The generation of its newest page that is durable.
    generation: AtomicU64,
    /// What segments carry of its UUID.
    digest: Option<u32>,
    planted: Planted,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Waits on an event until the state gives an answer.
    async fn wait<T>(&self, event: &Event, mut answer: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            if let Some(answer) = answer(&mut self.lock()) {
                return answer;
            }
            let listener = event.listen();
            if let Some(answer) = answer(&mut self.lock()) {
                return answer;
            }
            listener.await;
        }
    }

    /// Nothing is acknowledged any more that is not durable.
    fn fail(&self, error: DeviceError) {
        tracing::error!("the cache device failed, writes are refused from now on: {error}");
        self.lock().failure.get_or_insert(error);
        self.events.wake_all();
    }

    fn check_range(&self, sector: Sector, length: u64) -> Result<(), CacheError> {
        let aligned = length.is_multiple_of(to_u64(SECTOR_BYTES));
        let end = sector.0.checked_add(length / to_u64(SECTOR_BYTES));
        if aligned && end.is_some_and(|end| end <= self.backing.size() / to_u64(SECTOR_BYTES)) {
            return Ok(());
        }
        Err(CacheError::OutOfRange { sector, length })
    }
}

impl Cache {
    /// The volume's size in bytes: that of the backing device.
    pub fn size(&self) -> u64 {
        self.inner.backing.size()
    }

    /// The tunables in force.
    pub fn tunables(&self) -> Tunables {
        self.inner.tunables.lock().clone()
    }

    /// Changes the tunables, from now on.
    pub fn set_tunables(&self, tunables: Tunables) {
        self.inner.lock().configure(&tunables);
        *self.inner.tunables.lock() = tunables;
        self.inner.events.writeback.notify(usize::MAX);
        self.inner.events.staging.notify(usize::MAX);
    }

    /// Writes nothing back any more, but for a drain that is asked for, and when the log is full
    /// and writes wait.
    pub fn pause(&self) {
        self.inner.lock().paused = true;
    }

    /// Waits until no batch is being written back. After a [`Cache::pause`], that is the end of the
    /// one under way, if there is one, and of drains that were asked for.
    pub async fn batch_ended(&self) {
        self.inner
            .wait(&self.inner.events.changed, |state| (!state.rate.is_working()).then_some(()))
            .await;
    }

    /// Ends a [`Cache::pause`].
    pub fn resume(&self) {
        self.inner.lock().paused = false;
        self.inner.events.writeback.notify(usize::MAX);
    }

    /// Makes everything that was acknowledged before survive a power cut; in the modes `through`
    /// and `around`, the loss of the cache device, too.
    ///
    /// # Errors
    /// When the cache device fails; nothing is known then of what was not flushed before. In those
    /// modes, also when the backing device does. And when the cache is being closed.
    pub async fn flush(&self) -> Result<(), CacheError> {
        self.inner.counters.flushes.add(1);
        self.inner.flush_log().await?;
        // What still is in the log goes where the mode promises it to be.
        let leftover = {
            let state = self.inner.lock();
            state.bypass.mode != WriteMode::Back && state.dirty_blocks > 0
        };
        if leftover { self.drain().await } else { Ok(()) }
    }

    /// Writes everything back that is dirty at the time of the call. Dropped, it leaves the rest to
    /// the usual policy.
    ///
    /// # Errors
    /// When a device fails, and write-back goes on trying by itself; or when the cache is being
    /// closed.
    pub async fn drain(&self) -> Result<(), CacheError> {
        let target = self.inner.seal().await?;
        // Once the newest versions are durable, older ones need not be written.
        self.inner.wait_durable(Position::end_of(target)).await?;
        self.inner.drain_to(target).await
    }

    /// Takes no more requests, makes everything durable, ends the background tasks, and prepares
    /// the cache for the kernel module.
    ///
    /// # Errors
    /// When the cache device fails. The tasks are ended all the same. With
    /// [`CacheError::NotHandedOver`], nothing is lost.
    pub async fn close(&self) -> Result<(), CacheError> {
        self.inner.lock().closing = true;
        self.inner.events.wake_all();
        let flushed = self.inner.close_log().await;
        self.inner
            .wait(&self.inner.events.changed, |state| state.fenced.is_empty().then_some(()))
            .await;
        self.inner.lock().stopping = true;
        self.inner.events.wake_all();
        self.inner.wait(&self.inner.events.changed, |state| (state.tasks == 0).then_some(())).await;
        flushed?;
        let lost = self.inner.lock().stuck_blocks().map_or(0, |stuck| stuck.lost);
        if lost > 0 {
            tracing::warn!(
                "{lost} blocks are lost; the kernel module would not know, and take what is left \
                 of them for data"
            );
        }
        if let Err(error) = self.inner.retrying(|| self.inner.hand_over()).await {
            // It may have been closed in order before, at the same segment.
            let _ = self.inner.mark(None).await;
            return Err(CacheError::NotHandedOver(error));
        }
        let newest = self.inner.lock().durable;
        Ok(self.inner.mark(Some(newest)).await?)
    }
}

/// A drain that somebody waits for.
struct Drain<'a> {
    to: SegmentId,
    inner: &'a Inner,
}

impl<'a> Drain<'a> {
    fn to(to: SegmentId, inner: &'a Inner) -> Drain<'a> {
        inner.lock().drains.push(to);
        inner.events.writeback.notify(usize::MAX);
        Drain { to, inner }
    }
}

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        if let Some(nth) = state.drains.iter().position(|&to| to == self.to) {
            state.drains.swap_remove(nth);
        }
    }
}

impl Inner {
    /// Whether a flush makes a commit, or closes the segment. In strict order each batch of
    /// write-back ends with a flush, and the record of it names whole segments.
    fn commits(&self) -> bool {
        self.digest.is_some() && self.tunables.lock().writeback_order != WritebackOrder::Strict
    }

    /// Makes everything durable that was acknowledged before.
    async fn flush_log(&self) -> Result<(), CacheError> {
        let target =
            if self.commits() { self.want_commit()? } else { Position::end_of(self.seal().await?) };
        self.wait_durable(target).await
    }

    /// Writes back every segment up to one that is durable.
    async fn drain_to(&self, target: SegmentId) -> Result<(), CacheError> {
        let _drain = Drain::to(target, self);
        let stops = self.lock().stops;
        self.wait(&self.events.changed, |state| match &state.failure {
            Some(failure) => Some(Err(CacheError::Failed(failure.clone()))),
            None if state.written_back >= target => Some(match state.stuck_blocks() {
                None => Ok(()),
                Some(stuck) => Err(CacheError::Stuck(stuck)),
            }),
            None if state.stops > stops => {
                self.counters.last_writeback_error().map(|error| Err(CacheError::Device(error)))
            }
            None => state.stopping.then_some(Err(CacheError::Closed)),
        })
        .await
    }

    /// Asks for a commit of what is in RAM, if it is not durable. Returns what a flush waits for.
    fn want_commit(&self) -> Result<Position, CacheError> {
        let mut state = self.lock();
        if let Some(failure) = &state.failure {
            return Err(CacheError::Failed(failure.clone()));
        }
        if state.stopping {
            return Err(CacheError::Closed);
        }
        let target = state.newest_position();
        state.want(target);
        drop(state);
        self.events.appender.notify(usize::MAX);
        Ok(target)
    }

    /// Closes the last segment, and makes everything durable.
    async fn close_log(&self) -> Result<(), CacheError> {
        let last = self.seal().await?;
        self.wait_durable(Position::end_of(last)).await
    }

    /// Seals the open segment if it holds anything. Returns the segment that holds the newest data.
    async fn seal(&self) -> Result<SegmentId, CacheError> {
        let target = self.lock().newest;
        self.wait(&self.events.changed, |state| {
            if let Some(failure) = &state.failure {
                return Some(Err(CacheError::Failed(failure.clone())));
            }
            if state.stopping {
                return Some(Err(CacheError::Closed));
            }
            // Somebody else may have sealed it, and may have opened the next.
            let sealed = state.last_sealed() >= target || state.seal(reason(state)).is_ok();
            sealed.then(|| {
                state.end_epoch(target);
                Ok(())
            })
        })
        .await?;
        self.events.appender.notify(usize::MAX);
        Ok(target)
    }

    /// Notes in the superblock extension that the cache was closed in order, with this segment as
    /// its newest, or was not.
    async fn mark(&self, clean: Option<SegmentId>) -> Result<(), DeviceError> {
        let Some(extension) = &self.extension else { return Ok(()) };
        if extension.clean == clean {
            return Ok(());
        }
        let page = SuperblockExtension { clean, ..extension.next() };
        write_extension(&self.cache, &page).await?;
        self.cache.flush().await?;
        self.generation.store(page.generation, Ordering::Relaxed);
        Ok(())
    }

    async fn wait_durable(&self, target: Position) -> Result<(), CacheError> {
        self.lock().want(target);
        self.events.flusher.notify(usize::MAX);
        let early = self.planted.has(Bug::FlushAcknowledgedEarly);
        self.wait(&self.events.changed, |state| match &state.failure {
            Some(failure) => Some(Err(CacheError::Failed(failure.clone()))),
            None if state.durable_to >= target => Some(Ok(())),
            None if early && state.written_position() >= target => Some(Ok(())),
            None => state.stopping.then_some(Err(CacheError::Closed)),
        })
        .await
    }
}

/// Why a segment that somebody waits for is closed.
fn reason(state: &State) -> Reason {
    if state.closing { Reason::Close } else { Reason::Flush }
}
