//! Making an empty cache: the base format, as the kernel module makes it, and the superblock
//! extension.

use super::reach::Reach;
use super::recovery::recover;
use super::scan::{BackingFacts, check_identity, read_slot, read_superblock, scan};
use super::{LogError, Use};
use crate::device::{Device, DeviceError, IoBuf, Operation, SharedBuf};
use crate::format::{
    BLOCK_BYTES, Commit, EXTENSION_OFFSETS, Geometry, RECORD_BLOCK_OFFSET, Reason, Record,
    SEGMENT_BYTES, SUPERBLOCK_OFFSET, SUPERBLOCK_REGION_BYTES, SegmentExtension, SegmentId, Slot,
    SuperblockExtension, close_header, encode_header, encode_record_block, encode_superblock_block,
    to_u64, to_usize,
};
use futures_util::{StreamExt, TryStreamExt, stream};

/// Header blocks that are zeroed at the same time. They all share one block of zeros.
const FORMAT_DEPTH: usize = 64;

/// Makes an empty cache of a device, whatever it holds, and shows `progress` how many segments are
/// done. Without an extension, only the base format is written.
///
/// The superblock region is zeroed and flushed first, then the headers, then comes the extension
/// and last the magic, so that a format that is interrupted leaves no cache device at all and never
/// an old log with holes.
///
/// # Errors
/// When the device cannot hold a cache, or fails.
pub async fn create(
    device: &Device,
    extension: Option<&SuperblockExtension>,
    mut progress: impl FnMut(u32),
) -> Result<Geometry, LogError> {
    let geometry = Geometry::of_device(device.size())
        .map_err(|fault| LogError::Geometry { device: device.name().to_string(), fault })?;
    let region = IoBuf::zeroed(to_usize(SUPERBLOCK_REGION_BYTES));
    device.write(SUPERBLOCK_OFFSET, region.into()).await?;
    device.flush().await?;

    let zeros = SharedBuf::from(IoBuf::zeroed(BLOCK_BYTES));
    let writes = geometry.all_slots().map(|slot| {
        let (device, zeros) = (device.clone(), zeros.clone());
        Ok::<_, DeviceError>(async move { device.write(geometry.slot_offset(slot), zeros).await })
    });
    let mut writes = stream::iter(writes).try_buffer_unordered(FORMAT_DEPTH).boxed();
    let mut done = 0;
    while writes.try_next().await?.is_some() {
        done += 1;
        progress(done);
    }
    // Whoever finds the extension without the magic may take the magic for lost, and write it.
    device.flush().await?;
    if let Some(extension) = extension {
        for generation in [0, 1] {
            write_extension(device, &SuperblockExtension { generation, ..extension.clone() })
                .await?;
        }
        write_record(device, Record { id: SegmentId::NONE, digest: Some(extension.digest()) })
            .await?;
        device.flush().await?;
    }
    write_magic(device).await?;
    device.flush().await?;
    Ok(geometry)
}

/// Writes the superblock's first block, which has nothing but the magic. It is durable after a
/// flush.
///
/// # Errors
/// When the device fails.
pub async fn write_magic(device: &Device) -> Result<(), DeviceError> {
    let mut block = IoBuf::zeroed(BLOCK_BYTES);
    encode_superblock_block(block.block_at_mut(0));
    device.write(SUPERBLOCK_OFFSET, block.into()).await
}

/// Writes a page of the superblock extension over the older of the two copies. It is durable after
/// a flush.
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

/// What the header of an empty segment says that stands in for a lost one: what is known to have
/// been durable, and nothing else.
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

/// Makes a slot hold an empty segment that stands in for a lost one and says up to where segments
/// were durable; or no segment at all, if `id` is [`SegmentId::NONE`]. It is durable after a flush.
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

/// The header block of an empty segment that says up to where segments were durable; of none, for
/// [`SegmentId::NONE`].
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

/// Makes the header of a segment of which only a commit is there say that it ends with that. It is
/// durable after a flush, and whatever a power cut leaves of it leads to the same commit. What a
/// scan finds valid after that segment must be gone before.
///
/// # Errors
/// When the device fails, or the segment is not there any more.
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

/// Records that the backing device has grown, which its identity cannot show.
///
/// # Errors
/// When a device fails, the cache device is not sound, or not as far as it is known to have come,
/// or the identity shows another device; nothing is written then.
pub async fn accept_growth(
    device: &Device,
    backing: &BackingFacts<'_>,
    known: Option<Reach>,
) -> Result<(), LogError> {
    let superblock = read_superblock(device, Use::Write).await?;
    let slots = scan(device, superblock.geometry, |_, _| {}).await;
    let recovery = recover(&superblock, &slots).refuse_corrupt(device)?;
    // The page that is written makes an older copy look like a newer one.
    known.map_or(Ok(()), |known| known.refuse_older(device, Reach::of(&recovery)))?;
    let grown = |it: &SuperblockExtension| (1..backing.sectors).contains(&it.backing_sectors);
    let Some(extension) = superblock.extension.filter(grown) else { return Ok(()) };
    check_identity(device, &extension, backing)?;
    let page = SuperblockExtension { backing_sectors: backing.sectors, ..extension.next() };
    write_extension(device, &page).await?;
    Ok(device.flush().await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::MemDevice;
    use crate::format::{SEGMENT_BYTES, SegmentId};
    use crate::log::recovery::recover;
    use crate::log::rig::{Log, Write, after_power_cut, in_sectors};
    use crate::log::scan::{SlotState, examine_superblock, read_superblock, scan};
    use futures_lite::future::block_on;
    use std::sync::Arc;
    use uuid::Uuid;

    #[test]
    fn what_is_made_of_garbage_is_an_empty_cache_and_only_what_must_be_written_is() {
        let size = SUPERBLOCK_REGION_BYTES + 3 * to_u64(SEGMENT_BYTES) + 4096;
        let memory = Arc::new(MemDevice::with_content("cache", vec![0xa5; to_usize(size)]));
        let device: Device = memory.clone();
        let mut calls = Vec::new();
        let geometry = block_on(create(&device, None, |done| calls.push(done))).unwrap();
        assert_eq!((geometry.slots(), calls), (3, vec![1, 2, 3]));

        let content = memory.content();
        let region = to_usize(SUPERBLOCK_REGION_BYTES);
        assert_eq!(content[..4], [0x74, 0x73, 0x42, 0x57]);
        assert!(content[4..region].iter().all(|&b| b == 0));
        for segment in content[region..].chunks_exact(SEGMENT_BYTES) {
            assert!(segment[..BLOCK_BYTES].iter().all(|&b| b == 0));
            assert!(segment[BLOCK_BYTES..].iter().all(|&b| b == 0xa5));
        }

        let superblock = block_on(read_superblock(&device, Use::Write)).unwrap();
        let slots = block_on(scan(&device, superblock.geometry, |_, _| ()));
        assert!(slots.iter().all(|slot| matches!(slot, SlotState::Empty)));
        assert_eq!(recover(&superblock, &slots).point, SegmentId::NONE);
    }

    #[test]
    fn a_power_cut_in_a_format_leaves_no_old_log_with_a_new_extension() {
        let log = Log::new(20, false);
        let recorder = log.device();
        let device: Device = recorder.clone();
        let extension = SuperblockExtension::new(Uuid::from_u128(7), device.size());
        block_on(create(&device, Some(&extension), |_| ())).unwrap();
        let sectors = in_sectors(&recorder.writes.lock());
        let mut extended = 0;
        for flushes in 0..=*recorder.flushes.lock() {
            // Of what was not durable, all that was written to the superblock region survives, and
            // nothing else.
            let survives =
                |(offset, _, after): &&Write| *after < flushes || *offset < SUPERBLOCK_REGION_BYTES;
            let surviving: Vec<Write> = sectors.iter().filter(survives).cloned().collect();
            let device: Device = after_power_cut(&log, &surviving, flushes, u64::MAX).device();
            if block_on(examine_superblock(&device)).unwrap().extension().is_some() {
                extended += 1;
                block_on(write_magic(&device)).unwrap();
                let superblock = block_on(read_superblock(&device, Use::Write)).unwrap();
                let slots = block_on(scan(&device, superblock.geometry, |_, _| ()));
                assert!(
                    slots.iter().all(|slot| matches!(slot, SlotState::Empty)),
                    "flush {flushes}"
                );
            }
        }
        assert!(extended > 0);
    }

    #[test]
    fn a_device_too_small_is_left_as_it_was() {
        let memory = Arc::new(MemDevice::with_content("cache", vec![0xa5; 1024 * 1024]));
        let device: Device = memory.clone();
        assert!(matches!(block_on(create(&device, None, |_| ())), Err(LogError::Geometry { .. })));
        assert!(memory.content().iter().all(|&b| b == 0xa5));
    }
}
