//! Writing one header, superblock page or record.

use super::scan::read_slot;
use crate::device::{Device, DeviceError, IoBuf, Operation};
use crate::format::{
    BLOCK_BYTES, Commit, EXTENSION_OFFSETS, Geometry, RECORD_BLOCK_OFFSET, Reason, Record,
    SEGMENT_BYTES, SUPERBLOCK_OFFSET, SegmentExtension, SegmentId, Slot, SuperblockExtension,
    close_header, encode_header, encode_record_block, encode_superblock_block, to_u64,
};

/// Writes the superblock's first block, which holds only the magic. It is durable after a flush.
///
/// # Errors
/// When the device fails.
pub async fn write_magic(device: &Device) -> Result<(), DeviceError> {
    let mut block = IoBuf::zeroed(BLOCK_BYTES);
    encode_superblock_block(block.block_at_mut(0));
    device.write(SUPERBLOCK_OFFSET, block.into()).await
}

/// Writes a page of the superblock extension over the older copy. It is durable after a flush.
///
/// # Errors
/// When the device fails.
pub async fn write_extension(
    device: &Device,
    page: &SuperblockExtension,
) -> Result<(), DeviceError> {
    let mut block = IoBuf::zeroed(BLOCK_BYTES);
    page.encode(block.block_at_mut(0));
    let copy = if page.generation.is_multiple_of(2) { 0 } else { 1 };
    device.write(EXTENSION_OFFSETS[copy], block.into()).await
}

/// Writes the superblock record. It is durable after a flush.
///
/// # Errors
/// When the device fails.
pub async fn write_record(device: &Device, record: Record) -> Result<(), DeviceError> {
    let mut block = IoBuf::zeroed(BLOCK_BYTES);
    encode_record_block(block.block_at_mut(0), record);
    device.write(RECORD_BLOCK_OFFSET, block.into()).await
}

/// Takes the proof from the superblock record, so that whoever opens the cache next reads all of
/// its log. It is durable afterwards. Nothing else may write the record meanwhile.
///
/// # Errors
/// When the device fails. A damaged record is left as it is.
#[cfg(feature = "engine")]
pub(crate) async fn unprove_record(device: &Device) -> Result<(), DeviceError> {
    let block = device.read(RECORD_BLOCK_OFFSET, IoBuf::zeroed(BLOCK_BYTES)).await?;
    let Ok(Record { id, .. }) = crate::format::decode_record(block.block_at(0)) else {
        return Ok(());
    };
    write_record(device, Record { id, digest: None }).await?;
    device.flush().await
}

/// The header extension of an empty segment that replaces a lost one. It claims only what is known
/// to be durable.
pub(super) fn filler_extension(
    page: &SuperblockExtension,
    id: SegmentId,
    durable: SegmentId,
) -> SegmentExtension {
    SegmentExtension {
        digest: page.digest(),
        reason: Reason::Salvage,
        durable: durable.min(id.minus(1)),
        written_back: SegmentId::NONE,
        time: 0,
        before: None,
    }
}

/// Writes an empty segment that replaces a lost one. `segment` is its id, and the last durable
/// segment. With the id [`SegmentId::NONE`], it erases the slot. Durable after a flush.
///
/// # Errors
/// When the device fails.
pub(crate) async fn write_filler(
    device: &Device,
    geometry: Geometry,
    slot: Slot,
    segment: (SegmentId, SegmentId),
    page: Option<&SuperblockExtension>,
) -> Result<(), DeviceError> {
    device.write(geometry.slot_offset(slot), filler(segment, page).into()).await
}

/// The header block of an empty segment with this id, which claims segments up to `durable` as
/// durable. With the id [`SegmentId::NONE`], zeros.
pub(super) fn filler(
    (id, durable): (SegmentId, SegmentId),
    page: Option<&SuperblockExtension>,
) -> IoBuf {
    let mut block = IoBuf::zeroed(BLOCK_BYTES);
    if id != SegmentId::NONE {
        let extension = page.map(|page| filler_extension(page, id, durable));
        encode_header(block.block_at_mut(0), id, &[], &[], extension.as_ref());
    }
    block
}

/// Closes a segment at its last commit that verifies. Durable after a flush; a torn write leads to
/// the same commit. Before this, no valid segment may be left after it in the log.
///
/// # Errors
/// When the device fails, or the segment is gone.
pub(crate) async fn close_segment(
    device: &Device,
    geometry: Geometry,
    id: SegmentId,
) -> Result<(), DeviceError> {
    let offset = geometry.slot_offset(geometry.slot_of(id));
    let content = read_slot(device, geometry, geometry.slot_of(id)).await;
    let header = content.header.filter(|_| content.state.valid_id() == Some(id));
    let Some(header) = header else {
        let (device, length) = (device.name().clone(), to_u64(SEGMENT_BYTES));
        let cause = DeviceError::ALTERED;
        return Err(DeviceError { device, operation: Operation::Read, offset, length, cause });
    };
    let mut block = device.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await?;
    close_header(
        block.block_at_mut(0),
        Commit { length: header.length(), checksum: header.checksum },
    );
    device.write(offset, block.into()).await
}
