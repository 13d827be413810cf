//! The engine on devices in memory. Crashes are the simulator's business; here it is the plain
//! behaviour.

use super::{Access, Cache, CacheError, OpenOptions, Tunables};
use crate::device::{BlockDevice, Device, IoBuf, MemDevice};
use crate::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, Geometry, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector,
    SegmentId, SuperblockExtension, crc32c, empty_header, encode_superblock_block, to_u64,
    to_usize,
};
use crate::log::scan::{SlotState, scan};
use crate::log::{LogError, LogErrorKind};
use crate::reactor::Reactor;
use std::sync::Arc;

/// A sector of the superblock region, where the extension is to be written, as a fresh format does.
fn extend(cache: &mut [u8]) {
    let page = SuperblockExtension::new(uuid::Uuid::from_u128(7), to_u64(cache.len()));
    page.encode(cache[to_usize(EXTENSION_OFFSETS[0])..].first_chunk_mut().unwrap());
}

struct Rig {
    reactor: Reactor,
    cache: Arc<MemDevice>,
    backing: Arc<MemDevice>,
}

impl Rig {
    fn new(segments: u64, backing_blocks: usize) -> Rig {
        Rig::with(segments, backing_blocks, true)
    }

    fn with(segments: u64, backing_blocks: usize, extended: bool) -> Rig {
        let mut content =
            vec![0; to_usize(SUPERBLOCK_REGION_BYTES + segments * to_u64(SEGMENT_BYTES))];
        encode_superblock_block(content.first_chunk_mut().unwrap());
        if extended {
            extend(&mut content);
        }
        let old: Vec<u8> = (0..backing_blocks * 8).flat_map(|sector| stamp(sector, 0)).collect();
        Rig {
            reactor: Reactor::start().unwrap(),
            cache: Arc::new(MemDevice::with_content("cache", content)),
            backing: Arc::new(MemDevice::with_content("backing", old)),
        }
    }

    fn open(&self) -> Cache {
        let (cache, backing): (Device, Device) = (self.cache.clone(), self.backing.clone());
        let runtime = Arc::new(self.reactor.handle().clone());
        self.reactor.block_on(Cache::open(cache, backing, runtime, OpenOptions::serve())).unwrap()
    }

    fn write(&self, cache: &Cache, sector: usize, count: usize, version: u8) {
        let data: Vec<u8> =
            (sector..sector + count).flat_map(|sector| stamp(sector, version)).collect();
        self.reactor.block_on(cache.write(Sector(to_u64(sector)), &data)).unwrap();
    }

    fn check(&self, cache: &Cache, sector: usize, versions: &[u8]) {
        let buf = IoBuf::zeroed(versions.len() * 512);
        let data = self.reactor.block_on(cache.read(Sector(to_u64(sector)), buf)).unwrap();
        let found: Vec<u8> = data.chunks(512).map(|sector| sector[8]).collect();
        assert_eq!(found, versions);
        for (nth, bytes) in data.chunks(512).enumerate() {
            assert_eq!(bytes, stamp(sector + nth, versions[nth]));
        }
    }
}

/// Flips a bit of every data block on the cache device that holds this sector in this version.
fn rot(rig: &Rig, sector: usize, version: u8) {
    let mut content = rig.cache.content();
    for at in (0..content.len()).step_by(512) {
        if content[at..at + 512] == stamp(sector, version) {
            content[at + 100] ^= 1;
        }
    }
    let whole = IoBuf::copy_of(&content);
    rig.reactor.block_on(rig.cache.write(0, whole.into())).unwrap();
}

#[test]
fn rot_on_the_cache_device_is_never_served_and_never_written_back() {
    // With a segment at a time, what supersedes the rotten version comes in a later batch at first.
    for most in [1, 4096] {
        rot_is_never_served_and_never_written_back(most);
    }
}

fn rot_is_never_served_and_never_written_back(nr_max_batched_writeback: u32) {
    let rig = Rig::new(8, 64);
    let cache = rig.open();
    rig.write(&cache, 0, 8, 1);
    rig.reactor.block_on(cache.close()).unwrap();
    rot(&rig, 0, 1);
    // It was durable, so that recovery does not look at it.
    let cache = rig.open();
    cache.set_tunables(Tunables { nr_max_batched_writeback, ..Tunables::default() });
    let read = rig.reactor.block_on(cache.read(Sector(0), IoBuf::zeroed(512)));
    assert!(
        read.unwrap_err().to_string().contains("does not match its checksum"),
        "dirty data is nowhere else"
    );
    assert!(rig.reactor.block_on(cache.drain()).is_err());
    assert_eq!(cache.status().stuck.map(|stuck| (stuck.refused, stuck.lost)), Some((0, 1)));
    assert_eq!(rig.backing.content()[..512], stamp(0, 0));
    // A newer version supersedes the rotten one.
    rig.write(&cache, 0, 8, 2);
    rig.reactor.block_on(cache.drain()).unwrap();
    assert_eq!(rig.backing.content()[..512], stamp(0, 2));
    // What is clean is read from the backing device instead.
    rot(&rig, 0, 2);
    rig.check(&cache, 0, &[2, 2, 2]);
    rig.reactor.block_on(cache.close()).unwrap();
}

#[test]
fn what_an_overwrite_has_torn_is_noticed_under_a_sound_header_and_erased() {
    let rig = Rig::new(4, 64);
    let cache = rig.open();
    for nth in 0..4 {
        rig.write(&cache, 8 * nth, 8, 1);
        rig.reactor.block_on(cache.drain()).unwrap();
    }
    rig.reactor.block_on(cache.close()).unwrap();
    // As if segment 5 had been on its way, and of it only some data had arrived.
    rot(&rig, 0, 1);
    rig.reactor.block_on(rig.open().close()).unwrap();
    let device: Device = rig.cache.clone();
    let geometry = Geometry::of_device(device.size()).unwrap();
    let states = rig.reactor.block_on(scan(&device, geometry, |_, _| {}));
    assert!(matches!(states[0], SlotState::Empty), "{states:?}");
    assert!(states[1..].iter().all(|state| state.valid_id().is_some()), "{states:?}");
}

fn stamp(sector: usize, version: u8) -> [u8; 512] {
    let mut bytes = [version; 512];
    bytes[..8].copy_from_slice(&to_u64(sector).to_le_bytes());
    bytes
}

#[test]
fn a_read_composes_ram_cache_and_backing_per_sector() {
    let rig = Rig::new(8, 64);
    let cache = rig.open();
    rig.write(&cache, 2, 2, 1);
    rig.reactor.block_on(cache.flush()).unwrap();
    rig.write(&cache, 3, 2, 2);
    rig.check(&cache, 0, &[0, 0, 1, 2, 2, 0, 0, 0, 0, 0]);
    rig.reactor.block_on(cache.flush()).unwrap();
    rig.check(&cache, 0, &[0, 0, 1, 2, 2, 0, 0, 0, 0, 0]);
    rig.reactor.block_on(cache.drain()).unwrap();
    rig.check(&cache, 1, &[0, 1, 2, 2, 0]);
    rig.write(&cache, 0, 1, 3);
    rig.check(&cache, 0, &[3, 0, 1, 2, 2, 0, 0, 0, 0]);
    rig.reactor.block_on(cache.close()).unwrap();
}

#[test]
fn what_was_flushed_is_there_after_reopening_and_a_drain_leaves_it_on_the_backing_device() {
    let rig = Rig::new(3, 512);
    let cache = rig.open();
    for round in 1..=4u8 {
        for at in (0..4000).step_by(37) {
            rig.write(&cache, at, 1 + at % 23, round);
        }
        rig.reactor.block_on(cache.flush()).unwrap();
    }
    let before = rig.reactor.block_on(cache.read(Sector(0), IoBuf::zeroed(512 * 4096))).unwrap();
    rig.reactor.block_on(cache.close()).unwrap();
    let cache = rig.open();
    let after = rig.reactor.block_on(cache.read(Sector(0), IoBuf::zeroed(512 * 4096))).unwrap();
    assert!(before[..] == after[..]);
    rig.reactor.block_on(cache.drain()).unwrap();
    assert_eq!(cache.status().dirty_blocks, 0);
    rig.reactor.block_on(cache.close()).unwrap();
    assert!(before[..] == rig.backing.content()[..]);
}

#[test]
fn requests_outside_the_volume_are_refused() {
    let rig = Rig::new(1, 2);
    let cache = rig.open();
    assert!(rig.reactor.block_on(cache.write(Sector(15), &[0; 1024])).is_err());
    assert!(rig.reactor.block_on(cache.write(Sector(u64::MAX), &[0; 512])).is_err());
    assert!(rig.reactor.block_on(cache.write(Sector(0), &[0; 511])).is_err());
    assert!(rig.reactor.block_on(cache.read(Sector(16), IoBuf::zeroed(512))).is_err());
    rig.reactor.block_on(cache.close()).unwrap();
    assert!(rig.reactor.block_on(cache.write(Sector(0), &[0; 512])).is_err());
}

/// The kernel module takes what is written back for a read cache.
#[test]
fn no_segment_holds_what_was_discarded_even_from_before_the_cache_was_opened() {
    let rig = Rig::new(8, 64);
    for version in 1..4 {
        let cache = rig.open();
        rig.write(&cache, 0, 8, version);
        rig.reactor.block_on(cache.drain()).unwrap();
        rig.reactor.block_on(cache.close()).unwrap();
    }
    let lengths = || -> Vec<u8> {
        let content = rig.cache.content();
        let header =
            |slot: usize| content[to_usize(SUPERBLOCK_REGION_BYTES) + slot * SEGMENT_BYTES + 12];
        (0..4).map(header).collect()
    };
    assert_eq!(lengths(), [1, 1, 1, 0]);
    let cache = rig.open();
    rig.write(&cache, 16, 8, 9);
    rig.reactor.block_on(cache.drain()).unwrap();
    rig.reactor.block_on(cache.discard(Sector(0), 4096)).unwrap();
    assert_eq!(lengths(), [0, 0, 0, 1], "what is newer, and other than discarded, stays");
    rig.reactor.block_on(cache.discard(Sector(16), 4096)).unwrap();
    assert_eq!(lengths(), [0; 4]);
    let zeros = rig.reactor.block_on(cache.read(Sector(0), IoBuf::zeroed(4096))).unwrap();
    assert!(zeros.iter().all(|&byte| byte == 0));
    rig.reactor.block_on(cache.close()).unwrap();
}

/// A crash may leave segments empty, or gone, while older ones still hold what those had
/// superseded. The kernel module would take that for a read cache.
#[test]
fn nothing_older_stands_before_a_segment_that_is_empty_or_gone() {
    for is_gone in [false, true] {
        let rig = Rig::new(8, 64);
        for version in 1..4 {
            let cache = rig.open();
            rig.write(&cache, 0, 8, version);
            rig.reactor.block_on(cache.drain()).unwrap();
            rig.reactor.block_on(cache.close()).unwrap();
        }
        let header = |slot: usize| to_usize(SUPERBLOCK_REGION_BYTES) + slot * SEGMENT_BYTES;
        let mut second = IoBuf::copy_of(&rig.cache.content()[header(1)..][..BLOCK_BYTES]);
        match is_gone {
            true => second.fill(0),
            false => empty_header(second.block_at_mut(0)),
        }
        rig.reactor.block_on(rig.cache.write(to_u64(header(1)), second.into())).unwrap();
        rig.reactor.block_on(rig.open().close()).unwrap();
        let content = rig.cache.content();
        let lengths: Vec<u8> = (0..3).map(|slot| content[header(slot) + 12]).collect();
        assert_eq!(lengths, [0, 0, 1]);
    }
}

/// What requests found, without the ways that none of them met a block in.
fn met(cache: &Cache) -> Vec<(&'static str, u64)> {
    let accesses = cache.status().statistics.accesses;
    let name = |access: Access| match (access.write, access.hit, access.in_ram, access.whole) {
        (false, false, _, true) => "read miss, whole",
        (false, true, false, true) => "read hit, whole",
        (false, true, true, false) => "read hit in RAM, part",
        (true, false, _, true) => "write miss, whole",
        (true, false, _, false) => "write miss, part",
        (true, true, false, false) => "write hit, part",
        (true, true, true, false) => "write hit in RAM, part",
        (true, true, true, true) => "write hit in RAM, whole",
        _ => "unexpected",
    };
    accesses
        .iter()
        .filter(|(_, blocks)| *blocks > 0)
        .map(|(access, blocks)| (name(access), blocks))
        .collect()
}

#[test]
fn a_flush_costs_a_header_and_what_was_written_until_the_segment_is_full() {
    let rig = Rig::new(8, 1024);
    let cache = rig.open();
    cache.pause();
    for nth in 0..130 {
        rig.write(&cache, 8 * nth, 8, 1);
        rig.reactor.block_on(cache.flush()).unwrap();
        // Nothing new: nothing to write.
        rig.reactor.block_on(cache.flush()).unwrap();
    }
    let counters = cache.status().statistics.counters;
    assert_eq!(
        (counters.commits, counters.segments_written, counters.partial_segments_written),
        (129, 1, 0)
    );
    assert_eq!((counters.write_bytes, counters.cache_write_bytes), (130 * 4096, 130 * 8192));
    // What a commit holds is not changed in place, and merged all the same.
    for (sector, version) in [(0, 2), (1, 3), (8 * 128, 4)] {
        rig.write(&cache, sector, 1, version);
        rig.reactor.block_on(cache.flush()).unwrap();
        rig.write(&cache, sector, 1, version);
    }
    rig.check(&cache, 0, &[2, 3, 1]);
    rig.check(&cache, 8 * 128, &[4, 1, 1]);
    rig.reactor.block_on(cache.close()).unwrap();
    let cache = rig.open();
    rig.check(&cache, 0, &[2, 3, 1]);
    rig.check(&cache, 8 * 128, &[4, 1, 1]);
    rig.reactor.block_on(cache.close()).unwrap();
}

#[test]
fn a_block_whose_crc_is_0_is_committed_like_any_other_and_its_rot_is_noticed() {
    let mut block = [b'.'; BLOCK_BYTES];
    block[..9].copy_from_slice(b"user data");
    block[BLOCK_BYTES - 4..].copy_from_slice(&[0x56, 0x6d, 0x3e, 0x93]);
    assert_eq!(crc32c(&block), 0);
    for at in [0, 4] {
        let rig = Rig::new(8, 64);
        let cache = rig.open();
        for nth in 0..10 {
            match nth == at {
                true => rig.reactor.block_on(cache.write(Sector(to_u64(nth * 8)), &block)).unwrap(),
                false => rig.write(&cache, nth * 8, 8, 1),
            }
            rig.reactor.block_on(cache.flush()).unwrap();
        }
        rig.reactor.block_on(cache.close()).unwrap();
        let device: Device = rig.cache.clone();
        let geometry = Geometry::of_device(device.size()).unwrap();
        let slots = rig.reactor.block_on(scan(&device, geometry, |_, _| ()));
        assert!(matches!(slots[0], SlotState::Valid { length: 10, .. }), "{:?}", slots[0]);

        let mut content = rig.cache.content();
        let place = content.chunks(BLOCK_BYTES).position(|found| found == block).unwrap();
        content[place * BLOCK_BYTES] ^= 1;
        rig.reactor.block_on(rig.cache.write(0, IoBuf::copy_of(&content).into())).unwrap();
        let cache = rig.open();
        let read = cache.read(Sector(to_u64(at * 8)), IoBuf::zeroed(BLOCK_BYTES));
        assert!(rig.reactor.block_on(read).unwrap_err().to_string().contains("checksum"));
    }
}

#[test]
fn each_block_of_a_request_counts_once_by_what_it_found() {
    // Without the extension, a flush closes the segment.
    let rig = Rig::with(8, 64, false);
    let cache = rig.open();
    cache.pause();
    rig.write(&cache, 0, 16, 1);
    rig.write(&cache, 8, 10, 2);
    rig.check(&cache, 2, &[1, 1]);
    rig.reactor.block_on(cache.flush()).unwrap();
    let written = [
        ("read hit in RAM, part", 1),
        // Of the ten sectors, two lie in a third block.
        ("write miss, part", 1),
        ("write miss, whole", 2),
        ("write hit in RAM, whole", 1),
    ];
    assert_eq!(met(&cache), written);
    let counters = cache.status().statistics.counters;
    assert_eq!((counters.segments_written, counters.partial_segments_written), (1, 1));
    assert_eq!((counters.write_bytes, counters.cache_write_bytes), (26 * 512, 4 * 4096));
    cache.clear_statistics();
    assert_eq!(met(&cache), []);
    // This has to be merged with what lies on the cache device, and then lies in RAM again.
    rig.write(&cache, 3, 1, 3);
    rig.write(&cache, 4, 1, 3);
    rig.check(&cache, 8, &[2; 8]);
    rig.check(&cache, 40, &[0; 8]);
    assert_eq!(
        met(&cache),
        [
            ("read miss, whole", 1),
            ("read hit, whole", 1),
            ("write hit, part", 1),
            ("write hit in RAM, part", 1)
        ]
    );
    let counters = cache.status().statistics.counters;
    assert_eq!((counters.writes, counters.write_bytes, counters.flushes), (2, 1024, 0));
    rig.reactor.block_on(cache.close()).unwrap();
}

#[test]
fn a_cache_says_how_far_it_has_come_for_good_and_an_older_copy_is_refused_untouched() {
    let rig = Rig::new(8, 64);
    let cache = rig.open();
    let numbers = |cache: &Cache| {
        let seen = cache.seen().expect("a cache with an identity");
        (seen.generation, seen.reach.durable.0, seen.reach.written_back.0)
    };
    assert_eq!(numbers(&cache), (0, 0, 0));
    cache.pause();
    // A whole segment and a block, which are not durable yet.
    rig.write(&cache, 0, 8 * 50, 1);
    assert_eq!(numbers(&cache), (0, 0, 0));
    rig.reactor.block_on(cache.close()).unwrap();
    assert_eq!(numbers(&cache), (1, 1, 0));
    let copy = rig.cache.content();
    let cache = rig.open();
    rig.write(&cache, 0, 8, 2);
    rig.reactor.block_on(cache.drain()).unwrap();
    assert_eq!(numbers(&cache), (1, 2, 2));
    let known = cache.seen().map(|seen| seen.reach);
    rig.reactor.block_on(cache.close()).unwrap();

    let older: Device = Arc::new(MemDevice::with_content("copy", copy.clone()));
    let backing: Device = rig.backing.clone();
    let before = rig.backing.content();
    let ways = [
        OpenOptions::serve(),
        OpenOptions::replay(),
        OpenOptions::read_only(),
        OpenOptions::replay_until(SegmentId(1)),
    ];
    let open = |options: OpenOptions| {
        let runtime = Arc::new(rig.reactor.handle().clone());
        let options = options.knowing(known);
        let opening = Cache::open(older.clone(), backing.clone(), runtime, options);
        rig.reactor.block_on(opening).err()
    };
    for options in ways {
        let refused = open(options.clone());
        let is_older = matches!(
            refused,
            Some(CacheError::Log(LogError { kind: LogErrorKind::Older { .. }, .. }))
        );
        assert!(is_older, "{options:?}");
    }
    let examined = rig.reactor.block_on(Cache::examine(&older, &backing, known)).unwrap_err();
    assert_eq!(
        examined.to_string(),
        "copy: is older than it was: durable up to segment 1, written back up to segment 0; it \
         was durable up to segment 2, written back up to segment 2"
    );
    let read = rig.reactor.block_on(older.read(0, IoBuf::zeroed(copy.len()))).unwrap();
    assert!(read[..] == copy && rig.backing.content() == before);
}
