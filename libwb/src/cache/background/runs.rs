//! What a batch of write-back becomes on the backing device: pieces of blocks, merged into runs.

use crate::cache::state::segment_log::Item;
use crate::format::{BLOCK_BYTES, Place, SECTOR_BYTES, Sector, to_u64};

/// Neighbouring sectors whose newest version lies in one block of the cache device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) sector: Sector,
    pub(super) sectors: usize,
    pub(super) place: Place,
    /// The first sector within the block.
    pub(super) first: usize,
    /// The whole block is the zeros of a discard.
    pub(super) discarded: bool,
}

/// Chooses the newest version of each sector from items that are sorted by block, older versions
/// first.
pub(super) fn pieces<'a>(items: impl Iterator<Item = &'a Item>) -> impl Iterator<Item = Piece> {
    let (mut items, mut versions) = (items.peekable(), Vec::new());
    let of_next_block = std::iter::from_fn(move || {
        let first = items.next()?;
        versions.clear();
        versions.push(*first);
        while let Some(item) = items.next_if(|item| item.block == first.block) {
            versions.push(*item);
        }
        Some(pieces_of(&versions))
    });
    of_next_block.flatten()
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
pub(super) struct Run {
    pub(super) start: Sector,
    pub(super) end: Sector,
    pub(super) pieces: Vec<Piece>,
    /// The pieces do not cover it: the rest must be read first.
    pub(super) has_gaps: bool,
}

/// Merges neighbours, one run at a time, so that a large batch does not take memory for all of
/// them. Each is aligned to the backing device's blocks of `unit` bytes, and no two share one. None
/// is longer than `most` sectors, unless a single block is.
pub(super) fn runs(
    pieces: impl Iterator<Item = Piece>,
    unit: u64,
    most: u64,
) -> impl Iterator<Item = Run> {
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
pub(super) struct DeviceRead {
    pub(super) place: Place,
    pub(super) blocks: usize,
    /// The first sector that is wanted of what is read.
    pub(super) first: usize,
    pub(super) sector: Sector,
    pub(super) sectors: usize,
}

/// Merges pieces that lie next to each other on the cache device as well.
pub(super) fn device_reads(pieces: &[Piece]) -> Vec<DeviceRead> {
    let mut device_reads: Vec<DeviceRead> = Vec::new();
    for piece in pieces {
        if let Some(read) = device_reads.last_mut()
            && read.sector.0 + to_u64(read.sectors) == piece.sector.0
            && read.place.slot == piece.place.slot
            && usize::from(read.place.index) + read.blocks == usize::from(piece.place.index)
            && (read.first + read.sectors) * SECTOR_BYTES == read.blocks * BLOCK_BYTES
            && piece.first == 0
        {
            read.blocks += 1;
            read.sectors += piece.sectors;
            continue;
        }
        let Piece { sector, sectors, place, first, .. } = *piece;
        device_reads.push(DeviceRead { place, blocks: 1, first, sector, sectors });
    }
    device_reads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BlockNo, DirtyBits, Slot};

    fn item(block: u64, id: u64, index: u8, sectors: u8) -> Item {
        let place = Place { slot: Slot(u32::try_from(id).expect("small")), index };
        Item { block: BlockNo(block), place, sectors: DirtyBits(sectors), discarded: false }
    }

    fn runs_of(items: &[Item], unit: u64) -> Vec<Run> {
        runs(pieces(items.iter()), unit, 2048).collect()
    }

    #[test]
    fn the_newest_version_of_each_sector_is_chosen() {
        let items = [item(5, 3, 1, 0xff), item(7, 1, 0, 0b0001_1110), item(7, 2, 0, 0b0000_1100)];
        let found: Vec<_> = pieces(items.iter())
            .map(|p| (p.sector.0, p.sectors, p.place.slot.0, p.first))
            .collect();
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
        let pieces: Vec<_> = pieces(items.iter()).collect();
        let found: Vec<_> =
            device_reads(&pieces).iter().map(|l| (l.place.index, l.blocks, l.sectors)).collect();
        assert_eq!(found, [(0, 2, 16), (3, 2, 10)]);
    }
}
