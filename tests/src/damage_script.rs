//! Scripts that make sound or damaged images of cache devices. They are short enough for a fuzzer
//! to change byte by byte.

use crate::crashed::{CRASHED, Crashed};
use crate::{GOLDEN, cache_bytes, golden_bytes, noise};
use libwb::cache::{Cache, OpenOptions};
use libwb::device::sim::Simulation;
use libwb::device::{Device, MemDevice};
use libwb::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, HEADER_CHECKSUM_START, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES,
    Sector, SuperblockExtension, crc32c, to_usize,
};
use libwb::log::format_device::create;
use std::sync::{Arc, LazyLock};
use uuid::Uuid;

/// Size of the volumes that the images belong to.
pub const VOLUME_BYTES: u64 = 16 << 20;
/// How many images a script may start from: the golden ones, an empty one, two that wb wrote, and
/// crashed caches.
pub const BASES: usize = GOLDEN.len() + 3 + CRASHED_BASES;
/// How many of [`CRASHED`] have small segments.
pub const CRASHED_BASES: usize = 4;
/// Segments of the images that are not golden.
const SEGMENTS: u32 = 6;
/// The most changes of a script. Decoding ignores more.
const MAX_CHANGES: usize = 64;

/// An image, and the changes to it, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DamageScript {
    /// Which of [`BASES`] images; any number names one.
    pub base: u8,
    /// What is changed.
    pub changes: Vec<Change>,
}

/// A change to an image. It leaves out whatever lies outside the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Writes bytes, at most 255.
    Write {
        /// Where.
        at: u32,
        /// What.
        bytes: Vec<u8>,
    },
    /// Makes the checksums of a segment match its content.
    Reseal {
        /// Which slot.
        slot: u8,
        /// Also the checksums of single blocks, which the extension keeps.
        blocks: bool,
    },
    /// Makes the CRC of a superblock extension right.
    ResealPage {
        /// The second copy.
        second: bool,
    },
    /// Copies a segment to another slot.
    Copy {
        /// Its slot.
        from: u8,
        /// The other.
        to: u8,
    },
    /// Cuts off the end of the device.
    Cut {
        /// How many sectors.
        sectors: u16,
    },
    /// Flips a bit.
    Flip {
        /// In which byte.
        at: u32,
        /// Which; any number names one.
        bit: u8,
    },
}

impl DamageScript {
    /// Decodes a script from any bytes.
    pub fn decode(bytes: &[u8]) -> DamageScript {
        let Some((&base, mut rest)) = bytes.split_first() else { return DamageScript::default() };
        let mut changes = Vec::new();
        while changes.len() < MAX_CHANGES
            && let Some(change) = Change::decode(&mut rest)
        {
            changes.push(change);
        }
        DamageScript { base, changes }
    }

    /// The bytes of a script.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.base];
        self.changes.iter().for_each(|change| change.encode(&mut bytes));
        bytes
    }

    /// The crashed cache and the bit, if the script does nothing but flip one bit of a crashed
    /// cache.
    pub fn flipped(&self) -> Option<(&'static Crashed, u64, u8)> {
        let base = (usize::from(self.base) % BASES).checked_sub(BASES - CRASHED_BASES)?;
        match self.changes[..] {
            [Change::Flip { at, bit }] => Some((&CRASHED[base], at.into(), bit % 8)),
            _ => None,
        }
    }

    /// Makes the image.
    pub fn build(&self) -> Vec<u8> {
        let mut image = IMAGES[usize::from(self.base) % BASES].clone();
        self.changes.iter().for_each(|change| change.apply(&mut image));
        image
    }
}

impl Change {
    /// Takes a change off the front of some bytes; `None` if they are too few.
    fn decode(bytes: &mut &[u8]) -> Option<Change> {
        let mut take = |n: usize| bytes.split_off(..n);
        Some(match take(1)?[0] % 6 {
            0 => {
                let at = u32::from_le_bytes(take(4)?.try_into().ok()?);
                let length = usize::from(take(1)?[0]);
                Change::Write { at, bytes: take(length)?.to_vec() }
            }
            1 => Change::Reseal { slot: take(1)?[0], blocks: take(1)?[0] % 2 == 1 },
            2 => Change::ResealPage { second: take(1)?[0] % 2 == 1 },
            3 => Change::Copy { from: take(1)?[0], to: take(1)?[0] },
            4 => Change::Cut { sectors: u16::from_le_bytes(take(2)?.try_into().ok()?) },
            _ => {
                Change::Flip { at: u32::from_le_bytes(take(4)?.try_into().ok()?), bit: take(1)?[0] }
            }
        })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Change::Write { at, bytes } => {
                let bytes = &bytes[..bytes.len().min(255)];
                out.push(0);
                out.extend(at.to_le_bytes());
                out.extend(u8::try_from(bytes.len()));
                out.extend(bytes);
            }
            Change::Reseal { slot, blocks } => out.extend([1, *slot, u8::from(*blocks)]),
            Change::ResealPage { second } => out.extend([2, u8::from(*second)]),
            Change::Copy { from, to } => out.extend([3, *from, *to]),
            Change::Cut { sectors } => {
                out.push(4);
                out.extend(sectors.to_le_bytes());
            }
            Change::Flip { at, bit } => {
                out.push(5);
                out.extend(at.to_le_bytes());
                out.push(*bit);
            }
        }
    }

    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Change::Write { at, bytes } => {
                let at = to_usize(u64::from(*at)).min(image.len());
                let end = image.len().min(at + bytes.len());
                image[at..end].copy_from_slice(&bytes[..end - at]);
            }
            Change::Reseal { slot, blocks } => {
                if let Some(segment) = image.get_mut(slot_range(*slot)) {
                    reseal(segment, *blocks);
                }
            }
            Change::ResealPage { second } => {
                let at = to_usize(EXTENSION_OFFSETS[usize::from(*second)]);
                if let Some(page) = image.get_mut(at..at + BLOCK_BYTES) {
                    let sum = crc32c(&page[..BLOCK_BYTES - 4]);
                    page[BLOCK_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
                }
            }
            Change::Copy { from, to } => {
                let (from, to) = (slot_range(*from), slot_range(*to));
                if from.end <= image.len() && to.end <= image.len() {
                    image.copy_within(from, to.start);
                }
            }
            Change::Cut { sectors } => {
                image.truncate(image.len().saturating_sub(usize::from(*sectors) * 512));
            }
            Change::Flip { at, bit } => {
                if let Some(byte) = image.get_mut(to_usize(u64::from(*at))) {
                    *byte ^= 1 << (bit % 8);
                }
            }
        }
    }
}

fn slot_range(slot: u8) -> std::ops::Range<usize> {
    let start = to_usize(SUPERBLOCK_REGION_BYTES) + usize::from(slot) * SEGMENT_BYTES;
    start..start + SEGMENT_BYTES
}

/// wb(5) has the offsets.
fn reseal(segment: &mut [u8], blocks: bool) {
    let length = usize::from(segment[12].min(127));
    for nth in (0..length).filter(|_| blocks) {
        let sum = crc32c(&segment[BLOCK_BYTES * (1 + nth)..][..BLOCK_BYTES]);
        let metablock = &mut segment[HEADER_CHECKSUM_START + 16 * nth..][..16];
        metablock[9] |= 1;
        metablock[12..].copy_from_slice(&sum.to_le_bytes());
    }
    let sum = crc32c(&segment[HEADER_CHECKSUM_START..BLOCK_BYTES * (1 + length)]);
    segment[8..12].copy_from_slice(&sum.to_le_bytes());
    if &segment[16..20] == b"wbsg" {
        if segment[56] == 1 {
            segment[24..28].fill(0);
            segment[64..68].fill(0);
            let sum = crc32c(&segment[..512]);
            segment[64..68].copy_from_slice(&sum.to_le_bytes());
        }
        segment[24..28].fill(0);
        let sum = crc32c(&segment[..BLOCK_BYTES]);
        segment[24..28].copy_from_slice(&sum.to_le_bytes());
    }
}

static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let golden = GOLDEN.iter().map(|name| golden_bytes(name, "cache.img"));
    golden
        .chain([
            written_by_wb(false, None),
            written_by_wb(true, Some(false)),
            written_by_wb(true, Some(true)),
        ])
        .chain(CRASHED[..CRASHED_BASES].iter().map(|crashed| crashed.cache.clone()))
        .collect()
});

/// A small cache device as wb leaves it, with or without the extension. `closed` says whether wb
/// closed it after writes; `None` means no writes.
fn written_by_wb(extended: bool, closed: Option<bool>) -> Vec<u8> {
    let size = cache_bytes(SEGMENTS);
    let memory = Arc::new(MemDevice::new("cache", size));
    let device: Device = memory.clone();
    let backing = Arc::new(MemDevice::new("backing", VOLUME_BYTES));
    let extension = extended.then(|| SuperblockExtension::new(Uuid::from_u128(7), size));
    let simulation = Simulation::new(1);
    let runtime = Arc::new(simulation.runtime().clone());
    let work = async {
        create(&device, extension.as_ref(), |_| ()).await.expect("a cache");
        let Some(closed) = closed else { return };
        let cache =
            Cache::open(device, backing, runtime, OpenOptions::serve()).await.expect("a cache");
        // Writes blocks whole and in part, over and over, for more than a lap.
        for round in 0..9 {
            for nth in 0..20 {
                let sector = Sector((round * 31 + nth * nth * 3) % 900);
                let data = noise(round * 20 + nth, 512 * (1 + nth % 11));
                cache.write(sector, &data).await.expect("a write");
            }
            cache.flush().await.expect("a flush");
        }
        if closed {
            cache.close().await.expect("an orderly end");
        }
    };
    simulation.block_on(work).expect("work that ends");
    memory.content()
}

/// Scripts that fuzzing starts from: each image as it is, and each with every meaningful kind of
/// damage.
pub fn seeds() -> Vec<DamageScript> {
    let region = u32::try_from(SUPERBLOCK_REGION_BYTES).unwrap_or_default();
    let segment = u32::try_from(SEGMENT_BYTES).unwrap_or_default();
    let write = |at, bytes: &[u8]| Change::Write { at, bytes: bytes.to_vec() };
    let in_slot =
        |slot: u8, at, bytes: &[u8]| write(region + u32::from(slot) * segment + at, bytes);
    let seal = |slot| Change::Reseal { slot, blocks: false };
    let mut seeds = Vec::new();
    for base in (0u8..).take(BASES) {
        for changes in [
            vec![],
            vec![write(0, &[0; 4])],
            vec![write(region - 512, &5u64.to_le_bytes())],
            vec![in_slot(2, 0, &3u64.to_le_bytes()), in_slot(2, 12, &[2])],
            vec![in_slot(1, 5000, &[1; 40])],
            vec![in_slot(1, 512, &[8, 0, 0, 0, 0, 0, 0, 0, 0x3c]), seal(1)],
            vec![in_slot(3, 0, &4u64.to_le_bytes()), in_slot(3, 12, &[1, 0, 0, 0]), seal(3)],
            vec![Change::Copy { from: 1, to: 2 }, in_slot(2, 0, &3u64.to_le_bytes()), seal(2)],
            vec![write(64 * 1024 + 28, &[1, 0, 0, 0, 9]), Change::ResealPage { second: false }],
            vec![write(128 * 1024 + 8, &[9; 20]), Change::ResealPage { second: true }],
            vec![in_slot(0, 32, &[9; 16]), Change::Reseal { slot: 0, blocks: true }],
            vec![Change::Cut { sectors: 1024 }],
            vec![Change::Cut { sectors: 700 }],
        ] {
            seeds.push(DamageScript { base, changes });
        }
    }
    for base in (0u8..).take(BASES).skip(BASES - CRASHED_BASES) {
        let flip = |at| DamageScript {
            base,
            changes: vec![Change::Flip { at, bit: u8::try_from(at % 7).unwrap_or_default() }],
        };
        seeds.extend(flips(&IMAGES[usize::from(base)]).into_iter().map(flip));
    }
    seeds
}

/// A byte of each field: of the newest segment, of the segments in the first two slots, of the
/// record, and of a page. Each segment's first and last entry and block have such bytes, too. wb(5)
/// has the offsets.
fn flips(image: &[u8]) -> Vec<u32> {
    const HEADER: [usize; 17] = [0, 7, 8, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 57, 60, 64, 200];
    const ENTRY: [usize; 4] = [0, 8, 9, 12];
    const RECORD: [usize; 5] = [0, 8, 16, 20, 30];
    const PAGE: [usize; 12] = [0, 8, 16, 20, 28, 32, 48, 64, 128, 200, 300, 4092];
    let id = |slot: &u8| {
        u64::from_le_bytes(image[slot_range(*slot)][..8].try_into().unwrap_or_default())
    };
    let slots = (0u8..).take(SEGMENTS as usize);
    let newest = slots.max_by_key(id).unwrap_or_default();
    let mut flips: Vec<usize> =
        RECORD.map(|at| to_usize(SUPERBLOCK_REGION_BYTES) - 512 + at).to_vec();
    flips.extend(PAGE.map(|at| to_usize(EXTENSION_OFFSETS[1]) + at));
    for slot in [0, 1, newest] {
        let start = slot_range(slot).start;
        let last = usize::from(image[start + 12].saturating_sub(1));
        flips.extend(HEADER.map(|at| start + at));
        for nth in [0, last] {
            flips.extend(ENTRY.map(|at| start + HEADER_CHECKSUM_START + 16 * nth + at));
            flips.push(start + BLOCK_BYTES * (1 + nth) + 77);
        }
    }
    flips.sort_unstable();
    flips.dedup();
    flips.into_iter().filter_map(|at| u32::try_from(at).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_read_as_it_was_written() {
        for script in seeds() {
            assert_eq!(DamageScript::decode(&script.encode()), script);
        }
    }

    #[test]
    fn what_is_resealed_is_sound() {
        for (at, image) in IMAGES.iter().enumerate() {
            for slot in 0..SEGMENTS {
                let slot = u8::try_from(slot).unwrap();
                let mut again = image[slot_range(slot)].to_vec();
                reseal(&mut again, false);
                // An empty slot has no checksum.
                assert!(
                    again[..8] == [0; 8] || again == image[slot_range(slot)],
                    "image {at}, slot {slot}"
                );
            }
        }
    }
}
