//! One bit flips in a cache whose process was killed after it flushed all writes. Then the volume
//! is whole, or the engine refuses it. If nothing on the device reveals the flip, only the newest
//! commit of the newest segment may be lost, which nothing proves durable.

use libwb::cache::{Cache, OpenOptions};
use libwb::device::sim::Simulation;
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{
    BLOCK_BYTES, BlockNo, EXTENSION_OFFSETS, Geometry, SECTOR_BYTES, SUPERBLOCK_REGION_BYTES,
    SegmentHeader, Slot, to_u64, to_usize,
};
use libwb::log::recovery::recover;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use wb_tests::bit_flip::{FlipEffect, Subject};
use wb_tests::crashed::{CRASHED, Crashed};
use wb_tests::recovered_view::RecoveredView;

/// One in this many flips is tried on the engine itself.
const ENGINE_EVERY: usize = 499;
/// If a segment has more entries than this, the test flips only some of them.
const MANY: u8 = 32;

/// The fields of the first sector of a header: where they begin. See wb(5).
const HEADER: [(usize, &str); 16] = [
    (0, "id"),
    (8, "checksum"),
    (12, "length"),
    (13, "padding"),
    (16, "marker"),
    (20, "digest"),
    (24, "CRC of the header"),
    (28, "reason"),
    (29, "padding"),
    (32, "durable"),
    (40, "written back"),
    (48, "time"),
    (56, "has commits"),
    (57, "commit before"),
    (64, "CRC of the sector"),
    (68, "padding"),
];
/// Of an entry.
const ENTRY: [(usize, &str); 5] =
    [(0, "address"), (8, "dirty bits"), (9, "flags"), (10, "padding"), (12, "CRC of the data")];
/// Of the sector of the superblock record.
const RECORD: [(usize, &str); 5] =
    [(0, "id"), (8, "marker"), (16, "digest"), (20, "CRC of the sector"), (24, "padding")];
/// Of a page of the superblock extension.
const PAGE: [(usize, &str); 13] = [
    (0, "marker"),
    (8, "generation"),
    (16, "version"),
    (20, "features"),
    (28, "clean mark"),
    (40, "time"),
    (48, "UUID"),
    (64, "label"),
    (128, "size of the backing device"),
    (136, "identity of the backing device"),
    (200, "size of the cache device"),
    (208, "padding"),
    (4092, "CRC"),
];

/// A field of a cache device.
struct Field {
    at: Range<u64>,
    part: &'static str,
    name: &'static str,
    /// Whether a checksum covers it, so that nothing may be silently lost.
    is_proved: bool,
    /// The distance between two bytes that are flipped.
    step: usize,
    /// How many bits of each byte are flipped.
    bits: u8,
}

fn fields(names: &[(usize, &'static str)], size: usize, at: u64, part: &'static str) -> Vec<Field> {
    let ends = names.iter().skip(1).map(|(begin, _)| *begin).chain([size]);
    let field = |(&(begin, name), end): (&(usize, &'static str), usize)| {
        let at = at + to_u64(begin)..at + to_u64(end);
        Field { at, part, name, is_proved: true, step: 1, bits: 8 }
    };
    names.iter().zip(ends).map(field).collect()
}

/// All fields to flip in a device. Of the unused bytes of pages, only some unless it `is_first`.
fn all_fields(crashed: &Crashed, sound: &RecoveredView, is_first: bool) -> Vec<Field> {
    let geometry = Geometry::of_device(to_u64(crashed.cache.len())).expect("a cache");
    let mut all =
        fields(&RECORD, SECTOR_BYTES, SUPERBLOCK_REGION_BYTES - to_u64(SECTOR_BYTES), "record");
    for at in EXTENSION_OFFSETS {
        all.extend(fields(&PAGE, BLOCK_BYTES, at, "page"));
    }
    if !is_first {
        all.iter_mut()
            .filter(|field| field.part == "page" && field.name == "padding")
            .for_each(|field| field.step = 61);
    }
    let mut is_empty_done = false;
    for slot in geometry.all_slots() {
        let at = geometry.slot_offset(slot);
        let block = crashed.cache[to_usize(at)..].first_chunk().expect("a block");
        let header = SegmentHeader::decode(block).expect("a sound header");
        let live = sound.recovery.live().find(|id| *id == header.id);
        let part = match live {
            _ if header.id.0 == 0 => "empty slot",
            None => "segment that is written back",
            Some(id) if id == sound.recovery.point => "newest segment",
            Some(_) => "live segment",
        };
        if header.id.0 == 0 && std::mem::replace(&mut is_empty_done, true) {
            continue;
        }
        all.extend(fields(&HEADER, SECTOR_BYTES, at, part));
        all.extend(of_blocks(geometry, slot, &header, part));
    }
    all
}

/// The entries of a segment and their data.
fn of_blocks(
    geometry: Geometry,
    slot: Slot,
    header: &SegmentHeader,
    part: &'static str,
) -> Vec<Field> {
    let at = geometry.slot_offset(slot);
    let before =
        header.extension.and_then(|extension| extension.before).map_or(0, |commit| commit.length);
    let mut all = Vec::new();
    let is_edge = |index| index + 1 == before || index == before || index + 1 == header.length();
    let is_tried =
        |index: &u8| header.length() <= MANY || index.is_multiple_of(16) || is_edge(*index);
    for index in (0..header.length()).filter(is_tried) {
        let (entry, data) = match part {
            "newest segment" if index < before => {
                ("entry of the commit before", "data of the commit before")
            }
            "newest segment" => ("entry of the newest commit", "data of the newest commit"),
            _ => ("entry", "data"),
        };
        let nth = to_u64(usize::from(index));
        let entries = at + 512 + 16 * nth;
        let named = fields(&ENTRY, 16, entries, part);
        all.extend(named.into_iter().map(|field| Field { name: entry, is_proved: false, ..field }));
        let data_at = at + to_u64(BLOCK_BYTES) * (1 + nth);
        let at = data_at..data_at + to_u64(BLOCK_BYTES);
        all.push(Field { at, part, name: data, is_proved: false, step: SECTOR_BYTES, bits: 1 });
    }
    all
}

impl Field {
    /// The bits to flip.
    fn flips(&self) -> impl Iterator<Item = (u64, u8)> {
        let (step, bits) = (self.step, self.bits);
        // Not always at the same place of a sector.
        let within =
            move |at: u64| if step == SECTOR_BYTES { at + at / 512 * 37 % 512 } else { at };
        let places = self.at.clone().step_by(step).map(within);
        places.flat_map(move |at| (0..bits).map(move |bit| (at, bit)))
    }
}

/// How many flips had which effect.
#[derive(Clone, Copy, Default)]
struct Counts {
    whole: u64,
    refused: u64,
    lost: u64,
    wrong: u64,
}

impl Counts {
    fn add(&mut self, outcome: &FlipEffect) {
        match outcome {
            FlipEffect::Whole => self.whole += 1,
            FlipEffect::Refused => self.refused += 1,
            FlipEffect::UnprovenLost => self.lost += 1,
            FlipEffect::Wrong(_) => self.wrong += 1,
        }
    }

    fn add_all(&mut self, other: &Counts) {
        self.whole += other.whole;
        self.refused += other.refused;
        self.lost += other.lost;
        self.wrong += other.wrong;
    }
}

/// The blocks as the engine reads them from a cache; `None` where it refuses.
fn served_by_engine(
    cache: &Device,
    backing: &[u8],
    blocks: &[BlockNo],
) -> Option<Vec<Option<Vec<u8>>>> {
    let simulation = Simulation::new(1);
    let backing: Device = Arc::new(MemDevice::with_content("backing", backing.to_vec()));
    let runtime = Arc::new(simulation.runtime().clone());
    let work = async {
        let cache =
            Cache::open(cache.clone(), backing, runtime, OpenOptions::read_only()).await.ok()?;
        let mut served = Vec::new();
        for block in blocks {
            let read = cache.read(block.sector(), IoBuf::zeroed(BLOCK_BYTES)).await;
            served.push(read.ok().map(|data| data.to_vec()));
        }
        Some(served)
    };
    simulation.block_on(work).expect("an end")
}

/// Whether the engine confirms the judgement of a flipped bit.
fn is_judged_right(
    subject: &Subject,
    crashed: &Crashed,
    (at, bit): (u64, u8),
    judged: &FlipEffect,
) -> bool {
    let blocks: Vec<BlockNo> = subject.view().blocks.keys().copied().collect();
    subject.flip(at, bit);
    let served = served_by_engine(subject.device(), &crashed.backing, &blocks);
    subject.flip(at, bit);
    let Some(served) = served else { return *judged == FlipEffect::Refused };
    let is_lost = |(data, block): (&Option<Vec<u8>>, &BlockNo)| {
        data.as_ref().is_some_and(|data| data[..] != *subject.block(*block))
    };
    match judged {
        FlipEffect::Whole => served.iter().zip(&blocks).all(|(data, block)| {
            data.as_ref().is_some_and(|data| data[..] == *subject.block(*block))
        }),
        FlipEffect::Refused => {
            served.iter().any(Option::is_none) && !served.iter().zip(&blocks).any(is_lost)
        }
        FlipEffect::UnprovenLost | FlipEffect::Wrong(_) => served.iter().zip(&blocks).any(is_lost),
    }
}

type Table = BTreeMap<(&'static str, &'static str), Counts>;

/// The effects of the flips of one cache, and what is wrong with them: for each field, how often
/// and an example.
fn flip_all(crashed: &Crashed, is_first: bool) -> (Table, Vec<String>) {
    let subject =
        Subject::new(crashed.cache.clone(), crashed.backing.clone(), recover).expect("a sound log");
    let blocks = to_u64(crashed.volume.len() / BLOCK_BYTES);
    let is_served = |block: BlockNo| {
        *subject.block(block) == crashed.volume[to_usize(block.bytes())..][..BLOCK_BYTES]
    };
    assert!((0..blocks).map(BlockNo).all(is_served), "{}: not what was flushed", crashed.name);
    let mut table = Table::new();
    let mut faults: BTreeMap<(&str, &str, String), (u64, String)> = BTreeMap::new();
    let mut flips = 0;
    for field in all_fields(crashed, subject.view(), is_first) {
        for (at, bit) in field.flips() {
            let outcome = subject.judge(at, bit);
            table.entry((field.part, field.name)).or_default().add(&outcome);
            flips += 1;
            let fault = match &outcome {
                FlipEffect::Wrong(_) => "loses what is proved to have been durable",
                FlipEffect::UnprovenLost if field.is_proved => "loses what was flushed",
                _ if flips % ENGINE_EVERY != 0 => continue,
                _ if is_judged_right(&subject, crashed, (at, bit), &outcome) => continue,
                _ => "is not what the engine makes of it",
            };
            let example = format!("byte {at}, bit {bit}: {outcome:?}");
            faults.entry((field.part, field.name, fault.into())).or_insert((0, example)).0 += 1;
        }
    }
    let faults = faults.into_iter().map(|((part, field, fault), (n, example))| {
        format!("{}: {part}, {field}: {fault}, {n} times; such as {example}", crashed.name)
    });
    (table, faults.collect())
}

#[test]
fn a_flipped_bit_costs_nothing_in_silence_that_the_device_can_prove() {
    let done: Vec<(Table, Vec<String>)> = std::thread::scope(|scope| {
        let work = CRASHED.iter().enumerate();
        let work: Vec<_> =
            work.map(|(nth, crashed)| scope.spawn(move || flip_all(crashed, nth == 0))).collect();
        work.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let mut table = Table::new();
    for (field, counts) in done.iter().flat_map(|(table, _)| table) {
        table.entry(*field).or_default().add_all(counts);
    }
    println!(
        "{:<30}{:<32}{:>9}{:>9}{:>9}{:>9}",
        "part", "field", "whole", "refused", "unproven", "WRONG"
    );
    for ((part, field), Counts { whole, refused, lost, wrong }) in &table {
        println!("{part:<30}{field:<32}{whole:>9}{refused:>9}{lost:>9}{wrong:>9}");
    }
    let faults: Vec<String> = done.into_iter().flat_map(|(_, faults)| faults).collect();
    assert!(faults.is_empty(), "flips are lost in silence, or misjudged:\n{}", faults.join("\n"));
}
