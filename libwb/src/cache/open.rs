//! Opening a cache: recovery, and what must be put right before the first request.

use super::index::{Index, MAX_BLOCKS};
use super::latency::AtomicLatencies;
use super::meter::{Flushes, Metered};
use super::state::State;
use super::statistics::{AtomicCounters, Baseline};
use super::writeback::{Item, Stop};
use super::{AsyncMutex, Cache, CacheError, Events, Inner, Tunables};
use crate::device::{BlockDevice, Device, DeviceError, all};
use crate::format::{
    BLOCK_BYTES, DirtyBits, Geometry, Metablock, Place, SECTOR_BYTES, Sector, SegmentHeader, SegmentId, Slot,
    SuperblockExtension, to_u64,
};
use crate::log::LogError;
use crate::log::create::{write_extension, write_filler};
use crate::log::live::{Totals, live_totals, visit_headers};
use crate::log::recovery::{Explanation, Recovery, recover};
use crate::log::scan::{BackingFacts, Superblock, check_pairing, read_superblock, scan};
use crate::planted::{Bug, Planted};
use crate::runtime::Runtime;
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Headers that are erased at the same time.
const ERASE_DEPTH: usize = 32;

/// What the live segments of a log hold.
struct Replay {
    index: Index,
    /// Dirty sectors of older versions that the newest version of their block does not carry. They had been written
    /// back when the newer version was made, but the log does not say so.
    leftovers: Vec<Item>,
}

impl Cache {
    /// Recovers the log of a cache device and starts to serve the volume. Until the log has been found sound and
    /// to fit the backing device, nothing is written to either.
    ///
    /// # Errors
    /// When a device fails, the cache device holds no cache, its log is corrupt, or it does not fit the backing device.
    pub async fn open(
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        tunables: Tunables,
    ) -> Result<Cache, CacheError> {
        Cache::open_with(cache, backing, runtime, tunables, Planted::default()).await
    }

    /// As [`Cache::open`], with a bug.
    ///
    /// # Errors
    /// As [`Cache::open`].
    #[cfg(feature = "sim")]
    pub async fn open_planted(
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        tunables: Tunables,
        planted: Planted,
    ) -> Result<Cache, CacheError> {
        Cache::open_with(cache, backing, runtime, tunables, planted).await
    }

    async fn open_with(
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        tunables: Tunables,
        planted: Planted,
    ) -> Result<Cache, CacheError> {
        let started = runtime.now();
        check_size(&backing)?;
        let (superblock, recovery) = recover_log(&cache).await?;
        let geometry = superblock.geometry;
        let Replay { index, leftovers } = replay(&cache, &backing, &superblock, &recovery, planted).await?;
        let written_back = recovery.live().next().map_or(recovery.point, |first| first.minus(1));
        let grown = grown(superblock.extension.as_ref(), &backing);
        let mut state = State::new(geometry, index, written_back, recovery.point);
        state.planted = planted;
        state.dirty_blocks = to_u64(state.index.len());
        let opened = runtime.now();
        let recovery_time = opened.saturating_sub(started);
        let inner = Arc::new(Inner {
            cache,
            writeback_device: Metered::new(backing.clone(), runtime.clone()),
            backing_flushes: Flushes::default(),
            backing: Metered::new(backing, runtime.clone()),
            runtime,
            tunables: Mutex::new(tunables),
            state: Mutex::new(state),
            events: Events::default(),
            counters: AtomicCounters::default(),
            latencies: AtomicLatencies::default(),
            baseline: Baseline::at(opened),
            flushing: AsyncMutex::default(),
            recovery_time,
            emptying: AsyncMutex::default(),
            cannot_discard: AtomicBool::new(false),
            digest: superblock.extension.as_ref().map(SuperblockExtension::digest),
            extension: grown.clone().or(superblock.extension),
            planted,
        });
        inner.settle(&recovery, written_back, leftovers).await?;
        if let Some(page) = grown {
            write_extension(&inner.cache, &page).await?;
            inner.cache.flush().await?;
        }
        inner.start_tasks();
        Ok(Cache { inner })
    }
}

impl Cache {
    /// What [`Cache::open`] would recover. Refuses what that would refuse, and changes nothing.
    ///
    /// # Errors
    /// As [`Cache::open`].
    pub async fn examine(cache: &Device, backing: &Device) -> Result<(Recovery, Totals), CacheError> {
        check_size(backing)?;
        let (superblock, recovery) = recover_log(cache).await?;
        replay(cache, backing, &superblock, &recovery, Planted::default()).await?;
        let live = live_totals(cache, superblock.geometry, &recovery, None).await?;
        Ok((recovery, live))
    }
}

/// What to record when the backing device is larger than it was, so that it is noticed should it shrink again.
fn grown(extension: Option<&SuperblockExtension>, backing: &Device) -> Option<SuperblockExtension> {
    let extension = extension?;
    let (before, sectors) = (extension.backing_sectors, BackingFacts::of(backing).sectors);
    if before == 0 || sectors <= before {
        return None;
    }
    let bytes = |sectors: u64| sectors.saturating_mul(to_u64(SECTOR_BYTES));
    tracing::info!(
        "{} has grown from {} to {} bytes, and the volume with it",
        backing.name(),
        bytes(before),
        bytes(sectors)
    );
    let generation = extension.generation.wrapping_add(1);
    Some(SuperblockExtension { generation, backing_sectors: sectors, ..extension.clone() })
}

/// The index must be able to name every block of the volume.
fn check_size(backing: &Device) -> Result<(), CacheError> {
    let (bytes, maximum) = (backing.size(), MAX_BLOCKS * to_u64(BLOCK_BYTES));
    if bytes <= maximum {
        return Ok(());
    }
    Err(CacheError::TooLarge { backing: backing.name().to_string(), bytes, maximum })
}

async fn recover_log(cache: &Device) -> Result<(Superblock, Recovery), LogError> {
    let superblock = read_superblock(cache).await?;
    let recovery = recover(&superblock, &scan(cache, superblock.geometry, |_, _| {}).await);
    if recovery.corruption.is_empty() {
        return Ok((superblock, recovery));
    }
    Err(LogError::Corrupt { device: cache.name().to_string(), corruption: recovery.corruption })
}

async fn replay(
    cache: &Device,
    backing: &Device,
    superblock: &Superblock,
    recovery: &Recovery,
    planted: Planted,
) -> Result<Replay, LogError> {
    if let Some(extension) = &superblock.extension {
        check_pairing(cache, extension, &BackingFacts::of(backing))?;
    }
    let geometry = superblock.geometry;
    let mut replay =
        Replay { index: Index::new(geometry, superblock.extension.is_some()), leftovers: Vec::new() };
    let mut outside = Ok(());
    let above_gap = recovery.dropped.iter().copied().filter(|_| planted.has(Bug::GapSkipped));
    visit_headers(cache, geometry, recovery.live().chain(above_gap), |header| {
        if outside.is_ok() {
            outside = replay.apply(header, geometry, cache, backing);
        }
    })
    .await?;
    outside.map(|()| replay)
}

impl Replay {
    fn apply(
        &mut self,
        header: &SegmentHeader,
        geometry: Geometry,
        cache: &Device,
        backing: &Device,
    ) -> Result<(), LogError> {
        let slot = geometry.slot_of(header.id);
        for (entry, place) in header.metablocks.iter().zip((0..).map(|index| Place { slot, index })) {
            if entry.dirty.is_clean() {
                // Staged by read caching. What it holds may be older than the backing device by now: the kernel
                // module writes around a cache without a trace in the log.
                continue;
            }
            check_inside(cache, backing, header.id, entry)?;
            if let Some(old) = self.index.get(entry.block) {
                let sectors = old.dirty.without(entry.dirty);
                let id = geometry.id_in_slot(old.place.slot, header.id);
                if !sectors.is_clean() {
                    self.leftovers.push(Item { block: entry.block, id, place: old.place, sectors });
                }
            }
            self.index.insert(entry.block, entry.dirty, place);
            if let Some(crc) = entry.crc {
                self.index.set_crc(place, crc);
            }
        }
        Ok(())
    }
}

/// Every dirty sector of an entry must lie on the backing device.
fn check_inside(cache: &Device, backing: &Device, id: SegmentId, entry: &Metablock) -> Result<(), LogError> {
    let sectors = backing.size() / to_u64(SECTOR_BYTES);
    let first = entry.block.sector();
    let outside = |&(from, count): &(usize, usize)| first.0.saturating_add(to_u64(from + count)) > sectors;
    match DirtyBits::runs(entry.dirty).find(outside) {
        None => Ok(()),
        Some((from, _)) => Err(LogError::BeyondBacking {
            device: cache.name().to_string(),
            id,
            sector: Sector((first.0 + to_u64(from)).max(sectors)),
            backing: backing.name().to_string(),
            sectors,
        }),
    }
}

impl Inner {
    /// Makes the devices agree with what recovery decided. A crash in the midst of it changes nothing of that.
    async fn settle(
        &self,
        recovery: &Recovery,
        written_back: SegmentId,
        leftovers: Vec<Item>,
    ) -> Result<(), CacheError> {
        // A daemon that was killed may have left segments in the cache device's volatile cache, and a discard in the
        // backing device's. Reads show them, so the next flush must cover them.
        self.cache.flush().await?;
        self.backing.flush().await?;
        match self.write_items(leftovers).await {
            Err(Stop::Device(error)) => return Err(error.into()),
            Ok(()) | Err(Stop::Closing) => {}
        }
        // The record must stand before dropped segments are erased: without them, W no longer follows from H.
        if written_back > recovery.record {
            self.write_record(written_back).await?;
        }
        // The log will grow up to dropped segments again, and what is half there could be made whole by a write of the
        // same data.
        let geometry = self.lock().geometry;
        let torn = recovery.damage.iter().filter(|damage| damage.explanation == Explanation::PowerCut);
        let dropped = recovery.dropped.iter().map(|&id| geometry.slot_of(id));
        let slots: Vec<Slot> = dropped.chain(torn.map(|damage| damage.slot)).collect();
        if !slots.is_empty() && !self.planted.has(Bug::DroppedNotErased) {
            // With a single slot, only what it holds bears out the record.
            let filler = if geometry.slots() == 1 { recovery.point } else { SegmentId::NONE };
            self.erase(slots, filler).await?;
        }
        Ok(())
    }

    /// Erases the headers of slots, or puts an empty segment there. It is durable afterwards.
    async fn erase(&self, slots: Vec<Slot>, filler: SegmentId) -> Result<(), DeviceError> {
        let geometry = self.lock().geometry;
        let erase = |slot| write_filler(&self.cache, geometry, slot, filler, self.extension.as_ref());
        all(stream::iter(slots.into_iter().map(erase)).buffer_unordered(ERASE_DEPTH)).await?;
        self.cache.flush().await
    }

    fn start_tasks(self: &Arc<Self>) {
        self.lock().tasks = 4;
        self.runtime.spawn(Box::pin(self.clone().appender()));
        self.runtime.spawn(Box::pin(self.clone().flusher()));
        self.runtime.spawn(Box::pin(self.clone().writeback()));
        self.runtime.spawn(Box::pin(self.clone().syncer()));
    }
}
