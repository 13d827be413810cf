//! Reads find each sector in RAM, on the cache device or on the backing device. What is read
//! repeatedly moves to the cache device.

use futures_util::future::join;
use libwb::cache::{Cache, Counters, OpenOptions, Tunables};
use libwb::device::IoBuf;
use libwb::device::sim::{Faults, SimDevice, Simulation};
use libwb::format::{
    BLOCK_BYTES, SECTOR_BYTES, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector,
    encode_superblock_block, to_u64, to_usize,
};
use libwb::rules::{Rule, Rules};
use libwb::runtime::Runtime;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use wb_tests::sim::stamp::{self, Content, WriteId};
use wb_tests::{Volume, needs_serving, read_at, wait_for};

/// Sectors of a block.
const BLOCK: u64 = 8;
/// What the backing device holds from the start.
const OLD: u64 = 0;
/// Zeros, which no write leaves.
const ZEROS: u64 = u64::MAX;
const READS_FAIL: Faults = Faults { read: 1.0, write: 0.0, flush: 0.0 };

/// Tunables that cache whatever is read twice, with this many cells.
fn reads_cached(nr_read_cache_cells: u32) -> Tunables {
    Tunables { read_cache_threshold: 127, nr_read_cache_cells, ..Tunables::default() }
}

/// A volume on simulated devices, and the write that each of its sectors must show.
struct TestVolume {
    simulation: Simulation,
    cache_device: Arc<SimDevice>,
    backing: Arc<SimDevice>,
    cache: Cache,
    shows: Vec<u64>,
}

impl TestVolume {
    fn new(segments: u64, blocks: u64, tunables: Tunables) -> TestVolume {
        TestVolume::with_rules(segments, blocks, tunables, Rules::default())
    }

    fn with_rules(segments: u64, blocks: u64, tunables: Tunables, rules: Rules) -> TestVolume {
        let simulation = Simulation::new(1);
        let runtime = simulation.runtime().clone();
        let mut log =
            vec![0; to_usize(SUPERBLOCK_REGION_BYTES) + to_usize(segments) * SEGMENT_BYTES];
        encode_superblock_block(log.first_chunk_mut().expect("a block"));
        let mut content = vec![0; to_usize(blocks) * BLOCK_BYTES];
        stamp::fill(&mut content, Sector(0), WriteId(OLD));
        let cache_device = Arc::new(SimDevice::new(&runtime, "cache", log, 512));
        let backing = Arc::new(SimDevice::new(&runtime, "backing", content, 512));
        let devices = (cache_device.clone(), backing.clone());
        let opening = Cache::open(
            devices.0,
            devices.1,
            Arc::new(runtime),
            OpenOptions::serve().tunables(tunables).rules(rules),
        );
        let cache = simulation.block_on(opening).expect("an end").expect("a fresh cache");
        let shows = vec![OLD; to_usize(blocks * BLOCK)];
        TestVolume { simulation, cache_device, backing, cache, shows }
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.simulation.block_on(future).expect("an end")
    }

    fn data(first: u64, count: u64, write: u64) -> Vec<u8> {
        let mut data = vec![0; to_usize(count) * SECTOR_BYTES];
        if write != ZEROS {
            stamp::fill(&mut data, Sector(first), WriteId(write));
        }
        data
    }

    fn write(&mut self, first: u64, count: u64, write: u64) {
        self.run(self.cache.write(Sector(first), &TestVolume::data(first, count, write)))
            .expect("sound devices");
        self.shows[to_usize(first)..to_usize(first + count)].fill(write);
    }

    /// Writes the sectors of a block whose bits are set.
    fn write_pattern(&mut self, block: u64, pattern: u8, write: u64) {
        for sector in (0..BLOCK).filter(|sector| pattern >> sector & 1 == 1) {
            self.write(block * BLOCK + sector, 1, write);
        }
    }

    fn discard(&mut self, first: u64, count: u64) {
        let bytes = count * to_u64(SECTOR_BYTES);
        self.run(self.cache.discard(Sector(first), bytes)).expect("sound devices");
        self.shows[to_usize(first)..to_usize(first + count)].fill(ZEROS);
    }

    fn read(&self, first: u64, count: u64) -> Result<IoBuf, String> {
        let buf = IoBuf::zeroed(to_usize(count) * SECTOR_BYTES);
        self.run(self.cache.read(Sector(first), buf)).map_err(|e| e.to_string())
    }

    fn check(&self, first: u64, count: u64) {
        let data = self.read(first, count).expect("sound devices");
        for (sector, bytes) in (first..).zip(data.chunks(SECTOR_BYTES)) {
            let expected = match self.shows[to_usize(sector)] {
                ZEROS => Content::Zeros,
                write => Content::Of(WriteId(write)),
            };
            assert_eq!(stamp::decode(bytes, Sector(sector)), Ok(expected), "sector {sector}");
        }
    }

    /// Reads each block whole and, of each, every part of neighbouring sectors.
    fn check_parts(&self, blocks: std::ops::Range<u64>) {
        for block in blocks {
            for first in 0..BLOCK {
                (1..=BLOCK - first).for_each(|count| self.check(block * BLOCK + first, count));
            }
        }
    }

    fn counters(&self) -> Counters {
        self.cache.status().statistics.counters
    }

    /// Lets virtual time pass until the log holds this many blocks for reads.
    fn wait_for_injected(&self, blocks: u64) {
        for _ in 0..1000 {
            if self.counters().injected_blocks >= blocks {
                break;
            }
            self.run(self.simulation.runtime().sleep(Duration::from_millis(1)));
        }
        assert_eq!(self.counters().injected_blocks, blocks);
    }

    /// Reads blocks, one by one, so that they are staged and come into the log.
    fn warm(&self, blocks: std::ops::Range<u64>) {
        let injected = self.counters().injected_blocks + (blocks.end - blocks.start);
        for _ in 0..2 {
            blocks.clone().for_each(|block| self.check(block * BLOCK, BLOCK));
        }
        self.wait_for_injected(injected);
    }

    /// How many bytes an action reads from the backing device.
    fn backing_reads(&self, work: impl FnOnce()) -> u64 {
        let before = self.counters().backing_read_bytes;
        work();
        self.counters().backing_read_bytes - before
    }

    fn flush(&self) {
        self.run(self.cache.flush()).expect("sound devices");
    }

    /// Drains and closes. The backing device must then equal the volume.
    fn end(self) {
        self.run(self.cache.drain()).expect("sound devices");
        self.check(0, to_u64(self.shows.len()));
        self.run(self.cache.close()).expect("sound devices");
        for (sector, bytes) in (0..).zip(self.backing.content().chunks(SECTOR_BYTES)) {
            assert!(
                bytes == TestVolume::data(sector, 1, self.shows[to_usize(sector)]),
                "sector {sector}"
            );
        }
    }
}

/// Each block has its own of the 256 patterns in which its sectors lie here or there.
#[test]
fn a_read_takes_each_sector_from_where_its_newest_version_lies() {
    let mut test = TestVolume::new(64, 256, Tunables::default());
    test.cache.pause();
    let all = || (0..=255u8).map(|pattern| (u64::from(pattern), pattern));
    all().for_each(|(block, pattern)| test.write_pattern(block, pattern, 1));
    test.flush();
    // On the cache device, and the rest on the backing device.
    test.check_parts(0..256);
    test.check(3, 250 * BLOCK);
    // In RAM on top of that: every other sector of what is on the cache device, and of what is not.
    all().for_each(|(block, pattern)| test.write_pattern(block, pattern & 0b1100_0101, 2));
    test.check(0, 256 * BLOCK);
    all().for_each(|(block, pattern)| test.write_pattern(block, !pattern & 0b0101_1001, 3));
    test.check_parts(0..256);
    test.cache.resume();
    test.run(test.cache.drain()).expect("sound devices");
    test.check(5, 255 * BLOCK);
    // New writes do not affect what was written back.
    all().for_each(|(block, pattern)| test.write_pattern(block, pattern.reverse_bits(), 4));
    test.check_parts(0..256);
    test.end();
}

/// Each block has its own of the ways in which each of eight sectors lies in RAM, on the cache
/// device or on the backing device.
#[test]
fn a_read_composes_ram_cache_and_backing_per_sector_in_every_combination() {
    const WAYS: u64 = 3u64.pow(8);
    /// Blocks that fit into a segment.
    const AT_A_TIME: u64 = 127;
    let mut test = TestVolume::new(16, WAYS, Tunables::default());
    test.cache.pause();
    for first in (0..WAYS).step_by(to_usize(AT_A_TIME)) {
        let blocks = first..WAYS.min(first + AT_A_TIME);
        for (write, place) in [(1, 1), (2, 2)] {
            for block in blocks.clone() {
                let lies = |sector: u32| block / 3u64.pow(sector) % 3 == place;
                let pattern = (0..8)
                    .filter(|&sector| lies(sector))
                    .fold(0, |bits, sector| bits | 1 << sector);
                test.write_pattern(block, pattern, write);
            }
            if place == 1 {
                // On a device without the extension, this closes the segment, so that nothing of it
                // is left in RAM.
                test.flush();
            }
        }
        for block in blocks.clone() {
            test.check(block * BLOCK, BLOCK);
            let from = block % 7;
            test.check(block * BLOCK + from, 1 + block / 7 % (BLOCK - from));
        }
        test.check(first * BLOCK + 3, (blocks.end - first) * BLOCK - 5);
        test.run(test.cache.drain()).expect("sound devices");
    }
    test.cache.resume();
    test.end();
}

/// The same on top of blocks that the cache holds clean.
#[test]
fn a_part_that_is_written_to_a_block_cached_for_reads_leaves_the_rest_to_the_backing_device() {
    for is_open in [false, true] {
        let mut test = TestVolume::new(128, 256, reads_cached(4));
        test.cache.pause();
        for four in (0..=255u8).collect::<Vec<_>>().chunks(4) {
            test.warm(four[0].into()..u64::from(four[3]) + 1);
            if !is_open {
                test.flush();
            }
            assert_eq!(test.cache.status().dirty_blocks, u64::from(four[0]).saturating_sub(1));
            four.iter().for_each(|&pattern| test.write_pattern(pattern.into(), pattern, 1));
        }
        assert_eq!(test.cache.status().dirty_blocks, 255);
        test.check_parts(0..256);
        test.flush();
        test.check(1, 255 * BLOCK);
        test.end();
    }
}

#[test]
fn what_is_read_twice_is_cached_and_is_neither_dirty_nor_written_back() {
    let test = TestVolume::new(8, 400, reads_cached(64));
    let blocks = 127 * BLOCK;
    let once = test.backing_reads(|| test.check(0, blocks));
    assert_eq!((once, test.counters().staged_blocks), (127 * 4096, 0), "a scan is not cached");
    test.check(0, blocks);
    test.wait_for_injected(64);
    assert_eq!(test.counters().staged_blocks, 64, "as many as there are cells");
    test.cache.set_tunables(Tunables::default());
    assert_eq!(test.backing_reads(|| test.check(0, blocks)), 63 * 4096);
    test.flush();
    assert_eq!(
        test.backing_reads(|| test.check(0, blocks)),
        63 * 4096,
        "the rest lies on the cache device"
    );
    test.run(test.cache.drain()).expect("sound devices");
    let counters = test.counters();
    assert_eq!((test.cache.status().dirty_blocks, counters.written_back_bytes), (0, 0));
    for _ in 0..3 {
        assert_eq!(
            test.backing_reads(|| test.check(200 * BLOCK, blocks)),
            127 * 4096,
            "switched off"
        );
    }
    assert_eq!(test.counters().staged_blocks, 64);
    test.end();
}

#[test]
fn a_sequence_beyond_the_threshold_is_not_cached_and_parts_of_blocks_are_not() {
    // As many blocks as there are cells go into the log at once, so there is one more.
    let test = TestVolume::new(8, 400, Tunables { read_cache_threshold: 8, ..reads_cached(9) });
    for round in 0..4 {
        test.check(0, 9 * BLOCK);
        // One by one as well.
        (100..120).for_each(|block| test.check(block * BLOCK, BLOCK));
        test.check(200 * BLOCK + 1, BLOCK - 1);
        assert!(test.counters().injected_blocks == 0, "in round {round}");
    }
    // The cells of the earlier blocks are free again, so there is room for nine others.
    for _ in 0..2 {
        test.check(300 * BLOCK, 8 * BLOCK);
        test.check(350 * BLOCK, BLOCK);
    }
    test.wait_for_injected(9);
    assert_eq!(test.backing_reads(|| test.check(300 * BLOCK, 8 * BLOCK)), 0);
    assert_eq!(test.backing_reads(|| test.check(350 * BLOCK, BLOCK)), 0);
    assert_eq!(test.backing_reads(|| test.check(0, 9 * BLOCK)), 9 * 4096);
    test.end();
}

/// Blocks that become outdated on their way into the cache, or there.
fn becomes_old(rules: Rules) {
    let cells = 4;
    for discards in [false, true] {
        for is_injected in [false, true] {
            let mut test = TestVolume::with_rules(8, 64, reads_cached(cells), rules);
            if is_injected {
                test.warm(0..4);
            } else {
                for _ in 0..2 {
                    test.check(0, 3 * BLOCK);
                }
                assert_eq!(
                    (test.counters().staged_blocks, test.counters().injected_blocks),
                    (3, 0)
                );
            }
            if discards {
                test.discard(BLOCK, 2 * BLOCK);
            } else {
                test.write(BLOCK, BLOCK, 7);
                test.write(2 * BLOCK + 3, 2, 7);
            }
            test.run(test.cache.drain()).expect("sound devices");
            test.check_parts(0..4);
            // Whatever is left in the cells comes into the log.
            for _ in 0..2 {
                (8..12).for_each(|block| test.check(2 * block * BLOCK, BLOCK));
            }
            test.run(test.simulation.runtime().sleep(Duration::from_secs(5)));
            assert!(test.counters().injected_blocks > 0);
            test.check_parts(0..4);
            test.end();
        }
    }
}

#[test]
fn what_is_written_or_discarded_is_not_served_as_it_was_read() {
    becomes_old(Rules::default());
    for bug in [Rule::WriteCancelsAdmission, Rule::DiscardCancelsAdmission] {
        let shows = catch_unwind(AssertUnwindSafe(|| becomes_old(Rules::breaking(bug)))).is_err();
        assert!(shows, "{bug:?} goes unnoticed");
    }
}

/// How many blocks a read stages that a write overtakes.
fn staged_of_an_outdated_read(rules: Rules) -> u64 {
    let mut test = TestVolume::with_rules(8, 64, reads_cached(1), rules);
    test.check(0, BLOCK);
    // The read begins first, and holds the only cell as the block is written.
    let (read, written) = test.run(join(
        test.cache.read(Sector(0), IoBuf::zeroed(BLOCK_BYTES)),
        test.cache.write(Sector(0), &TestVolume::data(0, BLOCK, 1)),
    ));
    read.expect("sound devices");
    written.expect("sound devices");
    test.shows[..to_usize(BLOCK)].fill(1);
    test.run(test.simulation.runtime().sleep(Duration::from_secs(10)));
    test.check(0, BLOCK);
    let staged = test.counters().staged_blocks;
    test.end();
    staged
}

#[test]
fn a_write_while_the_block_is_being_read_wins_over_what_was_read() {
    assert_eq!(staged_of_an_outdated_read(Rules::default()), 0);
    let rules = Rules::breaking(Rule::WriteCancelsAdmission);
    let shows =
        catch_unwind(|| staged_of_an_outdated_read(rules)).map_or(true, |staged| staged > 0);
    assert!(shows, "a read that is outdated is staged, and no one notices");
}

#[test]
fn errors_of_either_device_surface_in_reads_that_need_it_and_go_away_again() {
    let mut test = TestVolume::new(8, 64, reads_cached(4));
    test.cache.pause();
    test.warm(0..4);
    test.write(8 * BLOCK, BLOCK, 1);
    test.write(9 * BLOCK + 2, 1, 1);
    test.flush();
    assert_eq!(test.cache.status().dirty_blocks, 2);
    test.backing.set_faults(READS_FAIL);
    test.check(0, 4 * BLOCK);
    test.check(8 * BLOCK, BLOCK);
    test.check(9 * BLOCK + 2, 1);
    for (first, count) in [(9 * BLOCK, BLOCK), (20 * BLOCK, 1), (3 * BLOCK, 2 * BLOCK)] {
        for _ in 0..3 {
            assert!(test.read(first, count).is_err_and(|e| e.contains("backing")), "{first}");
        }
    }
    assert_eq!(test.counters().staged_blocks, 4, "nothing is staged of what could not be read");
    test.backing.set_faults(Faults::default());
    test.check_parts(0..64);
    assert_eq!(test.cache.status().dirty_blocks, 2);
    test.cache_device.set_faults(READS_FAIL);
    // Clean data is on the backing device too.
    test.check(0, 4 * BLOCK);
    test.check(9 * BLOCK, 2);
    for (first, count) in [(8 * BLOCK, BLOCK), (9 * BLOCK, BLOCK), (9 * BLOCK + 2, 1)] {
        let read = test.read(first, count);
        assert!(
            read.as_ref().is_err_and(|e| e.contains("cache")),
            "{first}: {:?}",
            read.map(|_| ())
        );
    }
    test.cache_device.set_faults(Faults::default());
    test.check_parts(0..64);
    test.cache.resume();
    test.end();
}

#[test]
fn a_cache_of_three_segments_goes_round_and_round_under_small_strided_writes() {
    let mut test = TestVolume::new(3, 1024, reads_cached(16));
    let sectors = 1024 * BLOCK;
    for (round, stride) in (1..).zip([9, 17, 8, 33]) {
        for at in (round..sectors).step_by(stride) {
            test.write(at, 1, round);
            if at % 7 == 0 {
                test.check(at / BLOCK * BLOCK, BLOCK);
            }
        }
        test.check(0, sectors);
    }
    assert!(test.counters().segments_written > 9, "{:?}", test.counters());
    test.end();
}

#[test]
fn read_caching_is_switched_on_and_off_while_the_volume_is_attached() {
    needs_serving!();
    let volume = Volume::created(8, 32 << 20);
    let name = volume.name.as_str();
    let attached = volume.attach_with(&[]);
    let refused = volume.wbctl(&["set", name, "read_cache_threshold=128"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("must be a number from 0 to 127"), "{refused:?}");
    let counter = |key: &str| volume.status()["live"]["counters"][key].as_u64().unwrap_or_default();
    // Past the page cache, 4 KiB at a time, and no two neighbours.
    let read_some = || {
        use std::os::unix::fs::{FileExt, OpenOptionsExt};
        let device = std::fs::File::options()
            .read(true)
            .custom_flags(nix::libc::O_DIRECT)
            .open(&attached.device);
        let device = device.expect("the volume");
        for at in (0..64).map(|nth| nth * 32768) {
            let mut buf = IoBuf::zeroed(BLOCK_BYTES);
            device.read_exact_at(&mut buf, at).expect("a block");
            assert!(buf[..] == read_at(&volume.backing, at, 4096)[..]);
        }
    };
    (0..3).for_each(|_| read_some());
    assert_eq!(counter("staged_blocks"), 0);
    volume.must(&["set", name, "read_cache_threshold=127", "nr_read_cache_cells=32"]);
    (0..2).for_each(|_| read_some());
    assert!(wait_for(|| counter("injected_blocks") >= 32), "{}", volume.status());
    let before = counter("backing_read_bytes");
    read_some();
    assert!(counter("backing_read_bytes") - before <= 32 * 4096, "{}", volume.status());
    assert_eq!(volume.status()["live"]["dirty_bytes"], 0);
    volume.must(&["set", name, "read_cache_threshold=0"]);
    read_some();
    attached.detach(&["--drain"]);
}
