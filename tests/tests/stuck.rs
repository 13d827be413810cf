//! Blocks that cannot be written back: one that the backing device refuses, and one that rots on
//! the cache device. The engine still writes back all others, and the log goes on for many laps,
//! even with power cuts.

use byteorder::{ByteOrder, LittleEndian};
use libwb::cache::{Cache, CacheError, Head, OpenOptions};
use libwb::device::sim::{Crash, SimDevice, Simulation};
use libwb::device::{Device, IoBuf};
use libwb::format::{BLOCK_BYTES, BlockNo, to_u64, to_usize};
use libwb::rules::{Rule, Rules};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use wb_tests::sim::devices::{fresh_backing, fresh_cache};

const SEGMENTS: u64 = 16;
const BLOCKS: u64 = 4096;
/// A block whose data rots on the cache device.
const ROTTEN: BlockNo = BlockNo(10);
/// A block that cannot be written to the backing device.
const REFUSED: BlockNo = BlockNo(20);

/// The content of a version of a block, which appears nowhere else.
fn data(block: BlockNo, version: u64) -> Vec<u8> {
    [block.0, version, 0x77].map(u64::to_le_bytes).concat().repeat(BLOCK_BYTES / 24 + 1)
        [..BLOCK_BYTES]
        .to_vec()
}

fn version_of(data: &[u8]) -> u64 {
    LittleEndian::read_u64(&data[8..])
}

struct TestVolume {
    simulation: Simulation,
    rules: Rules,
    cache: Arc<SimDevice>,
    backing: Arc<SimDevice>,
    /// The log's head, if it outlives the process.
    head: Option<Head>,
    /// For each block, the version that must survive, and the newest.
    flushed: BTreeMap<u64, u64>,
    newest: BTreeMap<u64, u64>,
    /// The newest version of [`REFUSED`].
    refused: u64,
    lost: bool,
}

/// The power failed.
struct Cut;

impl TestVolume {
    fn new(seed: u64, rules: Rules) -> TestVolume {
        let simulation = Simulation::new(seed);
        let cache = SimDevice::new(simulation.runtime(), "cache", fresh_cache(SEGMENTS, true), 512);
        let backing =
            SimDevice::new(simulation.runtime(), "backing", fresh_backing(8 * BLOCKS), 512);
        TestVolume {
            simulation,
            rules,
            cache: Arc::new(cache),
            backing: Arc::new(backing),
            head: None,
            flushed: BTreeMap::new(),
            newest: BTreeMap::new(),
            refused: 1,
            lost: false,
        }
    }

    fn finish<T>(&self, future: impl Future<Output = T>) -> Result<T, Cut> {
        self.simulation.block_on(future).map_err(|_| Cut)
    }

    fn open(&self) -> Result<Cache, Cut> {
        let (cache, backing): (Device, Device) = (self.cache.clone(), self.backing.clone());
        let runtime = Arc::new(self.simulation.runtime().clone());
        let mut options = OpenOptions::serve().rules(self.rules);
        if let Some(head) = &self.head {
            let left = head.descriptor().try_clone_to_owned().and_then(Head::open);
            options = options.head(left.expect("a head"));
        }
        let opened = Cache::open(cache, backing, runtime, options);
        self.finish(opened).map(|opened| opened.expect("a sound cache"))
    }

    fn write(&mut self, cache: &Cache, block: BlockNo, version: u64) -> Result<(), Cut> {
        self.newest.insert(block.0, version);
        self.finish(cache.write(block.sector(), &data(block, version)))?
            .expect("a write that is taken");
        Ok(())
    }

    fn flush(&mut self, cache: &Cache) -> Result<(), Cut> {
        self.finish(cache.flush())?.expect("a flush");
        self.flushed = self.newest.clone();
        Ok(())
    }

    fn read(&self, cache: &Cache, block: BlockNo) -> Result<Result<IoBuf, CacheError>, Cut> {
        self.finish(cache.read(block.sector(), IoBuf::zeroed(BLOCK_BYTES)))
    }

    /// Flips a bit of what the cache device holds of a block.
    fn rot(&mut self, block: BlockNo, version: u64) {
        let (content, wanted) = (self.cache.content(), data(block, version));
        let found = content.chunks(BLOCK_BYTES).position(|held| held == wanted);
        self.cache.rot(to_u64(found.expect("on the cache device") * BLOCK_BYTES));
        self.lost = true;
    }

    /// Cuts the power.
    fn cut(&mut self) {
        self.newest = self.flushed.clone();
        self.simulation.kill_tasks();
        self.cache = Arc::new(self.cache.crash(Crash::PowerCut));
        self.backing = Arc::new(self.backing.crash(Crash::PowerCut));
    }

    /// The process dies, and the next one has the log's head.
    fn die(&mut self) {
        self.simulation.kill_tasks();
        self.cache = Arc::new(self.cache.crash(Crash::Kill));
        self.backing = Arc::new(self.backing.crash(Crash::Kill));
        self.stay_rotten();
    }

    /// Rot is on the media, and a crash does not mend it.
    fn stay_rotten(&mut self) {
        if self.cache.content().chunks(BLOCK_BYTES).any(|held| held == data(ROTTEN, 1)) {
            self.rot(ROTTEN, 1);
        }
    }

    /// Every block shows what it must, or something newer.
    fn check(&self, cache: &Cache, newest: bool) -> Result<(), Cut> {
        for (&block, &flushed) in &self.flushed {
            let (block, read) = (BlockNo(block), self.read(cache, BlockNo(block))?);
            if block == ROTTEN && self.lost {
                assert!(
                    read.is_err(),
                    "what is lost reads as {:?}",
                    read.map(|data| data[..24].to_vec())
                );
                continue;
            }
            let read = read.unwrap_or_else(|e| panic!("block {block}: {e}"));
            let version = version_of(&read);
            assert_eq!(read[..], data(block, version)[..], "block {block}");
            let least = if newest { self.newest[&block.0] } else { flushed };
            assert!(version >= least, "block {block} shows version {version}, and had {least}");
        }
        Ok(())
    }

    /// Writes several laps of the log.
    fn write_laps(&mut self, cache: &Cache) -> Result<(), Cut> {
        for version in 1..=3 {
            for nth in 0..SEGMENTS * 127 {
                self.write(cache, BlockNo(100 + nth * 7 % (BLOCKS - 100)), version)?;
                if nth % 50 == 0 {
                    // The test reads the lost block, and writes it anew, at any moment.
                    let _ = cache.status();
                    self.refused += 1;
                    self.write(cache, REFUSED, self.refused)?;
                }
                if nth % 200 == 0 {
                    self.flush(cache)?;
                }
            }
        }
        Ok(())
    }

    /// Cuts the power after `cut_after` requests to devices, if that is given.
    fn go_through(&mut self, cut_after: Option<u64>) -> Result<(), Cut> {
        let cache = self.open()?;
        self.write(&cache, ROTTEN, 1)?;
        self.write(&cache, REFUSED, 1)?;
        self.flush(&cache)?;
        self.backing.go_bad(REFUSED.bytes());
        self.rot(ROTTEN, 1);
        if let Some(points) = cut_after {
            self.simulation.runtime().halt_after_io(points);
        }
        self.write_laps(&cache)?;
        self.check(&cache, true)?;
        let stuck = cache.status().stuck.expect("two blocks");
        assert_eq!((stuck.refused, stuck.lost), (1, 1), "{stuck:?}");
        assert_eq!(stuck.first, [ROTTEN.bytes(), REFUSED.bytes()]);
        let drained = self.finish(cache.drain())?;
        let Err(CacheError::Stuck(stuck)) = drained else { panic!("{drained:?}") };
        assert_eq!((stuck.refused, stuck.lost), (1, 1), "{stuck}");
        // A write to part of a lost block fails.
        assert!(self.finish(cache.write(ROTTEN.sector(), &[1; 512]))?.is_err());
        self.flush(&cache)
    }

    /// Everything can be written back once the backing device accepts it and the lost block is
    /// written anew.
    fn end(&mut self) -> Result<(), Cut> {
        let cache = self.open()?;
        // Earlier, recovery might have had to read the rotten block.
        self.stay_rotten();
        self.check(&cache, false)?;
        self.backing.heal_bad();
        self.write(&cache, ROTTEN, 9)?;
        self.lost = false;
        // A batch that was under way may have failed before.
        if self.finish(cache.drain())?.is_err() {
            self.finish(cache.drain())?.unwrap_or_else(|e| panic!("a drain: {e}"));
        }
        self.flush(&cache)?;
        self.check(&cache, false)?;
        self.finish(cache.close())?.expect("a close");
        assert_eq!(cache.status().stuck.map(|stuck| stuck.first), None);
        let content = self.backing.durable();
        for block in [ROTTEN, REFUSED] {
            let found = &content[to_usize(block.bytes())..][..BLOCK_BYTES];
            let version = version_of(found);
            assert!(
                found == data(block, version) && version >= self.newest[&block.0],
                "block {block}"
            );
        }
        Ok(())
    }
}

/// One scenario of it.
fn run(seed: u64, rules: Rules, cut_after: Option<u64>) {
    println!("seed {seed}, a power cut after {cut_after:?} requests");
    let mut test = TestVolume::new(seed, rules);
    let went = test.go_through(cut_after);
    assert!(went.is_ok() || cut_after.is_some());
    test.cut();
    assert!(test.end().is_ok(), "no cut any more");
}

#[test]
fn the_log_goes_on_although_two_blocks_are_stuck() {
    run(1, Rules::default(), None);
}

#[test]
fn power_cuts_do_not_lose_blocks_that_are_stuck() {
    for seed in 0..48 {
        run(seed, Rules::default(), Some(20 + seed % 24 * (seed % 24) * 5));
    }
}

/// Processes that go on one after the other while the log moves a lost block, and one that is
/// refused.
fn outlive(rules: Rules) {
    let mut test = TestVolume::new(7, rules);
    test.head = Some(Head::create().expect("memory"));
    let mut lives = || -> Result<(), Cut> {
        let mut cache = test.open()?;
        test.write(&cache, ROTTEN, 1)?;
        test.write(&cache, REFUSED, 1)?;
        // So that they are in memory no more.
        for block in 100..300 {
            test.write(&cache, BlockNo(block), 1)?;
        }
        test.flush(&cache)?;
        test.backing.go_bad(REFUSED.bytes());
        test.rot(ROTTEN, 1);
        for nth in 0..3 * SEGMENTS * 127 {
            test.write(&cache, BlockNo(100 + nth * 7 % (BLOCKS - 100)), 1 + nth)?;
            if nth % 50 == 0 {
                drop(cache);
                test.die();
                cache = test.open()?;
                assert!(test.read(&cache, ROTTEN)?.is_err(), "it is lost, after {nth} writes");
                let refused = test.read(&cache, REFUSED)?.expect("it can be read");
                assert_eq!(version_of(&refused), 1);
            }
        }
        test.flush(&cache)?;
        test.check(&cache, true)?;
        let stuck = cache.status().stuck.expect("two blocks");
        assert_eq!((stuck.refused, stuck.lost), (1, 1), "{stuck:?}");
        Ok(())
    };
    assert!(lives().is_ok(), "no cut");
}

#[test]
fn blocks_that_are_stuck_outlive_the_process() {
    outlive(Rules::default());
}

#[test]
fn a_lost_block_that_is_sound_for_the_next_process_is_noticed() {
    let broken = || outlive(Rules::breaking(Rule::HeadKeepsLost));
    assert!(std::panic::catch_unwind(broken).is_err());
}

/// Whether any scenario shows that a rule is broken.
fn is_found(rule: Rule) -> bool {
    let cuts = (0..300).map(|nth| Some(1000 + nth * 13)).chain([None]);
    let rules = || Rules::breaking(rule);
    cuts.zip(0..).any(|(cut, seed)| std::panic::catch_unwind(|| run(seed, rules(), cut)).is_err())
}

#[test]
fn a_block_that_is_left_behind_is_missed() {
    assert!(is_found(Rule::StuckMoved));
}

#[test]
fn a_block_that_moves_before_its_copy_is_durable_is_missed() {
    assert!(is_found(Rule::MovedMadeDurable));
}

#[test]
fn a_lost_block_that_is_moved_as_a_sound_one_is_noticed() {
    assert!(is_found(Rule::LostMarked));
}

#[test]
fn where_nothing_can_be_written_back_writes_fail_when_the_log_is_full() {
    let mut test = TestVolume::new(3, Rules::default());
    let cache = test.open().ok().expect("no cut");
    for block in 0..BLOCKS {
        test.backing.go_bad(BlockNo(block).bytes());
    }
    let refused = (0..BLOCKS).find_map(|block| {
        let block = BlockNo(block);
        test.finish(cache.write(block.sector(), &data(block, 1))).ok().expect("no cut").err()
    });
    assert!(matches!(refused, Some(CacheError::Full(_))), "{refused:?}");
    test.backing.heal_bad();
    // Second by second: the simulated clock may jump to the end of one long sleep before the tasks
    // that are ready have run.
    let runtime = test.simulation.runtime().clone();
    for _ in 0..60 {
        let second = libwb::runtime::Runtime::sleep(&runtime, Duration::from_secs(1));
        test.finish(second).ok().expect("no cut");
    }
    test.write(&cache, BlockNo(BLOCKS - 1), 2).ok().expect("a write");
    test.finish(cache.drain()).ok().expect("no cut").expect("a drain");
}
