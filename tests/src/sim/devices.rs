//! The devices of a scenario: what they hold at first, and how they fail for a while.

use super::stamp::{self, WriteId};
use fastrand::Rng;
use libwb::device::BlockDevice;
use libwb::device::sim::{Faults, SimDevice, SimRuntime};
use libwb::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, RECORD_BLOCK_OFFSET, Record, SECTOR_BYTES, SEGMENT_BYTES,
    SUPERBLOCK_REGION_BYTES, Sector, SegmentId, SuperblockExtension, decode_record,
    encode_record_block, encode_superblock_block, to_u64, to_usize,
};
use libwb::runtime::Runtime;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// A backing device as the first write leaves it.
pub fn fresh_backing(sectors: u64) -> Vec<u8> {
    let mut content = vec![0; to_usize(sectors) * SECTOR_BYTES];
    stamp::fill(&mut content, Sector(0), WriteId(0));
    content
}

/// A cache device as a fresh format leaves it.
pub fn fresh_cache(segments: u64, extended: bool) -> Vec<u8> {
    let size = SUPERBLOCK_REGION_BYTES + segments * to_u64(SEGMENT_BYTES);
    let mut content = vec![0; to_usize(size)];
    let first: &mut [u8; BLOCK_BYTES] =
        content.first_chunk_mut().expect("a cache device holds a block");
    encode_superblock_block(first);
    if extended {
        let page: &mut [u8; BLOCK_BYTES] = content[to_usize(EXTENSION_OFFSETS[0])..]
            .first_chunk_mut()
            .expect("within the superblock region");
        let extension = SuperblockExtension::new(Uuid::from_u128(0x5eed), size);
        extension.encode(page);
        let record: &mut [u8; BLOCK_BYTES] = content[to_usize(RECORD_BLOCK_OFFSET)..]
            .first_chunk_mut()
            .expect("within the superblock region");
        encode_record_block(
            record,
            Record { id: SegmentId::NONE, digest: Some(extension.digest()) },
        );
    }
    content
}

/// The newest segment that the superblock record of a cache device declares written back.
pub(super) fn record_of(cache: &[u8]) -> SegmentId {
    let block = cache[to_usize(RECORD_BLOCK_OFFSET)..].first_chunk().expect("a cache device");
    decode_record(block).map_or(SegmentId::NONE, |record| record.id)
}

/// Makes the devices fail for a while and work again, a few times.
pub(super) async fn trouble(
    runtime: SimRuntime,
    devices: [Arc<SimDevice>; 2],
    rot: bool,
    mut rng: Rng,
) {
    let [cache, backing] = devices;
    for _ in 0..rng.u32(1..5) {
        let quiet = rng.u64(1..1_000_000);
        runtime.sleep(Duration::from_micros(quiet)).await;
        let device = if rng.u32(..3) == 0 { &cache } else { &backing };
        let chance = |rng: &mut Rng| rng.choice([0.0, 0.0, 0.01, 0.2, 1.0]).unwrap_or(0.0);
        let faults =
            Faults { read: chance(&mut rng), write: chance(&mut rng), flush: chance(&mut rng) };
        device.set_faults(faults);
        let rots = rot && rng.u32(..3) == 0;
        if rots {
            rot_some(&cache, &mut rng);
        }
        // The engine gives up what it cannot read for longer.
        let longest = if rots || Arc::ptr_eq(device, &cache) { 500_000 } else { 5_000_000 };
        let trouble = rng.u64(1..longest);
        runtime.sleep(Duration::from_micros(trouble)).await;
        device.set_faults(Faults::default());
        cache.heal_rot();
    }
}

/// Makes some sectors of a device refuse writes.
pub(super) fn spoil_some(device: &SimDevice, rng: &mut Rng) {
    for _ in 0..1 << rng.u32(..6) {
        device.go_bad(rng.u64(..device.size()));
    }
}

/// Makes the cache device fail for a part of a close.
pub(super) async fn closing_trouble(runtime: SimRuntime, cache: Arc<SimDevice>, mut rng: Rng) {
    let quiet = rng.u64(..5_000);
    runtime.sleep(Duration::from_micros(quiet)).await;
    let chance = |rng: &mut Rng| rng.choice([0.0, 0.01, 0.2, 1.0]).unwrap_or(0.0);
    let flush = if rng.u32(..8) == 0 { 0.2 } else { 0.0 };
    cache.set_faults(Faults { read: chance(&mut rng), write: chance(&mut rng), flush });
    let trouble = rng.u64(1..1_000_000);
    runtime.sleep(Duration::from_micros(trouble)).await;
    cache.set_faults(Faults::default());
}

/// Rots some data of a cache device, but no header.
fn rot_some(cache: &SimDevice, rng: &mut Rng) {
    let segments = (cache.size() - SUPERBLOCK_REGION_BYTES) / to_u64(SEGMENT_BYTES);
    for _ in 0..1 << rng.u32(..10) {
        let segment = SUPERBLOCK_REGION_BYTES + rng.u64(..segments) * to_u64(SEGMENT_BYTES);
        cache.rot(segment + rng.u64(to_u64(BLOCK_BYTES)..to_u64(SEGMENT_BYTES)));
    }
}
