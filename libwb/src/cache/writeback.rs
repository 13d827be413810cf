//! The way back to the disk: oldest segments first, many at a time, sorted and merged.

use super::Inner;
use super::state::State;
use crate::device::{BlockDevice, DeviceError, IoBuf};
use crate::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, PLACES, Place, Record, SECTOR_BYTES, Sector, SegmentId, to_u64, to_usize,
};
use crate::log::create::write_record;
use crate::planted::Bug;
use futures_lite::future::yield_now;
use futures_util::StreamExt;
use futures_util::stream::{self, FuturesUnordered};

/// The longest single write to the backing device, in sectors.
const MAX_RUN_SECTORS: u64 = 2048;
/// Writes to the backing device at a time: as many as a disk's queue holds, so that it can choose the next that comes under
/// its arm. Each takes its data twice, as read and as written, so that write-back takes 64 MiB at most, and besides an
/// [`Item`] for each block of a batch, 24 bytes, and as much again while they are sorted: 25 MB for 4096 segments.
const DEPTH: usize = 32;
/// Reads of the cache device at a time for each of them: more would keep those of requests and commits waiting.
const READS: usize = 8;
/// Segments of a batch that are looked at before other tasks run.
const SEGMENTS_AT_ONCE: u64 = 32;

/// A version of a block, or some sectors of it, to be written back.
#[derive(Clone, Copy)]
pub(super) struct Item {
    pub(super) block: BlockNo,
    pub(super) place: Place,
    pub(super) sectors: DirtyBits,
}

/// Why a batch was not written back.
pub(super) enum Stop {
    Device(DeviceError),
    /// The cache is being closed.
    Closing,
}

impl From<DeviceError> for Stop {
    fn from(error: DeviceError) -> Stop {
        Stop::Device(error)
    }
}

impl Inner {
    /// Writes back every segment up to `last`, and then lets their slots be reused.
    pub(super) async fn write_back(&self, last: SegmentId) -> Result<(), Stop> {
        let started = self.runtime.now();
        let first = self.lock().written_back.next();
        let segments = (first.0..=last.0).map(SegmentId);
        let mut items: Vec<Item> = Vec::new();
        for id in segments.clone() {
            items.extend(self.items_of(id, last));
            self.let_others(id).await;
        }
        self.lock().throttle.begin(started, to_u64(items.len()));
        let written = async {
            self.write_items(items).await?;
            Ok::<_, Stop>(self.write_record(last).await?)
        };
        let written = written.await;
        self.lock().throttle.end(self.runtime.now(), written.is_ok());
        written?;
        for id in segments {
            self.lock().segment_written_back(id);
            self.let_others(id).await;
        }
        self.events.changed.notify(usize::MAX);
        self.events.staging.notify(usize::MAX);
        Ok(())
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

    /// What of a segment must be written back in a batch that ends with `last`.
    fn items_of(&self, id: SegmentId, last: SegmentId) -> Vec<Item> {
        let state = self.lock();
        let slot = state.geometry.slot_of(id);
        let item = |index| {
            let place = Place { slot, index };
            let (block, sectors) = state.index.at(place).filter(|(_, dirty)| !dirty.is_clean())?;
            let newest = state.index.get(block)?;
            if newest.place == place {
                return Some(Item { block, place, sectors });
            }
            // A newer version in this batch carries all that this one does. One beyond it must not stand for it: should the
            // cache device be lost before its turn, or a power cut undo it, the backing device would hold neither.
            let newer = state.id_of(newest.place.slot);
            let superseded = newer <= last
                || self.planted.has(Bug::SupersededLeftOut)
                || self.planted.has(Bug::DurableSupersedes) && newer <= state.durable;
            // What the newest version lacks was written back before that was made, though the record may not say so.
            // Something newer than this one may have been.
            let sectors = sectors.intersection(newest.dirty);
            (!sectors.is_clean() && !superseded).then_some(Item { block, place, sectors })
        };
        (0..PLACES).filter_map(item).collect()
    }

    /// Writes sectors from the cache device to the backing device, the newest version of each, and flushes it. Of versions
    /// of the same block, the older one comes first.
    pub(super) async fn write_items(&self, mut items: Vec<Item>) -> Result<(), Stop> {
        if items.is_empty() {
            return Ok(());
        }
        let before = self.backing_flushes.failures();
        // Stable, so that versions of the same block stay in their order.
        items.sort_by_key(|item| item.block);
        let mut runs = runs(pieces(&items), u64::from(self.writeback_device.block_size()));
        let mut writes = FuturesUnordered::new();
        let mut result = Ok(());
        loop {
            while result.is_ok()
                && writes.len() < DEPTH
                && let Some(run) = runs.next()
            {
                writes.push(self.write_run(run));
            }
            // Even after a failure, what was started is waited for: it must not come out over a later write.
            match writes.next().await {
                Some(done) => result = result.and(done),
                None => break,
            }
        }
        result?;
        if self.planted.has(Bug::BackingNotFlushed) {
            return Ok(());
        }
        Ok(self.backing_flushes.flush(&self.writeback_device, before).await?)
    }

    async fn write_run(&self, run: Run) -> Result<(), Stop> {
        if self.lock().stopping {
            return Err(Stop::Closing);
        }
        let offset = run.start.bytes();
        let length = to_usize((run.end.0 - run.start.0) * to_u64(SECTOR_BYTES));
        let mut buf = IoBuf::zeroed(length);
        if run.has_gaps {
            buf = self.writeback_device.read(offset, buf).await?;
        }
        let read = |load: Load| async move {
            let data = IoBuf::zeroed(BLOCK_BYTES * load.blocks);
            let read = self.read_places(load.place, data).await;
            let data = read.inspect_err(|_| self.lock().look_for_newer(&load))?;
            Ok::<_, DeviceError>((load, data))
        };
        let mut reads = stream::iter(loads(&run.pieces).into_iter().map(read)).buffer_unordered(READS);
        while let Some(read) = reads.next().await {
            let (load, data) = read?;
            let to = to_usize((load.sector.0 - run.start.0) * to_u64(SECTOR_BYTES));
            let from = load.first * SECTOR_BYTES;
            let bytes = load.sectors * SECTOR_BYTES;
            buf[to..to + bytes].copy_from_slice(&data[from..from + bytes]);
        }
        drop(reads);
        self.writeback_device.write(offset, buf.into()).await?;
        self.counters.written_back_bytes.add(to_u64(length));
        let (blocks, now) = (to_u64(length.div_ceil(BLOCK_BYTES)), self.runtime.now());
        let mut state = self.lock();
        state.throttle.progressed(blocks, now);
        state.rate.wrote(to_u64(length), blocks, now);
        Ok(())
    }
}

impl State {
    /// Notes the newest versions of blocks that cannot be read where they are to be written back from.
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
}

/// Chooses the newest version of each sector from items that are sorted by block, older versions first.
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
            pieces.push(Piece { sector, sectors: same.len(), place, first: at });
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

/// Merges neighbours, one run at a time, so that a large batch does not take memory for all of them. Each is aligned to the
/// backing device's blocks of `unit` bytes, and no two share one.
fn runs(pieces: impl Iterator<Item = Piece>, unit: u64) -> impl Iterator<Item = Run> {
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
        while let Some(piece) = pieces.next_if(|piece| {
            let (from, to) = aligned(piece);
            from < end || (from == end && to.0 - start.0 <= MAX_RUN_SECTORS)
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
        let Piece { sector, sectors, place, first } = *piece;
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
        Item { block: BlockNo(block), place, sectors: DirtyBits(sectors) }
    }

    fn runs_of(items: &[Item], unit: u64) -> Vec<Run> {
        runs(pieces(items), unit).collect()
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
        let items = [item(10, 1, 0, 0xff), item(11, 9, 4, 0xff), item(12, 1, 1, 0x01), item(13, 1, 2, 0xff)];
        let runs = runs_of(&items, 512);
        let found: Vec<_> = runs.iter().map(|r| (r.start.0, r.end.0, r.has_gaps)).collect();
        assert_eq!(found, [(80, 97, false), (104, 112, false)]);
    }

    #[test]
    fn on_large_blocks_no_two_writes_share_one_and_gaps_are_read_first() {
        let runs = runs_of(&[item(10, 1, 0, 0b1000_0001), item(11, 1, 1, 0xff)], 4096);
        let found: Vec<_> = runs.iter().map(|r| (r.start.0, r.end.0, r.pieces.len(), r.has_gaps)).collect();
        assert_eq!(found, [(80, 96, 3, true)]);
    }

    #[test]
    fn neighbours_on_the_cache_device_are_read_at_once() {
        let items = [item(10, 1, 0, 0xff), item(11, 1, 1, 0xff), item(12, 1, 3, 0xff), item(13, 1, 4, 0x03)];
        let pieces: Vec<_> = pieces(&items).collect();
        let found: Vec<_> = loads(&pieces).iter().map(|l| (l.place.index, l.blocks, l.sectors)).collect();
        assert_eq!(found, [(0, 2, 16), (3, 2, 10)]);
    }
}
