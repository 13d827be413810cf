//! Finding segments of a cache on a device that has lost its superblock.

use super::scan::{SlotState, read_slot};
use crate::device::{Device, IoBuf};
use crate::format::{BLOCK_BYTES, Geometry, SECTOR_BYTES, SegmentHeader, SegmentId, Slot};
use futures_util::{StreamExt, stream};

/// Headers to read at once; one block of memory each.
const HEADER_DEPTH: usize = 128;
/// How many segments without the extension to read whole at most, to verify them.
const READ_WHOLE: usize = 16;
/// The bytes that the base format uses in a header's first sector.
const BASE_HEADER_BYTES: usize = 13;

/// Looks for a segment, which proves that the device was a cache device. Other data never counts as
/// one: the CRC of the header, or the checksum of the segment, must be correct. Unreadable slots
/// are skipped. Calls `progress` with each slot.
pub async fn find_segment(
    device: &Device,
    geometry: Geometry,
    mut progress: impl FnMut(Slot),
) -> Option<SegmentId> {
    let read = |slot| async move {
        let block = device.read(geometry.slot_offset(slot), IoBuf::zeroed(BLOCK_BYTES)).await;
        (slot, block)
    };
    let mut headers = stream::iter(geometry.all_slots().map(read)).buffered(HEADER_DEPTH);
    let mut to_read_whole = READ_WHOLE;
    while let Some((slot, block)) = headers.next().await {
        progress(slot);
        let Ok(block) = block else { continue };
        let Ok(header) = SegmentHeader::decode(block.block_at(0)) else { continue };
        if header.id == SegmentId::NONE {
            continue;
        }
        if header.extension.is_some() {
            return Some(header.id);
        }
        let is_plain = block[BASE_HEADER_BYTES..SECTOR_BYTES].iter().all(|&byte| byte == 0);
        if is_plain && geometry.slot_of(header.id) == slot && to_read_whole > 0 {
            to_read_whole -= 1;
            if let SlotState::Valid { id, .. } = read_slot(device, geometry, slot).await.state {
                return Some(id);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::test_log::TestLog;
    use super::*;
    use crate::device::MemDevice;
    use crate::format::{SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, to_u64, to_usize};
    use futures_lite::future::block_on;
    use std::sync::Arc;

    fn found(image: Vec<u8>) -> Option<u64> {
        let geometry = Geometry::of_device(to_u64(image.len())).unwrap();
        let device: Device = Arc::new(MemDevice::with_content("cache", image));
        block_on(find_segment(&device, geometry, |_| ())).map(|id| id.0)
    }

    const REGION: usize = to_usize(SUPERBLOCK_REGION_BYTES);

    #[test]
    fn a_segment_of_either_format_is_found_without_the_superblock() {
        for extended in [true, false] {
            let mut image = TestLog::new(20, extended).image;
            image[..REGION].fill(0);
            assert_eq!(found(image.clone()), Some(15), "the first slot holds the second lap");
            // Only one segment is left.
            let one = image[REGION + 3 * SEGMENT_BYTES..][..SEGMENT_BYTES].to_vec();
            image[REGION..].fill(0);
            image[REGION + 3 * SEGMENT_BYTES..][..SEGMENT_BYTES].copy_from_slice(&one);
            assert_eq!(found(image), Some(18));
        }
    }

    #[test]
    fn other_data_is_not_taken_for_a_segment() {
        let size = REGION + 40 * SEGMENT_BYTES;
        assert_eq!(found(vec![0; size]), None);
        assert_eq!(found(vec![0xff; size]), None);
        let mut random = fastrand::Rng::with_seed(1);
        let noise: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(size).collect();
        assert_eq!(found(noise.clone()), None);
        // Slots with a possible id and then noise: only some of them are read whole.
        let mut numbers = noise;
        for slot in 0..40 {
            let sector = &mut numbers[REGION + slot * SEGMENT_BYTES..][..SECTOR_BYTES];
            sector.fill(0);
            sector[0] = u8::try_from(slot + 1).unwrap();
        }
        assert_eq!(found(numbers), None);
    }
}
