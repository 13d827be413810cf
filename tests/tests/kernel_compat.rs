//! A cache device fails while the engine empties written-back segments. Discarded data and data
//! replaced around the log must not come back when the kernel module gets the cache. A segment that
//! cannot be emptied must not delay others.

use libwb::cache::{Cache, CacheError, OpenOptions, Tunables, WriteMode};
use libwb::device::sim::{Crash, Faults, SimDevice, Simulation};
use libwb::device::{BlockDevice, Device, DeviceError, IoBuf, IoFuture, Operation, SharedBuf};
use libwb::format::{
    BLOCK_BYTES, SECTOR_BYTES, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector, SuperblockExtension,
    to_u64, to_usize,
};
use libwb::log::Use;
use libwb::log::format_device::create;
use libwb::log::salvage::Scanned;
use libwb::log::superblock::read_superblock;
use libwb::rules::{Rule, Rules};
use nix::errno::Errno;
use parking_lot::Mutex;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use uuid::Uuid;
use wb_tests::sim::module;

const SEGMENTS: usize = 8;
const BLOCKS: usize = 16;
const SEEDS: u64 = 20;
const BLOCK: u64 = to_u64(BLOCK_BYTES);

/// Reads and writes that touch these bytes fail, and such a write has no effect.
#[derive(Clone, Default)]
struct Bad {
    reads: Range<u64>,
    writes: Range<u64>,
}

/// A cache device with bad places.
struct BadPlaces {
    device: Mutex<Arc<SimDevice>>,
    name: Arc<str>,
    bad: Mutex<Bad>,
}

impl BadPlaces {
    fn device(&self) -> Arc<SimDevice> {
        self.device.lock().clone()
    }

    fn refusal(&self, operation: Operation, offset: u64, length: usize) -> Option<DeviceError> {
        let bad = self.bad.lock();
        let bad = if operation == Operation::Read { &bad.reads } else { &bad.writes };
        let (device, length, cause) = (self.name.clone(), to_u64(length), Errno::EIO);
        let touched = offset < bad.end && bad.start < offset + length;
        touched.then_some(DeviceError { device, operation, offset, length, cause })
    }
}

impl BlockDevice for BadPlaces {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn size(&self) -> u64 {
        self.device().size()
    }

    fn block_size(&self) -> u32 {
        self.device().block_size()
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        match self.refusal(Operation::Read, offset, buf.len()) {
            Some(error) => Box::pin(std::future::ready(Err(error))),
            None => self.device().read(offset, buf),
        }
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        match self.refusal(Operation::Write, offset, data.len()) {
            Some(error) => Box::pin(std::future::ready(Err(error))),
            None => self.device().write(offset, data),
        }
    }

    fn flush(&self) -> IoFuture<()> {
        self.device().flush()
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.device().discard(offset, length)
    }
}

/// Where a slot's header lies.
fn header(slot: u64) -> Range<u64> {
    let start = SUPERBLOCK_REGION_BYTES + slot * to_u64(SEGMENT_BYTES);
    start..start + BLOCK
}

/// A volume on simulated devices, with or without a bug.
struct TestVolume {
    simulation: Simulation,
    cache: Arc<BadPlaces>,
    backing: Arc<SimDevice>,
    rules: Rules,
}

impl TestVolume {
    fn new(extended: bool, seed: u64, rules: Rules) -> TestVolume {
        let simulation = Simulation::new(seed);
        let device = |name, bytes| SimDevice::new(simulation.runtime(), name, vec![0; bytes], 512);
        let cache = device("cache", to_usize(SUPERBLOCK_REGION_BYTES) + SEGMENTS * SEGMENT_BYTES);
        let backing = Arc::new(device("backing", BLOCKS * BLOCK_BYTES));
        let page = SuperblockExtension::new(Uuid::from_u128(7), cache.size());
        let (device, name) = (Mutex::new(Arc::new(cache)), "cache".into());
        let cache = Arc::new(BadPlaces { device, name, bad: Mutex::default() });
        let test = TestVolume { simulation, cache, backing, rules };
        test.run(create(&test.cache(), extended.then_some(&page), |_| ())).expect("an empty cache");
        test
    }

    fn cache(&self) -> Device {
        self.cache.clone()
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.simulation.block_on(future).expect("it ends")
    }

    fn open(&self) -> Cache {
        let runtime = Arc::new(self.simulation.runtime().clone());
        let tunables = Tunables { writeback_threshold: 0, ..Tunables::default() };
        let opening = Cache::open(
            self.cache(),
            self.backing.clone(),
            runtime,
            OpenOptions::serve().tunables(tunables).rules(self.rules),
        );
        self.run(opening).expect("a sound cache")
    }

    /// Writes blocks, a segment for each, and writes them back.
    fn write_back(&self, cache: &Cache, blocks: Range<u64>, fill: u8) {
        for block in blocks {
            self.write(cache, block, fill);
            self.run(cache.drain()).expect("written back");
        }
    }

    fn write(&self, cache: &Cache, block: u64, fill: u8) {
        self.run(cache.write(Sector(block * 8), &[fill; BLOCK_BYTES])).expect("written");
    }

    fn discard(&self, cache: &Cache, block: u64) -> Result<(), CacheError> {
        self.run(cache.discard(Sector(block * 8), BLOCK))
    }

    fn fail(&self, faults: Faults) {
        self.cache.device().set_faults(faults);
    }

    fn heal(&self) {
        self.fail(Faults::default());
        *self.cache.bad.lock() = Bad::default();
    }

    /// Cuts the power.
    fn cut(&mut self) {
        self.simulation.kill_tasks();
        let left = self.cache.device().crash(Crash::PowerCut);
        *self.cache.device.lock() = Arc::new(left);
        self.backing = Arc::new(self.backing.crash(Crash::PowerCut));
    }

    /// The byte that fills a block as the kernel module would show it now.
    fn for_module(&self, block: u64) -> Result<u8, String> {
        let volume = module::volume(&self.cache.device().content(), self.backing.content())?;
        Ok(volume[to_usize(block * BLOCK)])
    }

    fn clean_mark(&self) -> Option<u64> {
        let superblock =
            self.run(read_superblock(&self.cache(), Use::Read)).expect("a sound superblock");
        superblock.extension.expect("an extended cache").clean.map(|id| id.0)
    }
}

/// The header of a segment cannot be read when a block of it is discarded.
fn discards_what_cannot_be_read(rules: Rules, extended: bool, seed: u64) -> Result<(), String> {
    let test = TestVolume::new(extended, seed, rules);
    let cache = test.open();
    test.write_back(&cache, 0..2, 1);
    test.cache.bad.lock().reads = header(0);
    test.discard(&cache, 0).map_err(|e| e.to_string())?;
    test.heal();
    test.run(cache.close()).map_err(|e| e.to_string())?;
    match (test.for_module(0)?, test.for_module(1)?) {
        (0, 1) => Ok(()),
        shown => Err(format!("the module shows {shown:?}")),
    }
}

/// A discard fails during the write that empties a segment, and is tried again.
fn discards_again(rules: Rules, extended: bool, seed: u64) -> Result<(), String> {
    let mut test = TestVolume::new(extended, seed, rules);
    let cache = test.open();
    test.write_back(&cache, 0..2, 1);
    test.fail(Faults { write: 1.0, ..Faults::default() });
    if test.discard(&cache, 0).is_ok() {
        return Err("a discard was acknowledged, though the device fails".into());
    }
    test.heal();
    test.discard(&cache, 0).map_err(|e| e.to_string())?;
    test.cut();
    let cache = test.open();
    test.run(cache.close()).map_err(|e| e.to_string())?;
    match test.for_module(0)? {
        0 => Ok(()),
        shown => Err(format!("the module shows {shown}")),
    }
}

type Scenario = fn(Rules, bool, u64) -> Result<(), String>;

/// The first failure among seeds with and without the extension.
fn failure(scenario: Scenario, rules: Rules) -> Option<String> {
    let all = (0..SEEDS).flat_map(|seed| [false, true].map(|extended| (extended, seed)));
    let judge = |(extended, seed)| {
        let failed = scenario(rules, extended, seed).err()?;
        Some(format!("extended: {extended}, seed {seed}: {failed}"))
    };
    all.into_iter().find_map(judge)
}

#[test]
fn what_is_discarded_does_not_come_back_whatever_fails_meanwhile() {
    let scenarios: [(Scenario, Rule); 2] = [
        (discards_what_cannot_be_read, Rule::UnreadableEmptied),
        (discards_again, Rule::EmptiedOnlyWhenFlushed),
    ];
    for (scenario, bug) in scenarios {
        assert_eq!(failure(scenario, Rules::default()), None);
        let text = failure(scenario, Rules::breaking(bug));
        assert!(
            text.as_ref().is_some_and(|text| text.contains("the module shows")),
            "{bug:?}: {text:?}"
        );
    }
}

#[test]
fn while_a_header_cannot_be_written_discards_of_other_blocks_go_on_and_a_close_says_it() {
    let mut test = TestVolume::new(true, 1, Rules::default());
    let cache = test.open();
    test.write_back(&cache, 0..3, 1);
    test.run(cache.close()).unwrap();
    assert_eq!(test.clean_mark(), Some(3));

    let cache = test.open();
    test.write_back(&cache, 3..6, 1);
    // That of segment 4, which holds block 3.
    *test.cache.bad.lock() = Bad { reads: header(3), writes: header(3) };
    for _ in 0..3 {
        let refused = test.discard(&cache, 3);
        assert!(
            matches!(&refused, Err(CacheError::Device(e)) if e.operation == Operation::Write),
            "{refused:?}"
        );
    }
    for block in [0, 4] {
        test.discard(&cache, block).expect("a discard of other blocks");
    }
    // A write that should go around the log goes on top of it.
    cache.set_tunables(Tunables { write_mode: WriteMode::Around, ..cache.tunables() });
    test.write(&cache, 3, 2);
    assert_eq!(cache.status().statistics.counters.direct_write_bytes, 0);
    test.write(&cache, 5, 2);
    assert_eq!(cache.status().statistics.counters.direct_write_bytes, BLOCK);
    let closed = test.run(cache.close());
    assert!(matches!(closed, Err(CacheError::NotHandedOver(_))), "{closed:?}");
    assert_eq!(test.clean_mark(), None);

    // That loses nothing, and once the device works, the module may take over.
    test.heal();
    test.cut();
    let cache = test.open();
    let volume = test.run(cache.read(Sector(0), IoBuf::zeroed(6 * BLOCK_BYTES))).unwrap();
    let shown: Vec<u8> = volume.iter().copied().step_by(BLOCK_BYTES).collect();
    assert_eq!(shown, [0, 1, 1, 2, 0, 2]);
    test.run(cache.close()).unwrap();
    let for_module: Vec<u8> = (0..6).map(|block| test.for_module(block).unwrap()).collect();
    assert_eq!(for_module, shown);
    assert_eq!(test.clean_mark(), Some(7));
}

/// It may hold a version that a later one supersedes.
#[test]
fn a_close_empties_what_it_cannot_read() {
    for extended in [false, true] {
        let test = TestVolume::new(extended, 1, Rules::default());
        let cache = test.open();
        test.write_back(&cache, 0..1, 1);
        test.run(cache.write(Sector(0), &[2; 512])).unwrap();
        test.run(cache.drain()).unwrap();
        test.write_back(&cache, 1..2, 1);
        // Segment 1 holds a whole version of the block, and segment 2 a partial one.
        test.cache.bad.lock().reads = header(0).start..header(1).end;
        test.run(cache.close()).unwrap();
        test.heal();
        let shown: Vec<u8> = (0..2).map(|block| test.for_module(block).unwrap()).collect();
        assert_eq!(shown, [2, 1], "extended: {extended}");
    }
}

/// A torn write of it could end the log below what the record declares written back.
#[test]
fn the_newest_segment_is_never_written_without_reading_it() {
    for extended in [false, true] {
        let mut test = TestVolume::new(extended, 1, Rules::default());
        let cache = test.open();
        test.write_back(&cache, 0..1, 1);
        test.cache.bad.lock().reads = header(0);
        test.discard(&cache, 0).expect_err("nothing is newer");
        test.write(&cache, 1, 1);
        test.run(cache.drain()).unwrap();
        test.discard(&cache, 0).expect("a newer segment is durable");
        test.heal();
        test.cut();
        let cache = test.open();
        test.run(cache.close()).unwrap();
        assert_eq!(
            (test.for_module(0), test.for_module(1)),
            (Ok(0), Ok(1)),
            "extended: {extended}"
        );
    }
}

/// A crashed cache with versions of a block that the kernel module would mistake for newer ones.
/// Block 0 has a whole and a partial version, both written back. Block 1 has the same in one
/// segment, and partial versions that are not written back.
fn crashed(extended: bool) -> TestVolume {
    let mut test = TestVolume::new(extended, 1, Rules::default());
    let cache = test.open();
    let write = |sector, sectors: usize, fill| {
        let data = vec![fill; sectors * SECTOR_BYTES];
        test.run(cache.write(Sector(sector), &data)).expect("written");
        test.run(cache.flush()).expect("durable");
    };
    test.write_back(&cache, 0..1, 1);
    write(0, 1, 2);
    write(8, 8, 1);
    write(8, 1, 2);
    test.run(cache.drain()).expect("written back");
    cache.pause();
    write(9, 1, 3);
    write(8, 1, 4);
    test.cut();
    test
}

/// What fills the first three sectors of blocks 0 and 1 of that.
const AFTER_CRASH: [[u8; 3]; 2] = [[2, 1, 1], [4, 3, 1]];

fn shown(volume: &[u8]) -> [[u8; 3]; 2] {
    [0, 1].map(|block| [0, 1, 2].map(|sector| volume[block * BLOCK_BYTES + sector * SECTOR_BYTES]))
}

#[test]
fn after_a_crash_a_repair_makes_the_module_read_what_we_recover() {
    for extended in [false, true] {
        let test = crashed(extended);
        let (content, backing) = (test.cache.device().content(), test.backing.content());
        assert_ne!(shown(&module::volume(&content, backing.clone()).unwrap()), AFTER_CRASH);
        let repaired = module::volume_after_repair(content, backing).unwrap();
        assert_eq!(shown(&repaired), AFTER_CRASH, "extended: {extended}");
        // And so does a detach.
        let cache = test.open();
        let ours = test.run(cache.read(Sector(0), IoBuf::zeroed(2 * BLOCK_BYTES))).unwrap();
        assert_eq!(shown(&ours), AFTER_CRASH);
        test.run(cache.close()).unwrap();
        let closed = test.cache.device().content();
        assert_eq!(shown(&module::volume(&closed, test.backing.content()).unwrap()), AFTER_CRASH);
        test.run(module::repair(&test.cache())).unwrap();
        assert!(
            test.cache.device().content() == closed,
            "nothing is left to repair after a detach"
        );
    }
}

#[test]
fn a_power_cut_at_any_moment_of_a_repair_is_harmless() {
    for (extended, seed) in
        [false, true].into_iter().flat_map(|extended| (0..4).map(move |seed| (extended, seed)))
    {
        let test = crashed(extended);
        let (content, backing) = (test.cache.device().content(), test.backing.content());
        let planned = test.run(async {
            Scanned::read(&test.cache(), Use::Write, |_| ()).await?.repair(&test.cache()).await
        });
        let plan = planned.unwrap().expect("something to repair");
        let is_done = (0..).find(|&moment| {
            let simulation = Simulation::new(seed);
            let cache =
                Arc::new(SimDevice::new(simulation.runtime(), "cache", content.clone(), 512));
            let device: Device = cache.clone();
            simulation.runtime().halt_after_io(moment);
            let is_done = simulation.block_on(plan.apply(&device)).is_ok();
            let left = cache.crash(Crash::PowerCut).content();
            let again = module::volume_after_repair(left, backing.clone()).unwrap();
            assert_eq!(
                shown(&again),
                AFTER_CRASH,
                "extended: {extended}, seed {seed}, moment {moment}"
            );
            is_done
        });
        assert!(is_done > Some(5), "{is_done:?}");
    }
}
