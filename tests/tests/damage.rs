//! Nothing that stands on a device may make the reader of the log panic, loop, or run out of memory.

use futures_lite::future::block_on;
use libwb::device::{Device, MemDevice};
use libwb::format::{BLOCK_BYTES, BlockNo, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, to_u64, to_usize};
use libwb::log::history::{History, read_version};
use libwb::log::live::live_totals;
use libwb::log::recovery::recover;
use libwb::log::scan::{examine_superblock, scan, scan_headers};
use proptest::prelude::*;
use std::sync::{Arc, OnceLock};
use wb_tests::{GOLDEN, golden_bytes};

/// Bytes to be written over part of an image.
#[derive(Clone, Debug)]
struct Damage {
    at: usize,
    bytes: Vec<u8>,
}

fn image(name: usize) -> &'static [u8] {
    static IMAGES: [OnceLock<Vec<u8>>; GOLDEN.len()] = [const { OnceLock::new() }; GOLDEN.len()];
    IMAGES[name].get_or_init(|| golden_bytes(GOLDEN[name], "cache.img"))
}

/// Anywhere, but most of all where the format has meaning: the superblock, its record, and headers.
fn damage() -> impl Strategy<Value = Damage> {
    let region = to_usize(SUPERBLOCK_REGION_BYTES);
    let at = prop_oneof![
        0..16usize,
        region - 512..region - 500,
        (0..14usize, 0..16usize).prop_map(move |(slot, at)| region + slot * SEGMENT_BYTES + at),
        (0..14usize, 512..BLOCK_BYTES).prop_map(move |(slot, at)| region + slot * SEGMENT_BYTES + at),
        0..8usize << 20,
    ];
    (at, prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Damage { at, bytes })
}

/// Segments whose checksum is right although their content makes no sense.
fn reseal(image: &mut [u8], slot: usize) {
    let start = to_usize(SUPERBLOCK_REGION_BYTES) + slot * SEGMENT_BYTES;
    let segment = &mut image[start..start + SEGMENT_BYTES];
    let end = BLOCK_BYTES * (1 + usize::from(segment[12].min(127)));
    let sum = libwb::format::crc32c(&segment[512..end]);
    segment[8..12].copy_from_slice(&sum.to_le_bytes());
}

fn read_everything(image: Vec<u8>) {
    let slots = image.len() / SEGMENT_BYTES;
    let device: Device = Arc::new(MemDevice::with_content("cache", image));
    let superblock = block_on(examine_superblock(&device)).expect("a size that suits");
    let geometry = superblock.geometry;
    for headers_only in [false, true] {
        let mut history = History::of(BlockNo(0));
        let visit = |slot, content: &_| history.visit(slot, content);
        let states = if headers_only {
            block_on(scan_headers(&device, geometry, visit))
        } else {
            block_on(scan(&device, geometry, visit))
        };
        let recovery = recover(&superblock.or_no_record(), &states);
        assert!(recovery.live_count() <= to_u64(slots));
        block_on(live_totals(&device, geometry, &recovery, Some(32768))).expect("live segments are there");
        for version in history.into_versions() {
            block_on(read_version(&device, geometry, &version)).expect("versions lie on the device");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn damaged_devices_are_read_without_panic(
        name in 0..GOLDEN.len(),
        damage in prop::collection::vec(damage(), 1..12),
        resealed in prop::collection::vec(0..14usize, 0..4),
        cut in prop_oneof![Just(0usize), 0..12 * SEGMENT_BYTES / 512],
    ) {
        let mut image = image(name).to_vec();
        for Damage { at, bytes } in damage {
            let end = image.len().min(at + bytes.len());
            image[at..end].copy_from_slice(&bytes[..end - at]);
        }
        for slot in resealed {
            reseal(&mut image, slot);
        }
        image.truncate(image.len() - cut * 512);
        read_everything(image);
    }
}
