//! Devices with a log of distinct blocks, as a crash leaves them.

use anyhow::Result;
use futures_util::{StreamExt, TryStreamExt, stream};
use libwb::device::{Device, IoBuf};
use libwb::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, Metablock, PLACES, Reason, Record, SEGMENT_BYTES,
    SegmentExtension, SegmentId, Slot, SuperblockExtension, crc32c, encode_header,
};
use libwb::log::segment_writes::{write_extension, write_magic, write_record};

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

/// Fills the log of a formatted device with dirty blocks.
pub(crate) async fn fill(
    device: &Device,
    extension: &SuperblockExtension,
    data: Data,
) -> Result<()> {
    let slots = Geometry::of_device(device.size())?.lap();
    write_log(device, extension, data, SegmentId(slots), slots).await
}

/// Makes a cache of a device that holds zeros, with a log in its second lap. One segment in a
/// hundred is dirty.
pub(crate) async fn make_mostly_clean(
    device: &Device,
    extension: &SuperblockExtension,
) -> Result<()> {
    for generation in [0, 1] {
        let page = SuperblockExtension { generation, ..extension.clone() };
        write_extension(device, &page).await?;
    }
    write_magic(device).await?;
    let slots = Geometry::of_device(device.size())?.lap();
    write_log(device, extension, Data::Holes, SegmentId(slots + slots / 2), slots / 100).await
}

/// Fills all slots with segments up to `newest`, the last `dirty` of which are not written back.
async fn write_log(
    device: &Device,
    extension: &SuperblockExtension,
    data: Data,
    newest: SegmentId,
    dirty: u64,
) -> Result<()> {
    let geometry = Geometry::of_device(device.size())?;
    let record = Record { id: newest.minus(dirty), digest: Some(extension.digest()) };
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
        let id = geometry.id_in_slot(slot, newest);
        let written_back = id.minus(dirty.max(1));
        let claims = claims(id, written_back, extension.digest());
        header(buf.block_at_mut(0), slot, &claims, id, crc, &payload);
        device.write(geometry.slot_offset(slot), buf.into())
    });
    stream::iter(writes).buffer_unordered(depth).try_for_each(async |()| Ok(())).await?;
    write_record(device, record).await?;
    Ok(device.flush().await?)
}

/// What the header of a segment says beyond the base format.
fn claims(id: SegmentId, written_back: SegmentId, digest: u32) -> SegmentExtension {
    let durable = id.minus(UNDURABLE);
    SegmentExtension { digest, reason: Reason::Full, durable, written_back, time: 0, before: None }
}

fn header(
    block: &mut [u8; BLOCK_BYTES],
    slot: Slot,
    extension: &SegmentExtension,
    id: SegmentId,
    crc: u32,
    payload: &[u8],
) {
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
    encode_header(block, id, &metablocks, payload, Some(extension));
}
