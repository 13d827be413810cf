//! What the segments that recovery would apply hold.

use super::LogError;
use super::recovery::Recovery;
use super::scan::{read_header, read_slot};
use crate::device::Device;
use crate::format::{Geometry, Metablock, Sector, SegmentHeader, SegmentId};
use futures_util::{StreamExt, TryStreamExt, stream};

/// Headers that are read at the same time; one block of memory each.
const HEADER_DEPTH: usize = 32;
/// Entries beyond the end of the backing device that are kept one by one; the rest are counted.
const BEYOND_KEPT: usize = 100;

/// An entry of the log whose data does not fit on the backing device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beyond {
    /// The segment.
    pub id: SegmentId,
    /// The last dirty sector of the entry's block.
    pub sector: Sector,
}

/// What a set of segments holds.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Entries with dirty sectors. A block that was written again is counted again.
    pub dirty_entries: u64,
    /// Blocks with dirty sectors, each counted once.
    pub dirty_blocks: u64,
    /// Entries of read caching.
    pub clean_entries: u64,
    /// The first entries that lie beyond the end of the backing device, oldest first.
    pub beyond: Vec<Beyond>,
    /// How many do.
    pub beyond_count: u64,
}

/// Reads the headers of segments that a scan found valid, several at a time, and shows them in the order of `ids`. That of
/// `cut_short` ([`Recovery::cut_short`]) is shown as far as it stands.
///
/// # Errors
/// When a segment is not there any more, or the device fails.
pub async fn visit_headers(
    device: &Device,
    geometry: Geometry,
    ids: impl IntoIterator<Item = SegmentId>,
    cut_short: Option<SegmentId>,
    mut visit: impl FnMut(&SegmentHeader),
) -> Result<(), LogError> {
    let reads = ids.into_iter().map(async |id| {
        if cut_short != Some(id) {
            return read_header(device, geometry, id).await;
        }
        let content = read_slot(device, geometry, geometry.slot_of(id)).await;
        let header = content.header.filter(|_| content.state.valid_id() == Some(id));
        header.ok_or_else(|| LogError::Changed { device: device.name().to_string(), id })
    });
    let mut headers = stream::iter(reads).buffered(HEADER_DEPTH);
    while let Some(header) = headers.try_next().await? {
        visit(&header);
    }
    Ok(())
}

/// Counts what the segments `ids` hold, and finds entries that lie beyond a backing device of `backing_sectors`
/// sectors, where that is given. Takes 8 bytes of memory for each dirty entry.
///
/// # Errors
/// As [`visit_headers`].
pub async fn totals(
    device: &Device,
    geometry: Geometry,
    ids: impl IntoIterator<Item = SegmentId>,
    cut_short: Option<SegmentId>,
    backing_sectors: Option<u64>,
) -> Result<Totals, LogError> {
    let mut totals = Totals::default();
    let mut blocks = Vec::new();
    visit_headers(device, geometry, ids, cut_short, |header| {
        for entry in &header.metablocks {
            let Some(last) = last_dirty_sector(entry) else {
                totals.clean_entries += 1;
                continue;
            };
            totals.dirty_entries += 1;
            blocks.push(entry.block);
            if backing_sectors.is_some_and(|end| last.0 >= end) {
                totals.beyond_count += 1;
                if totals.beyond.len() < BEYOND_KEPT {
                    totals.beyond.push(Beyond { id: header.id, sector: last });
                }
            }
        }
    })
    .await?;
    blocks.sort_unstable();
    blocks.dedup();
    totals.dirty_blocks = crate::format::to_u64(blocks.len());
    Ok(totals)
}

/// Counts what recovery would apply; as [`totals`].
///
/// # Errors
/// As [`visit_headers`].
pub async fn live_totals(
    device: &Device,
    geometry: Geometry,
    recovery: &Recovery,
    backing_sectors: Option<u64>,
) -> Result<Totals, LogError> {
    totals(device, geometry, recovery.live(), recovery.cut_short(), backing_sectors).await
}

fn last_dirty_sector(entry: &Metablock) -> Option<Sector> {
    let (first, count) = entry.dirty.runs().last()?;
    // A block's first sector is at most 8 below the largest u64, and the last one in it at most 7 above that.
    Some(Sector(entry.block.sector().0 + crate::format::to_u64(first + count - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{IoBuf, MemDevice};
    use crate::format::{
        BLOCK_BYTES, BlockNo, DirtyBits, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, encode_header, to_u64,
    };
    use futures_lite::future::block_on;
    use std::sync::Arc;

    /// A device with two segments: block 1 dirty twice, block 2 clean, and the last block there can be.
    fn device() -> (Device, Geometry) {
        let size = SUPERBLOCK_REGION_BYTES + 2 * to_u64(SEGMENT_BYTES);
        let device: Device = Arc::new(MemDevice::new("cache", size));
        let geometry = Geometry::of_device(size).unwrap();
        let entry = |block, dirty| Metablock { block: BlockNo(block), dirty: DirtyBits(dirty), crc: None };
        let segments = [vec![entry(1, 1), entry(2, 0)], vec![entry(1, 0xff), entry(u64::MAX / 8, 0x80)]];
        for (id, metablocks) in (1..).map(SegmentId).zip(segments) {
            let mut block = IoBuf::zeroed(BLOCK_BYTES);
            encode_header(block.block_at_mut(0), id, &metablocks, &[0; 2 * BLOCK_BYTES], None);
            block_on(device.write(geometry.slot_offset(geometry.slot_of(id)), block.into())).unwrap();
        }
        (device, geometry)
    }

    #[test]
    fn a_block_that_was_written_again_is_one_dirty_block() {
        let (device, geometry) = device();
        let t = block_on(totals(&device, geometry, [SegmentId(1), SegmentId(2)], None, None)).unwrap();
        assert_eq!((t.dirty_entries, t.dirty_blocks, t.clean_entries, t.beyond_count), (3, 2, 1, 0));
    }

    #[test]
    fn only_dirty_sectors_beyond_the_end_are_reported() {
        let (device, geometry) = device();
        let ids = [SegmentId(1), SegmentId(2)];
        let t = block_on(totals(&device, geometry, ids, None, Some(16))).unwrap();
        assert_eq!(t.beyond, [Beyond { id: SegmentId(2), sector: Sector(u64::MAX) }]);
        let t = block_on(totals(&device, geometry, ids, None, Some(9))).unwrap();
        assert_eq!(t.beyond_count, 2);
    }

    #[test]
    fn a_segment_that_is_not_there_is_an_error() {
        let (device, geometry) = device();
        assert!(matches!(
            block_on(totals(&device, geometry, [SegmentId(3)], None, None)),
            Err(LogError::Changed { id: SegmentId(3), .. })
        ));
    }
}
