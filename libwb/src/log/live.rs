//! What the segments hold that recovery would apply.

pub use super::bounds::Beyond;
use super::bounds::first_outside;
use super::recovery::{Recovery, recover};
use super::scan::{SlotFault, SlotState, read_header, read_slot, scan_trusting};
use super::superblock::Superblock;
use super::{LogError, LogErrorKind};
use crate::device::Device;
use crate::format::{BlockNo, DirtyBits, Geometry, SegmentHeader, SegmentId, Slot, to_u64};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::collections::BTreeSet;

/// Headers to read at once; one block of memory each.
const HEADER_DEPTH: usize = 128;
/// How many entries beyond the end of the backing device to keep. The others are only counted.
const BEYOND_KEPT: usize = 100;

/// What a set of segments holds.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Entries with dirty sectors. A rewritten block counts again.
    pub dirty_entries: u64,
    /// Blocks with dirty sectors, each counted once.
    pub dirty_blocks: u64,
    /// Entries from read caching.
    pub clean_entries: u64,
    /// The first entries beyond the end of the backing device, oldest first.
    pub beyond: Vec<Beyond>,
    /// How many entries are beyond it.
    pub beyond_count: u64,
    /// Blocks whose newest version is marked as lost.
    pub lost: BTreeSet<BlockNo>,
}

/// Reads the headers of valid segments, several at once, and passes them to `visit` in the order of
/// `ids`. For `cut_short` ([`Recovery::cut_short`]), `visit` gets the entries of the commit that
/// verifies.
///
/// # Errors
/// When a segment is gone, or the device fails.
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
        header.ok_or_else(|| LogError::new(device, LogErrorKind::Changed { id }))
    });
    let mut headers = stream::iter(reads).buffered(HEADER_DEPTH);
    while let Some(header) = headers.try_next().await? {
        visit(&header);
    }
    Ok(())
}

/// What one segment adds to [`Totals`]. Takes 9 bytes of memory for each dirty entry.
#[derive(Clone, Debug, Default)]
pub struct Share {
    /// The blocks of the dirty entries, and their dirty sectors.
    blocks: Box<[BlockNo]>,
    dirty: Box<[DirtyBits]>,
    clean: u8,
    /// The indices of the dirty entries that are marked as lost, in order.
    lost: Box<[u8]>,
}

impl Share {
    /// The share of the segment with this header.
    pub fn of(header: &SegmentHeader) -> Share {
        let entries = || header.metablocks.iter().filter(|entry| !entry.dirty.is_clean());
        let blocks: Box<[BlockNo]> = entries().map(|entry| entry.block).collect();
        let clean = header.metablocks.len() - blocks.len();
        let lost =
            (0..).zip(entries()).filter(|(_, entry)| entry.lost).map(|(nth, _)| nth).collect();
        let dirty = entries().map(|entry| entry.dirty).collect();
        #[allow(clippy::cast_possible_truncation)] // at most PLACES
        Share { blocks, dirty, clean: clean as u8, lost }
    }
}

impl Totals {
    /// Adds up what segments hold, in the order of the log. Given `backing_sectors`, also finds the
    /// entries beyond the end of the backing device.
    pub fn of<'a>(
        segments: impl IntoIterator<Item = (SegmentId, &'a Share)>,
        backing_sectors: Option<u64>,
    ) -> Totals {
        let mut totals = Totals::default();
        let mut blocks = Vec::new();
        for (id, share) in segments {
            totals.add(id, share, &mut blocks, backing_sectors);
        }
        totals.count(blocks)
    }

    fn add(&mut self, id: SegmentId, share: &Share, blocks: &mut Vec<BlockNo>, end: Option<u64>) {
        self.clean_entries += u64::from(share.clean);
        self.dirty_entries += to_u64(share.blocks.len());
        blocks.extend(&share.blocks);
        if !(self.lost.is_empty() && share.lost.is_empty()) {
            for (nth, block) in (0..).zip(&share.blocks) {
                match share.lost.contains(&nth) {
                    true => self.lost.insert(*block),
                    false => self.lost.remove(block),
                };
            }
        }
        let Some(end) = end else { return };
        for (&block, &dirty) in share.blocks.iter().zip(&share.dirty) {
            if let Some(sector) = first_outside(block, dirty, end) {
                self.beyond_count += 1;
                if self.beyond.len() < BEYOND_KEPT {
                    self.beyond.push(Beyond { id, sector });
                }
            }
        }
    }

    /// Counts each block once.
    fn count(mut self, mut blocks: Vec<BlockNo>) -> Totals {
        blocks.sort_unstable();
        blocks.dedup();
        self.dirty_blocks = to_u64(blocks.len());
        self
    }
}

/// Reads the segments `ids` and counts as [`Totals::of`]. Takes 8 bytes of memory for each dirty
/// entry.
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
        totals.add(header.id, &Share::of(header), &mut blocks, backing_sectors);
    })
    .await?;
    Ok(totals.count(blocks))
}

/// Counts what recovery would apply, as [`totals`].
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

/// The number of dirty blocks in the log of a device, read as attach reads it. Calls `progress`
/// with each slot.
///
/// # Errors
/// When a slot is unreadable, or the log is corrupt.
pub async fn dirty_blocks(
    device: &Device,
    superblock: &Superblock,
    mut progress: impl FnMut(Slot),
) -> Result<u64, LogError> {
    let slots = scan_trusting(device, superblock, |slot, _| progress(slot)).await;
    for state in &slots {
        if let SlotState::Invalid { fault: SlotFault::Unreadable(error), .. } = state {
            return Err(error.clone().into());
        }
    }
    let recovery = recover(superblock, &slots).refuse_corrupt(device)?;
    Ok(live_totals(device, superblock.geometry, &recovery, None).await?.dirty_blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{IoBuf, MemDevice};
    use crate::format::{
        BLOCK_BYTES, BlockNo, DirtyBits, Metablock, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector,
        encode_header, to_u64,
    };
    use futures_lite::future::block_on;
    use std::sync::Arc;

    /// A device with two segments: block 1 dirty twice, block 2 clean, and the last possible block.
    fn device() -> (Device, Geometry) {
        let size = SUPERBLOCK_REGION_BYTES + 2 * to_u64(SEGMENT_BYTES);
        let device: Device = Arc::new(MemDevice::new("cache", size));
        let geometry = Geometry::of_device(size).unwrap();
        let entry = |block, dirty| Metablock {
            block: BlockNo(block),
            dirty: DirtyBits(dirty),
            crc: None,
            lost: false,
        };
        let segments =
            [vec![entry(1, 1), entry(2, 0)], vec![entry(1, 0xff), entry(u64::MAX / 8, 0x80)]];
        for (id, metablocks) in (1..).map(SegmentId).zip(segments) {
            let mut block = IoBuf::zeroed(BLOCK_BYTES);
            encode_header(block.block_at_mut(0), id, &metablocks, &[0; 2 * BLOCK_BYTES], None);
            block_on(device.write(geometry.slot_offset(geometry.slot_of(id)), block.into()))
                .unwrap();
        }
        (device, geometry)
    }

    #[test]
    fn a_block_that_was_written_again_is_one_dirty_block() {
        let (device, geometry) = device();
        let t =
            block_on(totals(&device, geometry, [SegmentId(1), SegmentId(2)], None, None)).unwrap();
        assert_eq!(
            (t.dirty_entries, t.dirty_blocks, t.clean_entries, t.beyond_count),
            (3, 2, 1, 0)
        );
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
            Err(LogError { kind: LogErrorKind::Changed { id: SegmentId(3), .. }, .. })
        ));
    }
}
