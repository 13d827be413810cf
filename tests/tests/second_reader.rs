//! The second reader of the format (`tests/reader`), written from wb(5) alone, and libwb agree on
//! every device: whether it is refused, which segments count, and what the volume holds.

use fastrand::Rng;
use futures_lite::future::block_on;
use libwb::cache::{Cache, CacheError, OpenOptions};
use libwb::device::sim::{SimDevice, Simulation};
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{
    BLOCK_BYTES, BlockNo, RECORD_BLOCK_OFFSET, Record, SECTOR_BYTES, SUPERBLOCK_REGION_BYTES,
    Sector, SegmentHeader, SegmentId, SuperblockExtension, decode_record, to_u64, to_usize,
};
use libwb::log::Use;
use libwb::log::recovery::recover;
use libwb::log::scan::scan;
use libwb::log::superblock::read_superblock;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use tempfile::TempDir;
use wb_tests::crashed::CRASHED;
use wb_tests::damage_script::{BASES, Change, DamageScript, VOLUME_BYTES, seeds};
use wb_tests::sim::real::WriteCache;
use wb_tests::sim::run_watched;
use wb_tests::{GOLDEN, crafted, golden_bytes, has_program, noise, skip};

/// `WB_READER_FIRST` and `WB_READER_DEVICES` choose which damaged devices to try, and how many.
const DAMAGED: u64 = 250;
/// How many random logs to read.
const CRAFTED: u64 = 120;
/// How many scenarios of the simulator to read.
const SCENARIOS: u64 = 12;
/// How many devices that differ a report names.
const SHOWN: usize = 5;

/// The second reader, which reads one device after the other.
struct Reader {
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    dir: TempDir,
    /// The backing device that lies there.
    backing: Vec<u8>,
    different: Vec<String>,
    refused: usize,
    accepted: usize,
}

impl Reader {
    /// Starts the reader; `None` without Python.
    fn start() -> Option<Reader> {
        if !has_program("python3") {
            return None;
        }
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("reader/reader.py");
        let mut command = Command::new("python3");
        // Python must not leave compiled files in the source tree.
        command
            .args(["-B".as_ref(), program.as_os_str()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3");
        let (questions, answers) = (child.stdin.take(), child.stdout.take().expect("a pipe"));
        let dir = TempDir::new().expect("a temporary folder");
        let answers = BufReader::new(answers);
        let (backing, different) = (Vec::new(), Vec::new());
        Some(Reader { child, questions, answers, dir, backing, different, refused: 0, accepted: 0 })
    }

    fn read(&mut self, cache: &[u8], backing: &[u8]) -> Value {
        let paths = ["cache", "backing"].map(|name| self.dir.path().join(name));
        std::fs::write(&paths[0], cache).expect("room for an image");
        // As a rule, it is the same for one cache after the other.
        if self.backing != backing {
            self.backing = backing.to_vec();
            std::fs::write(&paths[1], backing).expect("room for an image");
        }
        let questions = self.questions.as_mut().expect("a reader that goes on");
        let [cache, backing] = paths.each_ref().map(|path| path.display());
        writeln!(questions, "{cache}\t{backing}").expect("a reader that goes on");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("an answer in UTF-8");
        serde_json::from_str(&answer).expect("an answer in JSON")
    }

    /// Has both read a device.
    fn compare(&mut self, name: &str, cache: &[u8], backing: &[u8]) {
        let mut theirs = self.read(cache, backing);
        let mut ours = made_by_libwb(cache, backing);
        let reasons = theirs["refused"].as_array().expect("a list of reasons").clone();
        theirs["refused"] = json!(!reasons.is_empty());
        if ours["unreadable"] == "at open"
            && theirs["unreadable"].as_array().is_some_and(|it| !it.is_empty())
        {
            // libwb notices unreadable blocks earlier.
            ours["unreadable"] = theirs["unreadable"].clone();
        }
        if reasons.is_empty() {
            self.accepted += 1;
        } else {
            self.refused += 1;
        }
        if theirs != ours {
            let reasons = Value::from(reasons);
            self.different.push(format!("{name}: reader.py: {theirs} {reasons}\n libwb: {ours}"));
        }
    }

    /// Checks that there was no difference.
    fn end(mut self) {
        self.questions = None;
        assert!(self.child.wait().expect("an end").success());
        println!("{} devices were accepted, {} refused", self.accepted, self.refused);
        let (number, shown) = (self.different.len(), self.different.iter().take(SHOWN));
        let text: Vec<&str> = shown.map(String::as_str).collect();
        assert!(text.is_empty(), "{number} devices differ:\n{}", text.join("\n"));
    }
}

/// libwb's view of a device, in the reader's terms.
fn made_by_libwb(cache: &[u8], backing: &[u8]) -> Value {
    let device: Device = Arc::new(MemDevice::with_content("cache", cache.to_vec()));
    let Ok(superblock) = block_on(read_superblock(&device, Use::Read)) else {
        return json!({"refused": true});
    };
    let slots = block_on(scan(&device, superblock.geometry, |_, _| ()));
    let recovery = recover(&superblock, &slots);
    let ids = |ids: &[SegmentId]| ids.iter().map(|id| id.0).collect::<Vec<_>>();
    let mut found = json!({
        "refused": !recovery.corruption.is_empty(),
        "record": recovery.record.0,
        "written_back": recovery.written_back.0,
        "highest": recovery.highest.0,
        "point": recovery.point.0,
        "skipped": ids(&recovery.skipped),
        "dropped": ids(&recovery.dropped),
        "live": ids(&recovery.live().collect::<Vec<_>>()),
        "read_only": block_on(read_superblock(&device, Use::Write)).is_err(),
    });
    if recovery.corruption.is_empty() {
        let simulation = Simulation::new(1);
        let backing = Arc::new(MemDevice::with_content("backing", backing.to_vec()));
        let runtime = Arc::new(simulation.runtime().clone());
        let opening = Cache::open(device, backing, runtime, OpenOptions::read_only());
        match simulation.block_on(opening).expect("an end") {
            Err(CacheError::Log(_)) => found["refused"] = true.into(),
            Err(CacheError::Device(_)) => found["unreadable"] = "at open".into(),
            Err(error) => panic!("{error}"),
            Ok(cache) => read_volume(&simulation, &cache, &mut found),
        }
    }
    found
}

fn read_volume(simulation: &Simulation, cache: &Cache, found: &mut Value) {
    const CHUNK: u64 = 1 << 20;
    let read = |at: u64, bytes: u64| {
        let buffer = IoBuf::zeroed(to_usize(bytes.min(cache.size() - at)));
        simulation
            .block_on(cache.read(Sector(at / to_u64(SECTOR_BYTES)), buffer))
            .expect("an end")
            .ok()
    };
    let mut hasher = Sha256::new();
    let mut unreadable = Vec::new();
    for at in (0..cache.size()).step_by(to_usize(CHUNK)) {
        if let Some(data) = read(at, CHUNK) {
            hasher.update(&data[..]);
            continue;
        }
        let end = cache.size().min(at + CHUNK);
        let blocks = (at..end).step_by(BLOCK_BYTES).map(|at| BlockNo(at / to_u64(BLOCK_BYTES)));
        unreadable
            .extend(blocks.filter(|b| read(b.bytes(), to_u64(BLOCK_BYTES)).is_none()).map(|b| b.0));
    }
    if unreadable.is_empty() {
        found["sha256"] = hash(hasher).into();
    }
    found["unreadable"] = unreadable.into();
}

macro_rules! reader {
    () => {
        match Reader::start() {
            Some(reader) => reader,
            None => skip!("needs python3"),
        }
    };
}

#[test]
fn a_second_reader_reads_the_golden_devices() {
    let mut reader = reader!();
    for name in GOLDEN {
        let [cache, backing] = ["cache.img", "backing.img"].map(|which| golden_bytes(name, which));
        reader.compare(name, &cache, &backing);
    }
    reader.end();
}

#[test]
fn a_second_reader_reads_crafted_devices() {
    let mut reader = reader!();
    let backing = noise(1, VOLUME_BYTES);
    for crashed in CRASHED.iter() {
        reader.compare(crashed.name, &crashed.cache, &crashed.backing);
    }
    for (name, cache) in crafted::devices() {
        reader.compare(&name, &cache, &backing);
    }
    for seed in 0..CRAFTED {
        reader.compare(
            &format!("crafted at random, seed {seed}"),
            &crafted::random(seed),
            &backing,
        );
    }
    for script in seeds() {
        reader.compare(&format!("{script:?}"), &script.build(), &backing);
    }
    reader.end();
}

/// Two kinds of damage at once, which hardly any seed has: to the newest segment of a cache that
/// was not closed.
#[test]
fn a_second_reader_reads_what_is_torn_and_damaged() {
    let header_at = |slot: u8| (1 << 20) + u32::from(slot) * (512 << 10);
    // The newest commit of an open segment, and how many blocks that and the one before have.
    let commits = |image: &[u8], slot| {
        let header = image.get(to_usize(u64::from(header_at(slot)))..)?.get(..BLOCK_BYTES)?;
        let (length, before) = (u32::from(header[12]), u32::from(header[57]));
        (header[28] == 6 && length > before && before > 0).then_some(length)
    };
    let image = |base| DamageScript { base, changes: Vec::new() }.build();
    let bases = u8::try_from(GOLDEN.len()).expect("few bases")..;
    let (base, image, slot, length) = bases
        .take(BASES - GOLDEN.len())
        .map(|base| (base, image(base)))
        .find_map(|(base, image)| {
            let (slot, length) =
                (0..6).find_map(|slot| commits(&image, slot).map(|length| (slot, length)))?;
            Some((base, image, slot, length))
        })
        .expect("a cache that was not closed");
    let at = header_at(slot);
    let write = |offset, byte| Change::Write { at: at + offset, bytes: vec![byte] };
    let torn = write(4096 * length, !image[to_usize((at + 4096 * length).into())]);
    let unmarked = write(16, 1);
    let unaligned = write(512 + 16 * (length - 1), 1);
    let seal = Change::Reseal { slot, blocks: false };
    let mut reader = reader!();
    for changes in [
        vec![torn.clone()],
        vec![unmarked.clone()],
        vec![torn.clone(), unmarked],
        vec![torn.clone(), write(32, 9)],
        vec![torn, write(57, 0)],
        vec![unaligned.clone()],
        vec![unaligned, seal],
    ] {
        let script = DamageScript { base, changes };
        reader.compare(&format!("{script:?}"), &script.build(), &noise(1, VOLUME_BYTES));
    }
    reader.end();
}

/// The first id that no log reaches, and the last before it.
#[test]
fn a_second_reader_reads_ids_that_no_log_reaches() {
    let base = u8::try_from(GOLDEN.len()).expect("few bases");
    let mut reader = reader!();
    for id in [1u64 << 55, (1 << 55) + 1, 1 << 56, (1 << 56) + 1] {
        // Where it belongs in a log of six segments.
        let slot = u8::try_from((id - 1) % 6).expect("a slot");
        let write = |at, id: u64| Change::Write { at, bytes: id.to_le_bytes().to_vec() };
        let header = write((1 << 20) + u32::from(slot) * (512 << 10), id);
        let recorded = write((1 << 20) - 512, id - 1);
        let seal = Change::Reseal { slot, blocks: false };
        let script = DamageScript { base, changes: vec![header, recorded, seal] };
        reader.compare(&format!("{script:?}"), &script.build(), &noise(1, VOLUME_BYTES));
    }
    assert_eq!((reader.accepted, reader.refused), (1, 3));
    reader.end();
}

#[test]
fn a_second_reader_reads_damaged_devices() {
    let mut reader = reader!();
    let backing = noise(1, VOLUME_BYTES);
    let number =
        |name, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let first = number("WB_READER_FIRST", 0);
    for seed in first..first + number("WB_READER_DEVICES", DAMAGED) {
        let script = damaged(&mut Rng::with_seed(seed));
        reader.compare(&format!("seed {seed}: {script:?}"), &script.build(), &backing);
    }
    reader.end();
}

#[test]
fn a_second_reader_reads_the_devices_of_the_simulator() {
    let mut reader = reader!();
    for seed in 0..SCENARIOS {
        let mut nth = 0;
        let mut watch = |cache: &_, backing: &_| {
            nth += 1;
            let name = format!("end {nth} of a process in the scenario of seed {seed}");
            reader.compare(&name, &content(cache), &content(backing));
        };
        run_watched(&WriteCache::default(), seed, &mut watch).expect("a sound engine");
    }
    reader.end();
}

fn content(device: &SimDevice) -> Vec<u8> {
    device.content()
}

/// A device with random damage, mostly in meaningful fields and often in one slot. wb wrote half of
/// these devices.
fn damaged(rng: &mut Rng) -> DamageScript {
    let first = if rng.bool() { GOLDEN.len() + 1 } else { 0 };
    let base = u8::try_from(rng.usize(first..BASES)).unwrap_or_default();
    let image = DamageScript { base, changes: Vec::new() }.build();
    let focus = rng.u8(0..6);
    let mut changes = Vec::new();
    for _ in 0..1 << rng.u32(0..4) {
        let slot = if rng.bool() { focus } else { rng.u8(0..14) };
        let header = (1 << 20) + u32::from(slot) * (512 << 10);
        let mut one_of = |fields: &[u32]| rng.choice(fields.iter().copied()).unwrap_or_default();
        let (at, seal) = match one_of(&[0, 0, 0, 0, 1, 1, 2, 3, 4, 5]) {
            0 => {
                let at =
                    one_of(&[0, 1, 8, 12, 13, 16, 16, 20, 24, 28, 32, 40, 48, 56, 57, 60, 64, 300]);
                (header + at, Some(Change::Reseal { slot, blocks: rng.bool() }))
            }
            1 => {
                let entry =
                    512 + 16 * one_of(&[0, 1, 2, 3, 5, 8, 13, 20, 40]) + one_of(&[0, 1, 8, 9, 12]);
                (header + entry, Some(Change::Reseal { slot, blocks: rng.u32(0..4) > 0 }))
            }
            2 => (header + rng.u32(4096..65_536), Some(Change::Reseal { slot, blocks: false })),
            3 => {
                let at = one_of(&[0, 8, 16, 20, 24, 28, 32, 48, 128, 136, 200, 4092]);
                let second = rng.bool();
                (
                    at + if second { 128 << 10 } else { 64 << 10 },
                    Some(Change::ResealPage { second }),
                )
            }
            4 => ((1 << 20) - 512 + one_of(&[0, 1, 8, 16, 20, 100]), None),
            _ => {
                changes.push(match rng.u32(0..8) {
                    0 => Change::Cut { sectors: rng.u16(..12 << 10) },
                    _ => Change::Copy { from: rng.u8(0..14), to: slot },
                });
                continue;
            }
        };
        let found = image.get(to_usize(at.into())).copied().unwrap_or(0);
        let byte = match rng.u32(0..4) {
            0 => rng.u8(..),
            1 => rng.u8(..24),
            _ => found ^ 1 << rng.u32(0..8),
        };
        changes.push(Change::Write { at, bytes: vec![byte] });
        changes.extend(seal.filter(|_| rng.bool()));
    }
    DamageScript { base, changes }
}

/// What the hex dump in wb(5) shows, as a device of a given size.
fn worked_example(page: &str, bytes: usize) -> Vec<u8> {
    let mut image = Vec::new();
    let mut repeats = false;
    for line in page.lines() {
        if line == "*" {
            repeats = true;
            continue;
        }
        let mut words = line.split_whitespace();
        let Some(at) = words.next().filter(|word| word.len() == 8) else { continue };
        let Ok(at) = usize::from_str_radix(at, 16) else { continue };
        if repeats {
            let last = image[image.len() - 16..].to_vec();
            while image.len() < at {
                image.extend_from_slice(&last);
            }
            repeats = false;
        }
        assert_eq!(image.len(), at, "{line}");
        image.extend(words.map_while(|word| u8::from_str_radix(word, 16).ok()).take(16));
    }
    assert_eq!(image.len(), bytes);
    image
}

#[test]
fn the_worked_example_of_the_manual_is_a_device_and_means_what_the_manual_says() {
    let image = worked_example(include_str!("../../man/wb.5"), 8 << 20);
    let page = SuperblockExtension::decode(image[64 << 10..].first_chunk().unwrap())
        .expect("a CRC that holds");
    assert_eq!((page.generation, page.clean, page.label.as_str()), (2, Some(SegmentId(1)), "data"));
    let record = decode_record(image[to_usize(RECORD_BLOCK_OFFSET)..].first_chunk().unwrap());
    assert_eq!(record, Ok(Record { id: SegmentId(0), digest: Some(0x1785_2f76) }));
    let header = image[to_usize(SUPERBLOCK_REGION_BYTES)..].first_chunk().unwrap();
    let header = SegmentHeader::decode(header).expect("a header");
    assert!(header.is_whole && header.extension.is_some_and(|it| it.digest == page.digest()));
    assert_eq!((header.checksum, header.length()), (0x5053_c153, 2));
    assert_eq!(header.metablocks[0].crc, Some(0x42af_e0f4));

    let mut volume = vec![0; 16 << 20];
    volume[3 * BLOCK_BYTES..4 * BLOCK_BYTES].fill(0x33);
    volume[42 * SECTOR_BYTES..43 * SECTOR_BYTES].fill(0x42);
    let made = made_by_libwb(&image, &vec![0; 16 << 20]);
    assert_eq!(made["sha256"], hash(Sha256::new_with_prefix(&volume)), "{made}");
    assert_eq!(made["live"], json!([1]));

    let mut reader = reader!();
    reader.compare("the worked example", &image, &vec![0; 16 << 20]);
    reader.end();
}

fn hash(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
