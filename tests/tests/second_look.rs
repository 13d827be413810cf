//! The slots that attach does not read are looked at once the volume is served. The devices here
//! have lost or altered something, which the simulator's never do by themselves.

use libwb::cache::{Cache, CacheError, OpenOptions, Tunables};
use libwb::device::sim::Simulation;
use libwb::device::{Device, DeviceError, IoBuf, MemDevice};
use libwb::format::{
    BLOCK_BYTES, BlockNo, Geometry, RECORD_BLOCK_OFFSET, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES,
    SegmentId, to_u64, to_usize,
};
use libwb::log::recovery::{Recovery, recover};
use libwb::log::scan::scan;
use libwb::log::superblock::read_superblock;
use libwb::log::{LogErrorKind, Use};
use libwb::rules::{Rule, Rules};
use libwb::runtime::Runtime;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use wb_tests::sim::devices::{fresh_backing, fresh_cache};

const SEGMENTS: u64 = 24;
/// Blocks of the volume.
const BLOCKS: u64 = 64;
/// Longer than a look at all slots takes.
const A_WHILE: Duration = Duration::from_secs(60);

struct Rig {
    simulation: Simulation,
    cache: Arc<MemDevice>,
    backing: Arc<MemDevice>,
}

impl Rig {
    fn new() -> Rig {
        Rig {
            simulation: Simulation::new(1),
            cache: Arc::new(MemDevice::with_content("cache", fresh_cache(SEGMENTS, true))),
            backing: Arc::new(MemDevice::with_content("backing", fresh_backing(8 * BLOCKS))),
        }
    }

    fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.simulation.block_on(work).expect("an end")
    }

    fn try_open(&self, rules: Rules) -> Result<Cache, CacheError> {
        // Nothing is written back unless a test asks for it.
        let tunables = Tunables { writeback_threshold: 0, ..Tunables::default() };
        let options = OpenOptions::serve().tunables(tunables).rules(rules);
        let (cache, backing): (Device, Device) = (self.cache.clone(), self.backing.clone());
        let runtime = Arc::new(self.simulation.runtime().clone());
        self.block_on(Cache::open(cache, backing, runtime, options))
    }

    fn open(&self) -> Cache {
        self.try_open(Rules::default()).expect("a sound log")
    }

    fn wait(&self) {
        self.block_on(self.simulation.runtime().sleep(A_WHILE));
    }

    /// Writes a segment for each of these ids, which are the next ones.
    fn write(&self, cache: &Cache, ids: Range<u64>) {
        for id in ids {
            // Whole blocks, so that a full segment is one.
            for nth in 0..127 {
                let data = [u8::try_from(id).expect("small"); BLOCK_BYTES];
                self.block_on(cache.write(BlockNo(nth % BLOCKS).sector(), &data)).expect("written");
                if nth % BLOCKS == BLOCKS - 1 {
                    self.block_on(cache.flush()).expect("flushed");
                }
            }
            self.block_on(cache.flush()).expect("flushed");
        }
    }

    fn overwrite(&self, at: usize, data: &[u8]) {
        let device: Device = self.cache.clone();
        self.block_on(device.write(to_u64(at), IoBuf::copy_of(data).into())).expect("memory");
    }

    fn slot(id: u64) -> usize {
        let geometry =
            Geometry::of_device(SUPERBLOCK_REGION_BYTES + SEGMENTS * to_u64(SEGMENT_BYTES));
        let geometry = geometry.expect("a cache");
        to_usize(geometry.slot_offset(geometry.slot_of(SegmentId(id))))
    }

    /// What the whole device says.
    fn recovery(&self) -> Recovery {
        let device: Device = self.cache.clone();
        self.block_on(async {
            let superblock = read_superblock(&device, Use::Write).await.expect("a cache");
            recover(&superblock, &scan(&device, superblock.geometry, |_, _| {}).await)
        })
    }

    /// A device that has lost its newest writes, all but one segment far beyond where its log now
    /// ends.
    fn which_forgot() -> Rig {
        let rig = Rig::new();
        let cache = rig.open();
        rig.write(&cache, 1..4);
        let before = rig.cache.content();
        let newest = cache.status().newest.0;
        rig.write(&cache, newest + 1..newest + 15);
        rig.simulation.kill_tasks();
        let far = Rig::slot(newest + 13);
        let left = rig.cache.content()[far..far + SEGMENT_BYTES].to_vec();
        rig.overwrite(0, &before);
        rig.overwrite(far, &left);
        rig
    }
}

#[test]
fn a_segment_beyond_the_log_that_is_served_fails_the_volume() {
    let rig = Rig::which_forgot();
    let cache = rig.open();
    let acknowledged = [0x5a; BLOCK_BYTES];
    rig.block_on(cache.write(BlockNo(1).sector(), &acknowledged)).expect("not looked yet");
    rig.wait();
    let on_device = rig.cache.content();
    assert!(on_device.chunks(BLOCK_BYTES).any(|block| block == acknowledged));
    let block = [7; BLOCK_BYTES];
    let error =
        rig.block_on(cache.write(BlockNo(0).sector(), &block)).expect_err("a failed volume");
    assert!(
        matches!(&error, CacheError::Failed(failure) if failure.cause == DeviceError::CONTRADICTS),
        "{error}"
    );
    assert!(error.to_string().contains("run wbcheck"), "{error}");
    assert!(rig.block_on(cache.flush()).is_err());
    // Reads go on.
    rig.block_on(cache.read(BlockNo(0).sector(), IoBuf::zeroed(BLOCK_BYTES))).expect("data");
    assert!(rig.block_on(cache.close()).is_err());
    // The next attach reads everything, and so refuses at once.
    let refused = rig.try_open(Rules::default()).err().expect("a corrupt log");
    let CacheError::Log(refused) = refused else { panic!("{refused}") };
    assert!(matches!(refused.kind, LogErrorKind::Corrupt { .. }), "{refused}");
}

#[test]
fn without_the_rule_the_volume_would_go_on() {
    let rig = Rig::which_forgot();
    let cache = rig.try_open(Rules::breaking(Rule::ContradictionFails)).expect("a log");
    rig.wait();
    rig.block_on(cache.write(BlockNo(0).sector(), &[7; BLOCK_BYTES])).expect("nobody has noticed");
    rig.block_on(cache.close()).expect("closed");
}

#[test]
fn a_record_of_the_kernel_module_has_the_whole_device_read() {
    let rig = Rig::which_forgot();
    // Its record says only how far the log is written back.
    let block = to_usize(RECORD_BLOCK_OFFSET);
    rig.overwrite(block, &[0; BLOCK_BYTES]);
    assert!(rig.try_open(Rules::default()).is_err());
}

#[test]
fn damaged_segments_that_are_written_back_are_emptied() {
    let rig = Rig::new();
    let cache = rig.open();
    rig.write(&cache, 1..10);
    rig.block_on(cache.drain()).expect("drained");
    let newest = cache.status().newest.0;
    rig.block_on(cache.close()).expect("closed");
    // Far from where the log goes on.
    let id = newest - 6;
    rig.overwrite(Rig::slot(id), &[0xa5; BLOCK_BYTES]);
    assert_eq!(rig.recovery().damage.len(), 1);
    let cache = rig.open();
    rig.wait();
    let recovery = rig.recovery();
    assert_eq!((recovery.damage, recovery.corruption), (Vec::new(), Vec::new()));
    rig.block_on(cache.close()).expect("closed");
}

#[test]
fn a_slot_that_the_log_has_reached_meanwhile_is_left_alone() {
    let rig = Rig::new();
    let cache = rig.open();
    rig.write(&cache, 1..4);
    rig.block_on(cache.close()).expect("closed");
    // The look goes on while segments are written to the slots that it comes to.
    for seed in 0..10 {
        let cache = rig.open();
        let newest = cache.status().newest.0;
        rig.write(&cache, newest + 1..newest + 4 + seed % 3);
        rig.block_on(cache.drain()).expect("drained");
        rig.wait();
        rig.block_on(cache.close()).expect("closed");
        assert_eq!(rig.recovery().corruption, []);
    }
}
