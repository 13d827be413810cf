//! Flushes of the volume when the cache device fails: as it makes a durable write, on a device that
//! prefers them, or as it is flushed. And durable writes that meet a flush. The simulator hardly
//! ever comes across any of these.

use futures_util::future::join;
use libwb::cache::{Cache, Head, OpenOptions};
use libwb::device::sim::{Crash, Faults, SimDevice, Simulation};
use libwb::device::{BlockDevice, Device, IoBuf, IoFuture, SharedBuf};
use libwb::format::{BLOCK_BYTES, BlockNo, to_usize};
use libwb::rules::{Rule, Rules};
use libwb::runtime::Runtime;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use wb_tests::sim::devices::{fresh_backing, fresh_cache};

const SEGMENTS: u64 = 8;
/// More than two segments hold.
const BLOCKS: u64 = 300;
/// In how many runs a broken rule must show.
const SEEDS: u64 = 50;

/// A cache device that notices a flush during a durable write.
struct Overlapping {
    device: Arc<SimDevice>,
    flushes: Arc<AtomicU32>,
    durable_writes: Arc<AtomicU32>,
    overlapped: AtomicBool,
}

impl Overlapping {
    fn counted(&self, count: &Arc<AtomicU32>, operation: IoFuture<()>) -> IoFuture<()> {
        count.fetch_add(1, Ordering::Relaxed);
        let both = [&self.flushes, &self.durable_writes];
        if both.iter().all(|count| count.load(Ordering::Relaxed) > 0) {
            self.overlapped.store(true, Ordering::Relaxed);
        }
        let count = count.clone();
        Box::pin(async move {
            let done = operation.await;
            count.fetch_sub(1, Ordering::Relaxed);
            done
        })
    }
}

impl BlockDevice for Overlapping {
    fn name(&self) -> &Arc<str> {
        self.device.name()
    }

    fn size(&self) -> u64 {
        self.device.size()
    }

    fn block_size(&self) -> u32 {
        self.device.block_size()
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        self.device.read(offset, buf)
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        self.device.write(offset, data)
    }

    fn prefers_durable_writes(&self) -> bool {
        self.device.prefers_durable_writes()
    }

    fn write_durably(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        self.counted(&self.durable_writes, self.device.write_durably(offset, parts))
    }

    fn flush(&self) -> IoFuture<()> {
        self.counted(&self.flushes, self.device.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.device.discard(offset, length)
    }
}

struct TestVolume {
    simulation: Simulation,
    cache: Arc<SimDevice>,
    backing: Arc<SimDevice>,
}

impl TestVolume {
    fn new(seed: u64, prefers_durable_writes: bool) -> TestVolume {
        let simulation = Simulation::new(seed);
        let device = |name, content| SimDevice::new(simulation.runtime(), name, content, 512);
        let cache = device("cache", fresh_cache(SEGMENTS, true))
            .preferring_durable_writes(prefers_durable_writes);
        let backing = device("backing", fresh_backing(8 * BLOCKS));
        let [cache, backing] = [cache, backing].map(Arc::new);
        TestVolume { simulation, cache, backing }
    }

    fn crash(&mut self, crash: Crash) {
        self.simulation.kill_tasks();
        self.cache = Arc::new(self.cache.crash(crash));
        self.backing = Arc::new(self.backing.crash(crash));
    }

    /// Whether the volume shows all that was written.
    fn is_whole(&self) -> bool {
        let runtime = Arc::new(self.simulation.runtime().clone());
        let (cache, backing) = (self.cache.clone(), self.backing.clone());
        self.run(async {
            let cache = Cache::open(cache, backing, runtime, OpenOptions::serve()).await.ok()?;
            let length = to_usize(BLOCKS) * BLOCK_BYTES;
            let data = cache.read(BlockNo(0).sector(), IoBuf::zeroed(length)).await.ok()?;
            Some(data.iter().all(|&byte| byte == 7))
        }) == Some(true)
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.simulation.block_on(future).expect("an end")
    }

    fn open(&self, cache: Device, rules: Rules) -> Cache {
        self.open_with(cache, OpenOptions::serve().rules(rules))
    }

    fn open_with(&self, cache: Device, options: OpenOptions) -> Cache {
        let runtime = Arc::new(self.simulation.runtime().clone());
        self.run(Cache::open(cache, self.backing.clone(), runtime, options)).expect("a sound log")
    }
}

/// Whether a power cut takes what a flush had promised, after the durable write or the flush of a
/// commit has failed once. What follows the commit is written meanwhile.
fn loses_data(seed: u64, rules: Rules, prefers_durable_writes: bool) -> bool {
    let mut volume = TestVolume::new(seed, prefers_durable_writes);
    let cache = volume.open(volume.cache.clone(), rules);
    cache.pause();
    let runtime = volume.simulation.runtime().clone();
    let write = async |block| cache.write(BlockNo(block).sector(), &[7; BLOCK_BYTES]).await;
    volume.run(write(0)).expect("a sound device");
    let others = async {
        // Let the commit begin.
        runtime.sleep(Duration::from_micros(1)).await;
        volume.cache.set_faults(Faults { flush: 1.0, ..Faults::default() });
        for block in 1..BLOCKS {
            let _ = write(block).await;
        }
        runtime.sleep(Duration::from_millis(1)).await;
        volume.cache.set_faults(Faults::default());
    };
    let _ = volume.run(join(cache.flush(), others));
    let is_promised = volume.run(cache.flush()).is_ok();
    drop(cache);
    volume.crash(Crash::PowerCut);
    is_promised && !volume.is_whole()
}

/// The same if the process dies after a flush has failed, and another one goes on.
fn loses_data_after_a_death(
    seed: u64,
    rules: Rules,
    prefers_durable_writes: bool,
    fails_at_open: bool,
) -> bool {
    let mut volume = TestVolume::new(seed, prefers_durable_writes);
    let head = Head::create().expect("memory");
    let options = |head: &Head| OpenOptions::serve().rules(rules).head(head.clone());
    let cache = volume.open_with(volume.cache.clone(), options(&head));
    cache.pause();
    let runtime = volume.simulation.runtime().clone();
    volume.run(async {
        for block in 0..BLOCKS {
            let written = cache.write(BlockNo(block).sector(), &[7; BLOCK_BYTES]).await;
            written.expect("a sound device");
        }
        // Let full segments reach the device, so that they are in memory no more.
        runtime.sleep(Duration::from_millis(1)).await;
    });
    let failing = Faults { flush: 1.0, ..Faults::default() };
    let left = || head.descriptor().try_clone_to_owned().and_then(Head::open).expect("a head");
    if !fails_at_open {
        volume.cache.set_faults(failing);
        assert!(volume.run(cache.flush()).is_err());
        volume.cache.set_faults(Faults::default());
    }
    drop(cache);
    // The devices are as they were: also the data that no flush covers any more.
    volume.simulation.kill_tasks();
    if fails_at_open {
        volume.cache.set_faults(failing);
        let [cache, backing] = [volume.cache.clone(), volume.backing.clone()];
        let opening = Cache::open(cache, backing, Arc::new(runtime), options(&left()));
        assert!(volume.run(opening).is_err());
        volume.cache.set_faults(Faults::default());
        volume.simulation.kill_tasks();
    }
    let cache = volume.open_with(volume.cache.clone(), options(&left()));
    cache.pause();
    let is_promised = volume.run(cache.flush()).is_ok();
    drop(cache);
    volume.crash(Crash::PowerCut);
    is_promised && !volume.is_whole()
}

/// Whether the cache device is flushed during a durable write, while small writes are flushed and
/// older ones written back.
fn flushes_meanwhile(seed: u64, rules: Rules) -> bool {
    let volume = TestVolume::new(seed, true);
    let device = Arc::new(Overlapping {
        device: volume.cache.clone(),
        flushes: Arc::default(),
        durable_writes: Arc::default(),
        overlapped: AtomicBool::new(false),
    });
    let cache = volume.open(device.clone(), rules);
    let small = async {
        for block in 0..60 {
            let written = cache.write(BlockNo(block).sector(), &[7; BLOCK_BYTES]).await;
            written.and(cache.flush().await).expect("sound devices");
        }
    };
    let drains = async {
        for _ in 0..10 {
            cache.drain().await.expect("sound devices");
        }
    };
    volume.run(join(small, drains));
    device.overlapped.load(Ordering::Relaxed)
}

fn seeds_with(shows: impl Fn(u64, Rules) -> bool, rules: Rules) -> usize {
    (0..SEEDS).filter(|&seed| shows(seed, rules)).count()
}

#[test]
fn after_a_failed_durable_write_nothing_is_promised() {
    let loses_data = |seed, rules| loses_data(seed, rules, true);
    assert_eq!(seeds_with(loses_data, Rules::default()), 0);
    assert!(seeds_with(loses_data, Rules::breaking(Rule::FailedDurableWriteFinal)) > 0);
}

#[test]
fn after_a_failed_flush_nothing_is_promised() {
    let loses_data = |seed, rules| loses_data(seed, rules, false);
    assert_eq!(seeds_with(loses_data, Rules::default()), 0);
    assert!(seeds_with(loses_data, Rules::breaking(Rule::FailedFlushFinal)) > 0);
}

#[test]
fn after_a_failed_flush_the_next_process_promises_nothing_either() {
    for (durable, at_open) in [(false, false), (true, false), (false, true), (true, true)] {
        let loses_data = |seed, rules| loses_data_after_a_death(seed, rules, durable, at_open);
        assert_eq!(seeds_with(loses_data, Rules::default()), 0);
        assert!(seeds_with(loses_data, Rules::breaking(Rule::HeadKeepsFailure)) > 0);
    }
}

#[test]
fn the_cache_device_is_not_flushed_during_a_durable_write() {
    assert_eq!(seeds_with(flushes_meanwhile, Rules::default()), 0);
    assert!(seeds_with(flushes_meanwhile, Rules::breaking(Rule::DurableWriteAlone)) > 0);
}
