//! Scenarios of work and crashes on simulated devices, one for each seed.
//!
//! `WB_SIM_SEED` chooses the seed of `one_seed`; `WB_SIM_FIRST_SEED` and `WB_SIM_SEEDS` those of
//! `many_seeds`.

use libwb::cache::{Cache, OpenOptions};
use libwb::device::sim::{Crash, SimDevice, Simulation};
use libwb::device::{Device, IoBuf};
use libwb::format::{
    BLOCK_BYTES, PLACES, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector, SegmentId, to_usize,
};
use libwb::log::format_device::create;
use libwb::runtime::Runtime;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use wb_tests::sim::broken_engines::{Flaw, SimpleEngine};
use wb_tests::sim::engine::Engine;
use wb_tests::sim::real::WriteCache;
use wb_tests::sim::{Failure, run, seeds};

/// `make sim` and `make soak` run more.
const DEFAULT_SEEDS: u64 = 100;
/// How many failures of one test are shown.
const SHOWN: usize = 3;

/// Runs seeds on two threads, and panics with the failures.
fn run_seeds(engine: &(dyn Engine + Sync), seeds: std::ops::Range<u64>) {
    let next = AtomicU64::new(seeds.start);
    let work = || {
        let mut failures: Vec<Failure> = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || failures.len() >= SHOWN {
                return failures;
            }
            failures.extend(run(engine, seed).err());
        }
    };
    let failures = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mut failures = work();
        failures.extend(other.join().expect("the other thread panicked; it has named its seed"));
        failures
    });
    let text: Vec<String> = failures.iter().take(SHOWN).map(ToString::to_string).collect();
    assert!(text.is_empty(), "{}", text.join("\n\n"));
}

/// The first of `seeds` seeds that shows the flaw.
fn caught(flaw: Flaw, seeds: u64) -> Failure {
    (0..seeds)
        .find_map(|seed| run(&SimpleEngine(flaw), seed).err())
        .unwrap_or_else(|| panic!("{flaw:?} goes unnoticed"))
}

#[test]
fn one_seed() {
    seeds::run_one(|seed| run(&WriteCache::default(), seed));
}

#[test]
fn many_seeds() {
    run_seeds(&WriteCache::default(), seeds::chosen(DEFAULT_SEEDS));
}

#[test]
fn a_seed_repeats_its_scenario_exactly() {
    for seed in 0..20 {
        let report = run(&WriteCache::default(), seed).expect("a sound engine");
        assert_eq!(run(&WriteCache::default(), seed).expect("a sound engine"), report);
    }
}

#[test]
fn a_correct_engine_passes() {
    run_seeds(&SimpleEngine(Flaw::None), 0..60);
}

#[test]
fn a_flush_acknowledged_early_is_caught() {
    caught(Flaw::EarlyFlush, 20);
}

#[test]
fn a_missing_device_flush_is_caught() {
    caught(Flaw::NoDeviceFlush, 20);
}

#[test]
fn a_lost_write_is_caught() {
    caught(Flaw::LostWrite, 20);
}

#[test]
fn a_stale_read_is_caught() {
    let text = caught(Flaw::StaleRead, 20).text;
    assert!(text.contains("older than") || text.contains("replaced"), "{text}");
}

#[test]
fn writes_out_of_order_are_caught() {
    assert!(caught(Flaw::Reorders, 100).text.contains("which was submitted at"));
}

#[test]
fn a_write_done_in_part_is_caught() {
    caught(Flaw::ForgetsTail, 20);
}

#[test]
fn an_old_write_that_comes_back_is_caught() {
    caught(Flaw::Resurrects, 20);
}

#[test]
fn a_hang_is_caught() {
    let text = caught(Flaw::Hangs, 50).text;
    assert!(text.contains("deadlock") || text.contains("stuck"), "{text}");
}

/// Once the backing device has data that a killed daemon left in the volatile cache of the cache
/// device, the log must not lose that data. Otherwise a replay of the durable log would overwrite
/// it.
#[test]
fn what_is_replayed_until_a_point_is_durable_in_the_log_before() {
    let simulation = Simulation::new(1);
    let runtime: Arc<dyn Runtime> = Arc::new(simulation.runtime().clone());
    let device = |name, content| Arc::new(SimDevice::new(simulation.runtime(), name, content, 512));
    let cache = device("cache", vec![0; to_usize(SUPERBLOCK_REGION_BYTES) + 8 * SEGMENT_BYTES]);
    let backing = device("backing", vec![0; SEGMENT_BYTES]);
    simulation
        .block_on(async {
            let (cache, backing): (Device, Device) = (cache.clone(), backing.clone());
            create(&cache, None, |_| ()).await.expect("an empty cache");
            let cache = Cache::open(cache, backing, runtime.clone(), OpenOptions::serve())
                .await
                .expect("open");
            cache.pause();
            cache.write(Sector(0), &[1; BLOCK_BYTES]).await.expect("written");
            cache.flush().await.expect("durable");
            // Writes a whole segment without a flush.
            cache.write(Sector(0), &[2; BLOCK_BYTES * PLACES as usize]).await.expect("written");
            runtime.sleep(Duration::from_millis(200)).await;
            assert_eq!((cache.status().written.0, cache.status().durable.0), (2, 1));
        })
        .expect("no crash");
    simulation.kill_tasks();
    let [cache, backing] = [cache, backing].map(|device| Arc::new(device.crash(Crash::Kill)));
    simulation
        .block_on(async {
            let (cache, backing): (Device, Device) = (cache.clone(), backing.clone());
            let purpose = OpenOptions::replay_until(SegmentId(2));
            let opening = Cache::open(cache, backing, runtime.clone(), purpose);
            let cache = opening.await.expect("open");
            cache.drain().await.expect("written back");
        })
        .expect("no crash");
    simulation.kill_tasks();
    // The power fails, and only durable data is left.
    let [cache, backing] = [("cache", cache), ("backing", backing)]
        .map(|(name, before)| device(name, before.snapshot().image(|_, _| false)));
    let volume = simulation.block_on(async {
        let cache =
            Cache::open(cache, backing, runtime.clone(), OpenOptions::serve()).await.expect("open");
        cache.read(Sector(0), IoBuf::zeroed(BLOCK_BYTES * PLACES as usize)).await.expect("read")
    });
    let volume = volume.expect("no crash");
    assert_eq!(
        volume[..BLOCK_BYTES],
        volume[BLOCK_BYTES..2 * BLOCK_BYTES],
        "the first two blocks, written at once"
    );
}
