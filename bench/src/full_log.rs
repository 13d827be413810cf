//! Devices whose log is full of distinct dirty blocks, as a crash leaves them.

use anyhow::Result;
use futures_util::{StreamExt, TryStreamExt, stream};
use libwb::device::{Device, IoBuf};
use libwb::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, Metablock, PLACES, Reason, SEGMENT_BYTES,
    SegmentExtension, SegmentId, Slot, SuperblockExtension, crc32c, encode_header,
};

/// Blocks of the volume: 1 TiB.
pub(crate) const VOLUME_BLOCKS: u64 = 1 << 28;
/// A segment's header says that the log is durable up to this many segments before itself.
const UNDURABLE: u64 = 8;

/// What the data blocks hold.
pub(crate) enum Data {
    /// Zeros, which are not written: the device already holds zeros.
    Holes,
    /// Anything but zeros, written out.
    Written,
}

/// Fills the log of a formatted device.
pub(crate) async fn fill(
    device: &Device,
    extension: &SuperblockExtension,
    data: Data,
) -> Result<()> {
    let geometry = Geometry::of_device(device.size())?;
    let (bytes, depth, byte) = match data {
        Data::Holes => (BLOCK_BYTES, 64, 0),
        Data::Written => (SEGMENT_BYTES, 8, 0xa5),
    };
    let payload = vec![byte; SEGMENT_BYTES - BLOCK_BYTES];
    let crc = crc32c(&payload[..BLOCK_BYTES]);
    let writes = geometry.all_slots().map(|slot| {
        let mut buf = IoBuf::zeroed(bytes);
        if bytes > BLOCK_BYTES {
            buf[BLOCK_BYTES..].copy_from_slice(&payload);
        }
        header(buf.block_at_mut(0), slot, extension.digest(), crc, &payload);
        device.write(geometry.slot_offset(slot), buf.into())
    });
    stream::iter(writes).buffer_unordered(depth).try_for_each(async |()| Ok(())).await?;
    Ok(device.flush().await?)
}

fn header(block: &mut [u8; BLOCK_BYTES], slot: Slot, digest: u32, crc: u32, payload: &[u8]) {
    // Blocks are distinct and scattered over the volume: the factor is odd.
    let block_at = |place: u64| BlockNo(place.wrapping_mul(0x9e37_79b9_7f4a_7c15) % VOLUME_BLOCKS);
    let first = u64::from(slot.0) * u64::from(PLACES);
    let metablocks: Vec<_> = (first..first + u64::from(PLACES))
        .map(|place| Metablock {
            block: block_at(place),
            dirty: DirtyBits::ALL,
            crc: Some(crc),
            lost: false,
        })
        .collect();
    let id = SegmentId(u64::from(slot.0) + 1);
    let extension = SegmentExtension {
        digest,
        reason: Reason::Full,
        durable: SegmentId(id.0.saturating_sub(UNDURABLE)),
        written_back: SegmentId::NONE,
        time: 0,
        before: None,
    };
    encode_header(block, id, &metablocks, payload, Some(&extension));
}
