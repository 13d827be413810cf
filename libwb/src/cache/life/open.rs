//! Opening a cache: recovery, and what must be put right before the first request.

use super::options::OpenOptions;
use super::replay::Replay;
use super::resume::{self, Opening};
use crate::cache::background::batch::BatchStop;
use crate::cache::background::second_look::Unread;
use crate::cache::busy_meter::BusyMeter;
use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::figures::accesses::CountedAccesses;
use crate::cache::figures::counters::AtomicCounters;
use crate::cache::figures::latency::AtomicLatencies;
use crate::cache::figures::statistics::Baseline;
use crate::cache::head::{Figures, Head, Owner};
use crate::cache::shared_flush::SharedFlush;
use crate::cache::state::State;
use crate::cache::state::index::MAX_BLOCKS;
use crate::cache::state::segment_log::{Item, SegmentLog};
use crate::cache::state::shared::SharedState;
use crate::cache::tunables::Tunables;
use crate::device::{BlockDevice, Device, DeviceError, Overlay, all};
use crate::format::{BLOCK_BYTES, SECTOR_BYTES, SegmentId, Slot, SuperblockExtension, to_u64};
use crate::log::Use;
use crate::log::live::{Totals, live_totals};
use crate::log::pairing::BackingFacts;
use crate::log::reach::Reach;
use crate::log::recovery::{Damage, Explanation, Recovery};
use crate::log::segment_writes::{close_segment, write_extension, write_filler};
use crate::rules::Rule;
use crate::runtime::Runtime;
use futures_util::lock::Mutex as AsyncMutex;
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Headers that are erased at the same time.
const ERASE_DEPTH: usize = 32;

/// Recovers the log of a cache device, and starts to serve the volume. Until the log has been found
/// sound and to fit the backing device, nothing is written to either.
pub(crate) async fn open(
    cache: Device,
    backing: Device,
    runtime: Arc<dyn Runtime>,
    options: OpenOptions,
) -> Result<Arc<Engine>, CacheError> {
    if options.read_only {
        let (cache, backing) = (Overlay::over(cache), Overlay::over(backing));
        let tunables = Tunables { read_cache_threshold: 0, ..Tunables::default() };
        let options = options.tunables(tunables);
        return open_on(Arc::new(cache), Arc::new(backing), runtime, options).await;
    }
    if options.until.is_some() {
        // What a daemon that was killed has left in its volatile cache must not be lost once the
        // backing device has it. The overlay has no flush.
        cache.flush().await?;
        return open_on(Arc::new(Overlay::over(cache)), backing, runtime, options).await;
    }
    open_on(cache, backing, runtime, options).await
}

/// What [`open`] would recover for [`OpenOptions::replay`]. Refuses what that would refuse, and
/// changes nothing.
pub(crate) async fn examine(
    cache: &Device,
    backing: &Device,
    known: Option<Reach>,
) -> Result<(Recovery, Totals), CacheError> {
    check_size(backing)?;
    let options = OpenOptions { wanted: Use::Read, ..OpenOptions::replay().knowing(known) };
    let replay = Replay::read(cache, backing, &options).await?;
    let live = live_totals(cache, replay.superblock.geometry, &replay.recovery, None).await?;
    Ok((replay.recovery, live))
}

async fn open_on(
    cache: Device,
    backing: Device,
    runtime: Arc<dyn Runtime>,
    options: OpenOptions,
) -> Result<Arc<Engine>, CacheError> {
    let started = runtime.now();
    backing.set_timeout(options.tunables.link_timeout());
    check_size(&backing)?;
    let replay = Replay::read(&cache, &backing, &options).await?;
    let Replay { superblock, recovery, index, leftovers, staged, bytes_read, ages, rest } = replay;
    let OpenOptions { until, read_only, head, tunables, rules, .. } = options;
    let geometry = superblock.geometry;
    let head = match head {
        Some(head) => head,
        None => Head::create().map_err(|e| CacheError::NoMemory(e.to_string()))?,
    };
    let written_back = recovery.live().next().map_or(recovery.point, |first| first.minus(1));
    let opening = Opening {
        cache: &cache,
        geometry,
        recovery: &recovery,
        written_back,
        sectors: BackingFacts::of(&backing).sectors,
        rules,
    };
    let owner = Owner::new(geometry, superblock.extension.as_ref());
    let resumed = resume::take(&head, owner, opening).await?;
    // A process that goes on with the head of another leaves that to the next attach.
    let grown = grown(superblock.extension.as_ref(), &backing).filter(|_| head.is_blank());
    let (begun, staged) = (resumed.begun(), staged.max(resumed.staged()));
    let point = recovery.point;
    let mut log = SegmentLog::new(geometry, index, written_back, point, ages, resumed, rules);
    log.note_begun(point, runtime.wall_clock());
    // The kernel module would stop at damaged segments.
    let damaged = recovery.damage.iter().filter(|it| it.explanation == Explanation::WrittenBack);
    let damaged = damaged.map(|it| it.expected).collect();
    let figures = Figures::of(head.clone());
    let accesses = CountedAccesses::of(&figures);
    let mut state = State::new(log, staged.max(written_back), damaged, accesses, rules);
    state.configure(&tunables);
    let failure = head.failure(cache.name());
    if let Some(error) = &failure {
        tracing::error!("the cache device failed earlier, and writes stay refused: {error}");
        state.lifecycle.fail(error.clone());
    }
    if until.is_some() {
        // The log does not go on: nothing is written back before a drain asks for it.
        state.writeback.pause();
    }
    let opened = runtime.now();
    let extension = superblock.extension.clone();
    let engine = Arc::new(Engine {
        cache,
        writeback_device: BusyMeter::new(backing.clone(), runtime.clone()),
        backing_flushes: SharedFlush::default(),
        backing: BusyMeter::new(backing, runtime.clone()),
        tunables: Mutex::new(tunables),
        state: SharedState::new(state, runtime.clone()),
        baseline: Baseline::of(&figures, &*runtime),
        runtime,
        counters: AtomicCounters::of(&figures),
        latencies: AtomicLatencies::of(&figures),
        flushing: AsyncMutex::default(),
        recovery_time: opened.saturating_sub(started),
        recovery_bytes: bytes_read,
        emptying: AsyncMutex::default(),
        cannot_discard: AtomicBool::new(false),
        cannot_zero: AtomicBool::new(false),
        digest: extension.as_ref().map(SuperblockExtension::digest),
        generation: extension.as_ref().map_or(0, |page| page.generation).into(),
        extension: grown.clone().or(extension),
        rules,
    });
    // On a device that has failed, nothing is changed any more.
    if failure.is_none() {
        let to_close = resume::end_to_close(&recovery, begun, rules);
        let settled = engine.settle(&recovery, written_back, leftovers, to_close).await;
        if let Err(CacheError::Device(error)) = &settled
            && error.device == *engine.cache.name()
            && !head.is_blank()
        {
            // Users rely on what an earlier process has acknowledged. If this was a flush, the next
            // one would not report what the device lost.
            engine.state.lock().log.note_failure(error);
        }
        settled?;
    }
    if let Some(page) = grown {
        write_extension(&engine.cache, &page).await?;
        engine.cache.flush().await?;
        engine.generation.store(page.generation, Ordering::Relaxed);
    }
    if head.is_blank() {
        head.bind(Owner::new(geometry, engine.extension.as_ref()));
    }
    if !read_only {
        let (dropped, damage) = (Vec::new(), Vec::new());
        let recovery = Recovery { dropped, damage, ..recovery };
        engine.start_tasks(Unread { superblock, recovery, next: rest });
    }
    Ok(engine)
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

impl Engine {
    /// Makes the devices agree with what recovery decided. A crash during this does not change the
    /// decision.
    async fn settle(
        &self,
        recovery: &Recovery,
        written_back: SegmentId,
        leftovers: Vec<Item>,
        to_close: Option<SegmentId>,
    ) -> Result<(), CacheError> {
        // A daemon that was killed may have left segments in the cache device's volatile cache, and
        // a discard in the backing device's. Reads show them, so the next flush must cover them.
        if self.rules.keep(Rule::FlushedAtOpen) {
            self.cache.flush().await?;
        }
        // If the link to it is down, the volume does not wait for it: the device itself flushes
        // before it answers anything.
        if self.backing.link().is_none_or(|link| link.down_for.is_none()) {
            self.backing.flush().await?;
        }
        match self.write_items(leftovers).await {
            Err(BatchStop::Device(error) | BatchStop::Stuck(error)) => return Err(error.into()),
            Ok(written) => {
                if let Some(failed) = written.failed.into_iter().next() {
                    return Err(failed.error.into());
                }
            }
            Err(BatchStop::Closing) => {}
        }
        // The record must stand before dropped segments are erased: without them, W no longer
        // follows from H.
        if written_back > recovery.record {
            self.write_record(written_back).await?;
        }
        // While dropped segments stand, the log does not end below the record, whatever is damaged.
        self.renew(&recovery.damage).await;
        // The log will reach the slots of dropped segments again. If the same data is written
        // there, even a torn write could then complete what is left of a dropped segment.
        let geometry = self.state.lock().log.geometry();
        let torn =
            recovery.damage.iter().filter(|damage| damage.explanation == Explanation::PowerCut);
        let dropped = recovery.dropped.iter().map(|&id| geometry.slot_of(id));
        let slots: Vec<Slot> = dropped.chain(torn.map(|damage| damage.slot)).collect();
        if !slots.is_empty() && self.rules.keep(Rule::DroppedErased) {
            // With a single slot, only a segment in it confirms the record. So it gets an empty
            // one.
            let filler = if geometry.slots() == 1 { recovery.point } else { SegmentId::NONE };
            self.erase(slots.into_iter().map(|slot| (slot, filler)).collect()).await?;
        }
        // The log continues after the newest segment. Its header may say that it was closed
        // only once nothing is left that looks like a later segment.
        if let Some(id) = to_close {
            close_segment(&self.cache, geometry, id).await?;
            self.cache.flush().await?;
        }
        Ok(())
    }

    /// Replaces damaged written-back segments with empty ones. Otherwise nothing would explain the
    /// damage once the log comes near it, and the kernel module would stop reading there. A failed
    /// write makes nothing worse.
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
        let geometry = self.state.lock().log.geometry();
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

    fn start_tasks(self: &Arc<Self>, unread: Unread) {
        self.cache.put_writes_first();
        self.state.lock().lifecycle.tasks_started(6);
        self.runtime.spawn(Box::pin(self.clone().appender()));
        self.runtime.spawn(Box::pin(self.clone().flusher()));
        self.runtime.spawn(Box::pin(self.clone().writeback()));
        self.runtime.spawn(Box::pin(self.clone().syncer()));
        self.runtime.spawn(Box::pin(self.clone().admitter()));
        self.runtime.spawn(Box::pin(self.clone().look_again(unread)));
    }
}
