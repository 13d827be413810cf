//! Opening a cache: recovery, and what must be put right before the first request.

use super::age::Ages;
use super::ahead::Later;
use super::index::{Index, MAX_BLOCKS};
use super::latency::AtomicLatencies;
use super::meter::{Flushes, Metered};
use super::purpose::{Purpose, Reading};
use super::state::State;
use super::statistics::{AtomicCounters, Baseline};
use super::writeback::{Item, Stop};
use super::{AsyncMutex, Cache, CacheError, Events, Inner, Tunables};
use crate::device::{BlockDevice, Device, DeviceError, Overlay, all};
use crate::format::{
    BLOCK_BYTES, Geometry, PLACES, Place, SECTOR_BYTES, Sector, SegmentId, Slot,
    SuperblockExtension, to_u64, to_usize,
};
use crate::log::bounds::first_outside;
use crate::log::live::{Beyond, Totals, live_totals};
use crate::log::pairing::{BackingFacts, check_pairing};
use crate::log::reach::Reach;
use crate::log::recovery::{Damage, Explanation, Recovery, recover};
use crate::log::scan::{SlotContent, scan, scan_headers, scan_trusting};
use crate::log::segment_writes::{close_segment, write_extension, write_filler};
use crate::log::superblock::{Superblock, read_superblock};
use crate::log::{LogError, LogErrorKind, Use, refuse_older};
use crate::planted::{Bug, Planted};
use crate::runtime::Runtime;
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Headers that are erased at the same time.
const ERASE_DEPTH: usize = 32;

/// A log as it was read, and what its segments hold.
struct Replay {
    superblock: Superblock,
    recovery: Recovery,
    index: Index,
    /// Dirty sectors of older versions that the newest version of their block does not carry. They
    /// had been written back when the newer version was made, but the log does not say so.
    leftovers: Vec<Item>,
    /// The newest live segment with a clean entry, of which the index knows nothing.
    staged: SegmentId,
    bytes_read: u64,
    ages: Ages,
}

impl Cache {
    /// Recovers the log of a cache device, and starts to serve the volume; as [`Purpose::serve`].
    /// Until the log has been found sound and to fit the backing device, nothing is written to
    /// either.
    ///
    /// # Errors
    /// When a device fails, the cache device holds no cache, its log is corrupt, or it does not fit
    /// the backing device.
    pub async fn open(
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        tunables: Tunables,
    ) -> Result<Cache, CacheError> {
        Cache::open_with(cache, backing, runtime, tunables, Purpose::serve()).await
    }

    /// As [`Cache::open`], for another purpose.
    ///
    /// # Errors
    /// As [`Cache::open`], and what the purpose refuses.
    pub async fn open_for(
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        tunables: Tunables,
        purpose: Purpose,
    ) -> Result<Cache, CacheError> {
        if purpose.read_only {
            let (cache, backing) = (Overlay::over(cache), Overlay::over(backing));
            let tunables = Tunables { read_cache_threshold: 0, ..Tunables::default() };
            return Cache::open_with(
                Arc::new(cache),
                Arc::new(backing),
                runtime,
                tunables,
                purpose,
            )
            .await;
        }
        if purpose.until.is_some() {
            // What a daemon that was killed has left in its volatile cache must not be lost once
            // the backing device has it. The overlay has no flush.
            cache.flush().await?;
            let cache = Arc::new(Overlay::over(cache));
            return Cache::open_with(cache, backing, runtime, tunables, purpose).await;
        }
        Cache::open_with(cache, backing, runtime, tunables, purpose).await
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
        let purpose = Purpose::serve().with(planted);
        Cache::open_with(cache, backing, runtime, tunables, purpose).await
    }

    async fn open_with(
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        tunables: Tunables,
        purpose: Purpose,
    ) -> Result<Cache, CacheError> {
        let planted = purpose.planted;
        let started = runtime.now();
        check_size(&backing)?;
        let replay = Replay::read(&cache, &backing, purpose).await?;
        let Replay { superblock, recovery, index, leftovers, staged, bytes_read, ages } = replay;
        let geometry = superblock.geometry;
        let written_back = recovery.live().next().map_or(recovery.point, |first| first.minus(1));
        let grown = grown(superblock.extension.as_ref(), &backing);
        let mut state = State::new(geometry, index, written_back, recovery.point);
        state.planted = planted;
        state.ages = ages;
        state.dirty_blocks = to_u64(state.index.len());
        state.configure(&tunables);
        // Of a log that does not go on, nothing is written back before somebody asks for it.
        state.paused = purpose.until.is_some();
        state.forgotten = staged.max(written_back);
        state.unindexed = state.forgotten;
        // The kernel module would stop at them.
        let damaged =
            recovery.damage.iter().filter(|it| it.explanation == Explanation::WrittenBack);
        state.in_doubt = damaged.map(|it| it.expected).collect();
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
            recovery_bytes: bytes_read,
            emptying: AsyncMutex::default(),
            cannot_discard: AtomicBool::new(false),
            cannot_zero: AtomicBool::new(false),
            digest: superblock.extension.as_ref().map(SuperblockExtension::digest),
            generation: superblock.extension.as_ref().map_or(0, |page| page.generation).into(),
            extension: grown.clone().or(superblock.extension),
            planted,
        });
        inner.settle(&recovery, written_back, leftovers).await?;
        if let Some(page) = grown {
            write_extension(&inner.cache, &page).await?;
            inner.cache.flush().await?;
            inner.generation.store(page.generation, Ordering::Relaxed);
        }
        if !purpose.read_only {
            inner.start_tasks();
        }
        Ok(Cache { inner })
    }
}

impl Cache {
    /// What [`Cache::open_for`] would recover for [`Purpose::replay`]. Refuses what that would
    /// refuse, and changes nothing.
    ///
    /// # Errors
    /// As [`Cache::open_for`].
    pub async fn examine(
        cache: &Device,
        backing: &Device,
        known: Option<Reach>,
    ) -> Result<(Recovery, Totals), CacheError> {
        check_size(backing)?;
        let purpose = Purpose { wanted: Use::Read, ..Purpose::replay().knowing(known) };
        let replay = Replay::read(cache, backing, purpose).await?;
        let live = live_totals(cache, replay.superblock.geometry, &replay.recovery, None).await?;
        Ok((replay.recovery, live))
    }
}

fn replay_until(
    cache: &Device,
    recovery: Recovery,
    until: SegmentId,
) -> Result<Recovery, LogError> {
    let points = recovery.points();
    if points.contains(&until) {
        return Ok(recovery.until(until));
    }
    let (first, last) = points.into_inner();
    Err(LogError::new(cache, LogErrorKind::NoSuchPoint { until, first, last }))
}

/// What to record when the backing device is larger than it was, so that it is noticed should it
/// shrink again.
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
    Some(SuperblockExtension { backing_sectors: sectors, ..extension.next() })
}

/// The index must be able to name every block of the volume.
fn check_size(backing: &Device) -> Result<(), CacheError> {
    refuse_size(backing.name(), backing.size())
}

/// Refuses a size in bytes that a backing device of this name cannot have.
///
/// # Errors
/// When it is too large.
pub fn refuse_size(backing: &str, bytes: u64) -> Result<(), CacheError> {
    let maximum = MAX_BLOCKS * to_u64(BLOCK_BYTES);
    if bytes <= maximum {
        return Ok(());
    }
    Err(CacheError::TooLarge { backing: backing.into(), bytes, maximum })
}

/// What the slots hold, live or not, while they are read.
struct Slots<'a> {
    geometry: Geometry,
    backing: &'a Device,
    index: Index,
    /// Where the first entry in a slot lies that does not fit on the backing device.
    outside: HashMap<Slot, Sector>,
    /// Slots with clean entries.
    staged: HashSet<Slot>,
    bytes_read: u64,
    ages: Ages,
}

impl Slots<'_> {
    fn backing_sectors(&self) -> u64 {
        BackingFacts::of(self.backing).sectors
    }

    /// Takes in a slot. What was taken in of it before counts no more.
    fn visit(&mut self, slot: Slot, content: &SlotContent) {
        self.bytes_read += content.bytes_read;
        self.index.forget(slot);
        self.outside.remove(&slot);
        self.staged.remove(&slot);
        let Some(header) = content.header.as_ref().filter(|_| content.state.valid_id().is_some())
        else {
            return;
        };
        if let Some(extension) = &header.extension {
            self.ages.set(slot, Duration::from_millis(extension.time));
        }
        for (entry, place) in header.metablocks.iter().zip((0..).map(|index| Place { slot, index }))
        {
            // Staged by read caching. What it holds may be older than the backing device by now:
            // the kernel module writes around a cache without a trace in the log.
            if entry.dirty.is_clean() {
                self.staged.insert(slot);
                continue;
            }
            if let Some(sector) = first_outside(entry.block, entry.dirty, self.backing_sectors()) {
                self.outside.entry(slot).or_insert(sector);
                continue;
            }
            self.index.hold(entry.block, entry.dirty, place);
            if let Some(crc) = entry.crc {
                self.index.set_crc(place, crc);
            }
        }
    }

    /// Applies what a live segment holds.
    fn apply(&mut self, id: SegmentId, leftovers: &mut Vec<Item>) {
        let slot = self.geometry.slot_of(id);
        let places = || (0..PLACES).map(|index| Place { slot, index });
        places()
            .filter_map(|place| self.index.at(place))
            .for_each(|(block, _)| self.index.fetch(block));
        for place in places() {
            let Some((block, dirty)) = self.index.at(place) else { continue };
            if let Some(old) = self.index.link(block, place) {
                let sectors = old.dirty.without(dirty);
                if !sectors.is_clean() {
                    leftovers.push(Item { block, place: old.place, sectors, discarded: false });
                }
            }
        }
    }
}

impl Replay {
    async fn read(
        cache: &Device,
        backing: &Device,
        Purpose { reading, until, wanted, known, mixes, planted, .. }: Purpose,
    ) -> Result<Replay, LogError> {
        let superblock = read_superblock(cache, wanted).await?;
        let geometry = superblock.geometry;
        let mut slots = Slots {
            geometry,
            backing,
            index: Index::new(geometry, superblock.extension.is_some()),
            outside: HashMap::new(),
            staged: HashSet::new(),
            bytes_read: 0,
            ages: Ages::new(geometry.slots()),
        };
        let visit = |slot, content: &_| slots.visit(slot, content);
        let states = match (reading, planted.has(Bug::UnclaimedTrusted)) {
            (Reading::Whole, _) => scan(cache, geometry, visit).await,
            (Reading::Headers, false) => scan_trusting(cache, &superblock, visit).await,
            (Reading::Headers, true) => scan_headers(cache, geometry, visit).await,
        };
        let recovery = recover(&superblock, &states).refuse_corrupt(cache)?;
        known.map_or(Ok(()), |known| refuse_older(cache, recovery.reach(), known))?;
        let later = until.map(|until| Later::of(cache, backing, geometry, &recovery, until));
        let recovery = match until {
            Some(until) => replay_until(cache, recovery, until)?,
            None => recovery,
        };
        if let Some(extension) = &superblock.extension {
            check_pairing(cache, extension, &BackingFacts::of(backing))?;
        }
        let replay = slots.replay(cache, &superblock, recovery, planted)?;
        if let Some(later) = later.filter(|_| !mixes) {
            later.refuse_mixture(&replay.index).await?;
        }
        Ok(replay)
    }
}

impl Slots<'_> {
    fn replay(
        mut self,
        cache: &Device,
        superblock: &Superblock,
        recovery: Recovery,
        planted: Planted,
    ) -> Result<Replay, LogError> {
        let above =
            planted.has(Bug::GapSkipped) || planted.has(Bug::CutShortIgnored) && recovery.is_open;
        let above = recovery.dropped.iter().copied().filter(|_| above);
        let live: Vec<SegmentId> = recovery.live().chain(above).collect();
        let mut holds_live = vec![false; self.geometry.all_slots().len()];
        for &id in &live {
            let slot = self.geometry.slot_of(id);
            holds_live[to_usize(slot.0.into())] = true;
            if let Some(&sector) = self.outside.get(&slot) {
                let backing = BackingFacts::of(self.backing);
                return Err(backing.refuse_beyond(cache, Beyond { id, sector }));
            }
        }
        for (slot, _) in self.geometry.all_slots().zip(holds_live).filter(|(_, live)| !live) {
            self.index.forget(slot);
        }
        let mut leftovers = Vec::new();
        let mut staged = SegmentId::NONE;
        for id in live {
            self.apply(id, &mut leftovers);
            if self.staged.contains(&self.geometry.slot_of(id)) {
                staged = id;
            }
        }
        let Slots { index, bytes_read, ages, .. } = self;
        let superblock = superblock.clone();
        Ok(Replay { superblock, recovery, index, leftovers, staged, bytes_read, ages })
    }
}

impl Inner {
    /// Makes the devices agree with what recovery decided. A crash in the midst of it changes
    /// nothing of that.
    async fn settle(
        &self,
        recovery: &Recovery,
        written_back: SegmentId,
        leftovers: Vec<Item>,
    ) -> Result<(), CacheError> {
        // A daemon that was killed may have left segments in the cache device's volatile cache, and
        // a discard in the backing device's. Reads show them, so the next flush must cover them.
        self.cache.flush().await?;
        self.backing.flush().await?;
        match self.write_items(leftovers).await {
            Err(Stop::Device(error) | Stop::Stuck(error)) => return Err(error.into()),
            Ok(written) => {
                if let Some(failed) = written.failed.into_iter().next() {
                    return Err(failed.error.into());
                }
            }
            Err(Stop::Closing) => {}
        }
        // The record must stand before dropped segments are erased: without them, W no longer
        // follows from H.
        if written_back > recovery.record {
            self.write_record(written_back).await?;
        }
        // While dropped segments stand, the log does not end below the record, whatever is damaged.
        self.renew(&recovery.damage).await;
        // The log will grow up to dropped segments again, and what is half there could be made
        // whole by a write of the same data.
        let geometry = self.lock().geometry;
        let torn =
            recovery.damage.iter().filter(|damage| damage.explanation == Explanation::PowerCut);
        let dropped = recovery.dropped.iter().map(|&id| geometry.slot_of(id));
        let slots: Vec<Slot> = dropped.chain(torn.map(|damage| damage.slot)).collect();
        if !slots.is_empty() && !self.planted.has(Bug::DroppedNotErased) {
            // With a single slot, only what it holds bears out the record.
            let filler = if geometry.slots() == 1 { recovery.point } else { SegmentId::NONE };
            self.erase(slots.into_iter().map(|slot| (slot, filler)).collect()).await?;
        }
        // The log goes on after the newest segment. Only when nothing is left that could be taken
        // for what followed it, may its header say that it was closed.
        if let Some(id) = recovery.open_end().filter(|_| !self.planted.has(Bug::OpenEndLeft)) {
            close_segment(&self.cache, geometry, id).await?;
            self.cache.flush().await?;
        }
        Ok(())
    }

    /// Makes what is damaged and written back sound. It has no explanation any more once the log
    /// has come near it, and the kernel module would read no further than there. What cannot be
    /// written is no worse than it was.
    async fn renew(&self, damage: &[Damage]) {
        let damaged = damage.iter().filter(|damage| damage.explanation == Explanation::WrittenBack);
        let slots: Vec<_> = damaged.map(|damage| (damage.slot, damage.expected)).collect();
        if self.extension.is_some()
            && !slots.is_empty()
            && let Err(error) = self.erase(slots).await
        {
            tracing::warn!("a damaged segment that is written back is left as it is: {error}");
        }
    }

    /// Erases the headers of slots, or puts empty segments with these ids there. It is durable
    /// afterwards.
    async fn erase(&self, slots: Vec<(Slot, SegmentId)>) -> Result<(), DeviceError> {
        let geometry = self.lock().geometry;
        let erase = |(slot, id)| {
            write_filler(
                &self.cache,
                geometry,
                slot,
                (id, SegmentId::NONE),
                self.extension.as_ref(),
            )
        };
        all(stream::iter(slots.into_iter().map(erase)).buffer_unordered(ERASE_DEPTH)).await?;
        self.cache.flush().await
    }

    fn start_tasks(self: &Arc<Self>) {
        self.lock().tasks = 5;
        self.runtime.spawn(Box::pin(self.clone().appender()));
        self.runtime.spawn(Box::pin(self.clone().flusher()));
        self.runtime.spawn(Box::pin(self.clone().writeback()));
        self.runtime.spawn(Box::pin(self.clone().syncer()));
        self.runtime.spawn(Box::pin(self.clone().stager()));
    }
}
