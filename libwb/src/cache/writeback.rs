//! The way back to the disk: oldest segments first, many at a time, sorted and merged.

use super::Inner;
use super::state::State;
use super::stuck::{Failed, MOST_ALONE, MOST_STUCK, Passage};
use crate::device::{BlockDevice, DeviceError, IoBuf};
use crate::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, PLACES, Place, Record, SECTOR_BYTES, SECTORS_PER_BLOCK,
    Sector, SegmentId, to_u64, to_usize,
};
use crate::log::segment_writes::write_record;
use crate::planted::Bug;
use futures_lite::future::yield_now;
use futures_util::StreamExt;
use futures_util::stream::{self, FuturesUnordered};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The longest single write to the backing device, in sectors.
const MAX_RUN_SECTORS: u64 = 2048;
/// Writes to the backing device at a time: as many as a disk's queue holds, so that it can choose
/// the next that comes under its arm. Each takes its data twice, as read and as written, so that
/// write-back takes 64 MiB at most, and besides an [`Item`] for each block of a batch, 24 bytes,
/// and as much again while they are sorted: 25 MB for 4096 segments.
const DEPTH: usize = 32;
/// Reads of the cache device at a time for each of them: more would keep those of requests and
/// commits waiting.
const READS: usize = 8;
/// Segments of a batch that are looked at before other tasks run.
const SEGMENTS_AT_ONCE: u64 = 32;

/// A version of a block, or some sectors of it, to be written back.
#[derive(Clone, Copy)]
pub(super) struct Item {
    pub(super) block: BlockNo,
    pub(super) place: Place,
    pub(super) sectors: DirtyBits,
    /// These are the zeros of a discard.
    pub(super) discarded: bool,
}

/// Why a batch was not written back, or only in part.
pub(super) enum Stop {
    /// A device failed, or some blocks cannot be written back and must not be moved.
    Device(DeviceError),
    /// Some blocks cannot be written back, and will be moved.
    Stuck(DeviceError),
    /// The cache is being closed.
    Closing,
}

/// What became of a batch.
#[derive(Default)]
pub(super) struct Written {
    /// The blocks that could not be written, sorted.
    pub(super) failed: Vec<Failed>,
    /// Whether any could.
    any: bool,
}

/// Why a write of a batch failed.
enum Fault {
    Closing,
    Device {
        error: DeviceError,
        /// What is to be written cannot be read.
        lost: bool,
    },
}

impl From<DeviceError> for Stop {
    fn from(error: DeviceError) -> Stop {
        Stop::Device(error)
    }
}

impl Inner {
    /// Writes back every segment up to `last`, and then lets their slots be reused. Where some
    /// blocks cannot be written back, that goes for the segments before them.
    pub(super) async fn write_back(&self, last: SegmentId) -> Result<(), Stop> {
        let started = self.runtime.now();
        let first = {
            let mut state = self.lock();
            state.prune_stuck();
            state.written_back.next()
        };
        let mut items: Vec<Item> = Vec::new();
        let mut passed_over = Vec::new();
        for id in (first.0..=last.0).map(SegmentId) {
            self.lock().sort_out(id, last, started, &mut items, &mut passed_over);
            self.let_others(id).await;
        }
        self.lock().throttle.begin(started, to_u64(items.len()));
        let written = async {
            let written = self.write_items(items).await?;
            self.pass(last, written, passed_over).await
        };
        let written = written.await;
        self.lock()
            .throttle
            .end(self.runtime.now(), written.as_ref().is_ok_and(|(_, stop)| stop.is_none()));
        let (up_to, stop) = written?;
        for id in (first.0..=up_to.0).map(SegmentId) {
            self.lock().segment_written_back(id);
            self.let_others(id).await;
        }
        self.events.changed.notify(usize::MAX);
        self.events.staging.notify(usize::MAX);
        stop.map_or(Ok(()), Err)
    }

    /// What was not written back is moved where that may be. Records how far the log is written
    /// back then, and says that, and why no further, or why to wait before the next batch: when
    /// this one has written nothing.
    async fn pass(
        &self,
        last: SegmentId,
        Written { failed, any: wrote }: Written,
        passed_over: Vec<(SegmentId, BlockNo)>,
    ) -> Result<(SegmentId, Option<Stop>), Stop> {
        if let Some(failed) = failed.first().filter(|_| self.reaches_further_than(last)) {
            return Err(Stop::Device(failed.error.clone()));
        }
        let any = !failed.is_empty() || !passed_over.is_empty();
        let (is_strict, has_crcs) = (self.is_strict(&self.tunables.lock()), self.digest.is_some());
        let movable = |lost: bool| !is_strict && (has_crcs || !lost);
        let passage = self.lock().passage(last, failed, passed_over, movable, self.runtime.now());
        let Passage { mut up_to, moves, mut obstacle } = passage;
        if self.planted.has(Bug::StuckLeftBehind) {
            (up_to, obstacle) = (last, None);
        } else if any {
            let moved = self.move_stuck(&moves, up_to).await;
            let (done, why) = moved.map_err(|_| Stop::Closing)?;
            if let Some((id, _)) = moves.get(done) {
                up_to = id.minus(1);
                obstacle = why.map(|error| (error, false)).or(obstacle);
            }
            // What was moved, and newer versions that stand for what was not: all that the record
            // relies on.
            if !self.planted.has(Bug::MovedNotDurable) {
                self.flush_log().await.map_err(|_| Stop::Closing)?;
            }
        }
        if any && !wrote {
            // With nothing but such blocks in the log, they would be moved on and on.
            let stuck = self.lock().stuck_blocks();
            obstacle = obstacle.or(stuck.map(|stuck| (stuck.error, true)));
        }
        if up_to > self.lock().written_back {
            self.write_record(up_to).await?;
        }
        let stop = obstacle.map(|(error, may_be_moved)| match may_be_moved {
            true => Stop::Stuck(error),
            false => Stop::Device(error),
        });
        Ok((up_to, stop))
    }

    /// Lets other tasks run now and then: a batch may be large.
    async fn let_others(&self, id: SegmentId) {
        if id.0.is_multiple_of(SEGMENTS_AT_ONCE) {
            yield_now().await;
        }
    }

    /// Makes it durable that every segment up to `id` is written back.
    pub(super) async fn write_record(&self, id: SegmentId) -> Result<(), DeviceError> {
        self.lock().record_in_doubt = true;
        write_record(&self.cache, Record { id, digest: self.digest }).await?;
        self.counters.cache_write_bytes.add(to_u64(BLOCK_BYTES));
        if self.planted.has(Bug::RecordNotDurable) {
            return Ok(());
        }
        self.flush_cache_device().await?;
        self.lock().record_in_doubt = false;
        Ok(())
    }

    /// Writes sectors from the cache device to the backing device, the newest version of each, and
    /// flushes it. Of versions of the same block, the older one comes first.
    ///
    /// # Errors
    /// When too many cannot be for it to be a matter of some blocks, or the flush fails.
    pub(super) async fn write_items(&self, mut items: Vec<Item>) -> Result<Written, Stop> {
        if items.is_empty() {
            return Ok(Written::default());
        }
        let before = self.backing_flushes.failures();
        // Stable, so that versions of the same block stay in their order.
        items.sort_by_key(|item| item.block);
        let unit = u64::from(self.writeback_device.block_size());
        let mut runs = runs(pieces(&items), unit, MAX_RUN_SECTORS);
        let mut writes = FuturesUnordered::new();
        let (mut written, mut suspects, mut closing) = (0, Vec::new(), false);
        loop {
            // A device that fails altogether is not to be tried with all of a batch.
            while !closing
                && (suspects.len() < DEPTH || suspects.len() <= written)
                && writes.len() < DEPTH
                && let Some(run) = runs.next()
            {
                writes
                    .push(async move { self.write_run(&run).await.map_err(|fault| (run, fault)) });
            }
            // Even after a failure, what was started is waited for: it must not come out over a
            // later write.
            match writes.next().await {
                Some(Ok(())) => written += 1,
                Some(Err((_, Fault::Closing))) => closing = true,
                Some(Err((run, Fault::Device { error, .. }))) => suspects.push((run, error)),
                None => break,
            }
        }
        drop(writes);
        if closing {
            return Err(Stop::Closing);
        }
        if let Some((_, error)) = suspects.first().filter(|_| runs.next().is_some()) {
            return Err(Stop::Device(error.clone()));
        }
        let failed = self.write_one_by_one(suspects, unit, written).await?;
        let is_written =
            |item: &&Item| failed.binary_search_by_key(&item.block, |it| it.block).is_err();
        let any = items.iter().any(|item| is_written(&item));
        self.lock().not_stuck(items.iter().filter(is_written).map(|item| item.block));
        if !self.planted.has(Bug::BackingNotFlushed) {
            self.backing_flushes.flush(&self.writeback_device, before).await?;
        }
        Ok(Written { failed, any })
    }

    /// Tries each block of some writes that failed by itself; so many did not. Returns those that
    /// fail again, sorted.
    async fn write_one_by_one(
        &self,
        suspects: Vec<(Run, DeviceError)>,
        unit: u64,
        mut written: usize,
    ) -> Result<Vec<Failed>, Stop> {
        let mut failed: Vec<Failed> = Vec::new();
        for (run, _) in suspects {
            for single in runs(run.pieces.into_iter(), unit, 1) {
                let Err(fault) = self.write_run(&single).await else {
                    written += 1;
                    continue;
                };
                let Fault::Device { error, lost } = fault else { return Err(Stop::Closing) };
                if failed.len() >= if written > 0 { MOST_STUCK } else { MOST_ALONE } {
                    return Err(Stop::Device(error));
                }
                for pieces in single.pieces.chunk_by(|a, b| a.sector.block() == b.sector.block()) {
                    failed.push(Failed {
                        block: pieces[0].sector.block(),
                        error: error.clone(),
                        lost,
                    });
                }
            }
        }
        failed.sort_by_key(|failed| failed.block);
        // Parts of one block may have failed one by one.
        failed.dedup_by(|next, first| {
            let is_same = next.block == first.block;
            first.lost |= is_same && next.lost;
            is_same
        });
        Ok(failed)
    }

    async fn write_run(&self, run: &Run) -> Result<(), Fault> {
        if self.lock().stopping {
            return Err(Fault::Closing);
        }
        if run.pieces.iter().all(|piece| piece.discarded) && self.give_up(run).await {
            let blocks = (run.end.0 - run.start.0) / SECTORS_PER_BLOCK;
            self.lock().throttle.progressed(blocks, self.runtime.now());
            return Ok(());
        }
        let refused = |error| Fault::Device { error, lost: false };
        let offset = run.start.bytes();
        let length = to_usize((run.end.0 - run.start.0) * to_u64(SECTOR_BYTES));
        let mut buf = IoBuf::zeroed(length);
        if run.has_gaps {
            buf = self.writeback_device.read(offset, buf).await.map_err(refused)?;
        }
        let read = |load: Load| async move {
            let data = IoBuf::zeroed(BLOCK_BYTES * load.blocks);
            let read = self.read_places(load.place, data).await;
            let data = read.inspect_err(|_| self.lock().look_for_newer(&load))?;
            Ok::<_, DeviceError>((load, data))
        };
        let mut reads =
            stream::iter(loads(&run.pieces).into_iter().map(read)).buffer_unordered(READS);
        while let Some(read) = reads.next().await {
            let (load, data) = read.map_err(|error| Fault::Device { error, lost: true })?;
            let to = to_usize((load.sector.0 - run.start.0) * to_u64(SECTOR_BYTES));
            let from = load.first * SECTOR_BYTES;
            let bytes = load.sectors * SECTOR_BYTES;
            buf[to..to + bytes].copy_from_slice(&data[from..from + bytes]);
        }
        drop(reads);
        self.writeback_device.write(offset, buf.into()).await.map_err(refused)?;
        self.counters.written_back_bytes.add(to_u64(length));
        let (blocks, now) = (to_u64(length.div_ceil(BLOCK_BYTES)), self.runtime.now());
        let mut state = self.lock();
        state.throttle.progressed(blocks, now);
        state.rate.wrote(to_u64(length), blocks, now);
        Ok(())
    }
}

impl Inner {
    /// Discards what a run of zeros covers, so that it takes no space. Where that cannot be done,
    /// the zeros are written.
    async fn give_up(&self, run: &Run) -> bool {
        let length = (run.end.0 - run.start.0) * to_u64(SECTOR_BYTES);
        let can = !run.has_gaps && !self.cannot_discard.load(Ordering::Relaxed);
        can && self.writeback_device.discard(run.start.bytes(), length).await.is_ok()
    }
}

impl State {
    /// What of a segment a batch that ends with `last` is to write back, and what it passes over.
    fn sort_out(
        &self,
        id: SegmentId,
        last: SegmentId,
        now: Duration,
        items: &mut Vec<Item>,
        passed_over: &mut Vec<(SegmentId, BlockNo)>,
    ) {
        for item in self.items_of(id, last) {
            match self.is_passed_over(item.block, now) {
                true => passed_over.push((id, item.block)),
                false => items.push(item),
            }
        }
    }

    /// What of a segment must be written back in a batch that ends with `last`.
    fn items_of(&self, id: SegmentId, last: SegmentId) -> Vec<Item> {
        let slot = self.geometry.slot_of(id);
        let item = |index| {
            let place = Place { slot, index };
            let (block, sectors) = self.index.at(place).filter(|(_, dirty)| !dirty.is_clean())?;
            let newest = self.index.get(block)?;
            if newest.place == place {
                let discarded = self.index.is_discarded(place) && sectors.is_all();
                return Some(Item { block, place, sectors, discarded });
            }
            // A newer version in this batch carries all that this one does. One beyond it must not
            // stand for it: should the cache device be lost before its turn, or a power cut undo
            // it, the backing device would hold neither.
            let newer = self.id_of(newest.place.slot);
            let superseded = newer <= last
                || self.planted.has(Bug::SupersededLeftOut)
                || self.planted.has(Bug::DurableSupersedes) && newer <= self.durable;
            // What the newest version lacks was written back before that was made, though the
            // record may not say so. Something newer than this one may have been.
            let sectors = sectors.intersection(newest.dirty);
            (!sectors.is_clean() && !superseded).then_some(Item {
                block,
                place,
                sectors,
                discarded: false,
            })
        };
        (0..PLACES).filter_map(item).collect()
    }

    /// Notes the newest versions of blocks that cannot be read where they are to be written back
    /// from.
    fn look_for_newer(&mut self, unreadable: &Load) {
        let Load { place: first, blocks, .. } = *unreadable;
        for place in (first.index..).take(blocks).map(|index| Place { index, ..first }) {
            let newest = self.index.at(place).and_then(|(block, _)| self.index.get(block));
            if let Some(newest) = newest.filter(|newest| newest.place != place) {
                self.replaced_by = self.replaced_by.max(self.id_of(newest.place.slot));
            }
        }
    }
}

/// Neighbouring sectors whose newest version lies in one block of the cache device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    sector: Sector,
    sectors: usize,
    place: Place,
    /// The first sector within the block.
    first: usize,
    /// The whole block is the zeros of a discard.
    discarded: bool,
}

/// Chooses the newest version of each sector from items that are sorted by block, older versions
/// first.
fn pieces(items: &[Item]) -> impl Iterator<Item = Piece> + '_ {
    items.chunk_by(|a, b| a.block == b.block).flat_map(pieces_of)
}

fn pieces_of(versions: &[Item]) -> Vec<Piece> {
    let mut newest: [Option<Place>; 8] = [None; 8];
    for version in versions {
        for (first, count) in version.sectors.runs() {
            newest[first..first + count].fill(Some(version.place));
        }
    }
    let mut pieces = Vec::new();
    let mut at = 0;
    for same in newest.chunk_by(|a, b| a == b) {
        if let Some(place) = same[0] {
            let sector = Sector(versions[0].block.sector().0 + to_u64(at));
            let discarded =
                versions.last().is_some_and(|last| last.discarded && last.place == place);
            pieces.push(Piece { sector, sectors: same.len(), place, first: at, discarded });
        }
        at += same.len();
    }
    pieces
}

/// One write to the backing device.
struct Run {
    start: Sector,
    end: Sector,
    pieces: Vec<Piece>,
    /// The pieces do not cover it: the rest must be read first.
    has_gaps: bool,
}

/// Merges neighbours, one run at a time, so that a large batch does not take memory for all of
/// them. Each is aligned to the backing device's blocks of `unit` bytes, and no two share one. None
/// is longer than `most` sectors, unless a block or its own is.
fn runs(pieces: impl Iterator<Item = Piece>, unit: u64, most: u64) -> impl Iterator<Item = Run> {
    let unit = unit / to_u64(SECTOR_BYTES);
    let aligned = move |piece: &Piece| {
        let start = Sector(piece.sector.0 / unit * unit);
        let end = Sector((piece.sector.0 + to_u64(piece.sectors)).next_multiple_of(unit));
        (start, end)
    };
    let mut pieces = pieces.peekable();
    std::iter::from_fn(move || {
        let first = pieces.next()?;
        let (start, mut end) = aligned(&first);
        let mut run = vec![first];
        let discarded = first.discarded;
        while let Some(piece) = pieces.next_if(|piece| {
            let (from, to) = aligned(piece);
            let is_alike = piece.discarded == discarded;
            from < end || (from == end && is_alike && to.0 - start.0 <= most)
        }) {
            end = end.max(aligned(&piece).1);
            run.push(piece);
        }
        let covered: usize = run.iter().map(|piece| piece.sectors).sum();
        Some(Run { start, end, pieces: run, has_gaps: to_u64(covered) < end.0 - start.0 })
    })
}

/// One read from the cache device for a run.
struct Load {
    place: Place,
    blocks: usize,
    /// The first sector that is wanted of what is read.
    first: usize,
    sector: Sector,
    sectors: usize,
}

/// Merges pieces that lie next to each other on the cache device as well.
fn loads(pieces: &[Piece]) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    for piece in pieces {
        if let Some(load) = loads.last_mut()
            && load.sector.0 + to_u64(load.sectors) == piece.sector.0
            && load.place.slot == piece.place.slot
            && usize::from(load.place.index) + load.blocks == usize::from(piece.place.index)
            && (load.first + load.sectors) * SECTOR_BYTES == load.blocks * BLOCK_BYTES
            && piece.first == 0
        {
            load.blocks += 1;
            load.sectors += piece.sectors;
            continue;
        }
        let Piece { sector, sectors, place, first, .. } = *piece;
        loads.push(Load { place, blocks: 1, first, sector, sectors });
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Slot;

    fn item(block: u64, id: u64, index: u8, sectors: u8) -> Item {
        let place = Place { slot: Slot(u32::try_from(id).expect("small")), index };
        Item { block: BlockNo(block), place, sectors: DirtyBits(sectors), discarded: false }
    }

    fn runs_of(items: &[Item], unit: u64) -> Vec<Run> {
        runs(pieces(items), unit, MAX_RUN_SECTORS).collect()
    }

    #[test]
    fn the_newest_version_of_each_sector_is_chosen() {
        let items = [item(5, 3, 1, 0xff), item(7, 1, 0, 0b0001_1110), item(7, 2, 0, 0b0000_1100)];
        let found: Vec<_> =
            pieces(&items).map(|p| (p.sector.0, p.sectors, p.place.slot.0, p.first)).collect();
        assert_eq!(found, [(40, 8, 3, 0), (57, 1, 1, 1), (58, 2, 2, 2), (60, 1, 1, 4)]);
    }

    #[test]
    fn neighbours_are_merged_into_one_write_across_segments() {
        let items = [
            item(10, 1, 0, 0xff),
            item(11, 9, 4, 0xff),
            item(12, 1, 1, 0x01),
            item(13, 1, 2, 0xff),
        ];
        let runs = runs_of(&items, 512);
        let found: Vec<_> = runs.iter().map(|r| (r.start.0, r.end.0, r.has_gaps)).collect();
        assert_eq!(found, [(80, 97, false), (104, 112, false)]);
    }

    #[test]
    fn on_large_blocks_no_two_writes_share_one_and_gaps_are_read_first() {
        let runs = runs_of(&[item(10, 1, 0, 0b1000_0001), item(11, 1, 1, 0xff)], 4096);
        let found: Vec<_> =
            runs.iter().map(|r| (r.start.0, r.end.0, r.pieces.len(), r.has_gaps)).collect();
        assert_eq!(found, [(80, 96, 3, true)]);
    }

    #[test]
    fn neighbours_on_the_cache_device_are_read_at_once() {
        let items = [
            item(10, 1, 0, 0xff),
            item(11, 1, 1, 0xff),
            item(12, 1, 3, 0xff),
            item(13, 1, 4, 0x03),
        ];
        let pieces: Vec<_> = pieces(&items).collect();
        let found: Vec<_> =
            loads(&pieces).iter().map(|l| (l.place.index, l.blocks, l.sectors)).collect();
        assert_eq!(found, [(0, 2, 16), (3, 2, 10)]);
    }
}
