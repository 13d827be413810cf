//! Formatting a cache device: the base format of the kernel module, and the superblock extension.

use super::segment_writes::{write_extension, write_magic, write_record};
use super::{LogError, LogErrorKind};
use crate::device::{Device, DeviceError, IoBuf, SharedBuf};
use crate::format::{
    BLOCK_BYTES, Geometry, Record, SUPERBLOCK_OFFSET, SUPERBLOCK_REGION_BYTES, SegmentId,
    SuperblockExtension, to_usize,
};
use futures_util::{StreamExt, TryStreamExt, stream};

/// Header blocks to zero at once. They share one block of zeros.
const FORMAT_DEPTH: usize = 64;

/// Makes an empty cache of a device, whatever it holds. Calls `progress` with the number of
/// segments done. Without an extension, it writes only the base format.
///
/// It zeroes and flushes the superblock region, then the headers. Then it writes the extension, and
/// last the magic. So an interrupted format leaves no cache device, and never an old log with
/// holes.
///
/// # Errors
/// When the device cannot hold a cache, or fails.
pub async fn create(
    device: &Device,
    extension: Option<&SuperblockExtension>,
    mut progress: impl FnMut(u32),
) -> Result<Geometry, LogError> {
    let geometry = Geometry::of_device(device.size())
        .map_err(|fault| LogError::new(device, LogErrorKind::Geometry { fault }))?;
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
    // A tool that finds the extension without the magic may restore the magic.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::MemDevice;
    use crate::format::{SEGMENT_BYTES, to_u64};
    use crate::log::Use;
    use crate::log::recovery::recover;
    use crate::log::scan::{SlotState, scan};
    use crate::log::superblock::{examine_superblock, read_superblock};
    use crate::log::test_log::{TestLog, Write, after_power_cut, in_sectors};
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
        let log = TestLog::new(20, false);
        let recorder = log.device();
        let device: Device = recorder.clone();
        let extension = SuperblockExtension::new(Uuid::from_u128(7), device.size());
        block_on(create(&device, Some(&extension), |_| ())).unwrap();
        let sectors = in_sectors(&recorder.writes.lock());
        let mut extended = 0;
        for flushes in 0..=*recorder.flushes.lock() {
            // Of the undurable writes, only those to the superblock region survive.
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
        assert!(matches!(
            block_on(create(&device, None, |_| ())),
            Err(LogError { kind: LogErrorKind::Geometry { .. }, .. })
        ));
        assert!(memory.content().iter().all(|&b| b == 0xa5));
    }
}
