//! The whole engine with its backing device on a server: the scenarios of the simulator, while
//! connections are slow, break or swallow what they get, and the server hangs, dies, and comes back
//! with what it has flushed.
//!
//! `WB_SIM_SEED` chooses the seed of `one_seed`; `WB_SIM_FIRST_SEED` and `WB_SIM_SEEDS` those of
//! `many_seeds`.

use futures_lite::future::poll_once;
use libwb::cache::{Cache, CacheError, OpenOptions, Tunables};
use libwb::device::nbd::{LinkError, NbdDevice, Options};
use libwb::device::sim::network::SimServer;
use libwb::device::sim::{Faults, SimDevice, SimRuntime, Simulation};
use libwb::device::{Device, IoBuf};
use libwb::format::{BLOCK_BYTES, PLACES, Sector, to_usize};
use libwb::nbd::ExportName;
use libwb::rules::{Rule, Rules};
use libwb::runtime::Runtime;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use wb_tests::sim::devices::{fresh_backing, fresh_cache};
use wb_tests::sim::network::flags;
use wb_tests::sim::real::WriteCache;
use wb_tests::sim::{run_over_network, seeds};

/// `make sim` runs more.
const DEFAULT_SEEDS: u64 = 150;
const SEGMENTS: u64 = 3;
const BLOCKS: u64 = 8 * SEGMENTS * PLACES as u64;

#[test]
fn one_seed() {
    seeds::run_one(|seed| run_over_network(&WriteCache::default(), seed));
}

#[test]
fn many_seeds() {
    for seed in seeds::chosen(DEFAULT_SEEDS) {
        if let Err(failure) = run_over_network(&WriteCache::default(), seed) {
            panic!("{failure}");
        }
    }
}

#[test]
fn a_seed_repeats_its_scenario_exactly() {
    for seed in 0..5 {
        let report = || run_over_network(&WriteCache::default(), seed).expect("a sound engine");
        assert_eq!(report(), report());
    }
}

#[test]
fn every_broken_rule_is_noticed() {
    for (rule, seeds) in [
        // A slot is used again although the flush of the backing device was lost with the link.
        (Rule::LinkFlushSentAgain, 400),
        (Rule::LinkWritesAgain, 400),
        (Rule::BackingFlushedBeforeRecord, 400),
    ] {
        let failure = |seed| run_over_network(&WriteCache::with(rule), seed).err();
        let found = (0..seeds).find_map(|seed| failure(seed).map(|failure| (seed, failure.text)));
        let (seed, text) = found.unwrap_or_else(|| panic!("{rule:?} goes unnoticed"));
        println!("{rule:?}: seed {seed}: {}", text.lines().next().unwrap_or_default());
    }
}

/// A volume whose backing device is on a server, for one process.
struct Linked {
    simulation: Simulation,
    server: SimServer,
    log: Arc<SimDevice>,
    cache: Cache,
}

fn opened(simulation: &Simulation, server: &SimServer) -> Device {
    let options = Options::new(ExportName::default()).writable(true);
    let runtime = Arc::new(simulation.runtime().clone());
    loop {
        let connector = Arc::new(server.clone());
        let opening = NbdDevice::open(runtime.clone(), connector, "nbd", options.clone());
        match simulation.block_on(opening).expect("it goes on") {
            // The simulator's time may pass at once.
            Err(LinkError::Timeout) => {}
            opened => return Arc::new(opened.expect("a server")),
        }
    }
}

impl Linked {
    fn new(rules: Rules) -> Linked {
        let simulation = Simulation::new(1);
        let runtime = simulation.runtime();
        let log = SimDevice::new(runtime, "cache", fresh_cache(SEGMENTS, true), 512);
        let disk = SimDevice::new(runtime, "disk", fresh_backing(BLOCKS * 8), 512);
        let server = SimServer::new(runtime, disk, flags(0));
        let log = Arc::new(log);
        let cache = Linked::open(&simulation, &server, &log, rules);
        Linked { simulation, server, log, cache }
    }

    fn open(
        simulation: &Simulation,
        server: &SimServer,
        log: &Arc<SimDevice>,
        rules: Rules,
    ) -> Cache {
        let backing = opened(simulation, server);
        let runtime = Arc::new(simulation.runtime().clone());
        let opening = Cache::open(log.clone(), backing, runtime, OpenOptions::serve().rules(rules));
        simulation.block_on(opening).expect("it goes on").expect("a volume")
    }

    fn runtime(&self) -> &SimRuntime {
        self.simulation.runtime()
    }

    fn finish<T>(&self, future: impl Future<Output = T>) -> T {
        self.simulation.block_on(future).expect("it goes on")
    }

    /// Second by second, since the simulator's time may pass at once.
    async fn seconds(&self, seconds: u32) {
        for _ in 0..seconds {
            self.runtime().sleep(Duration::from_secs(1)).await;
        }
    }

    /// Writes block after block until one fails, or waits for 100 s. Returns how many were written,
    /// and the error.
    async fn fill(&self, from: u64) -> (u64, Option<CacheError>) {
        for block in from..BLOCKS {
            let data = data(block);
            let mut write = std::pin::pin!(self.cache.write(Sector(block * 8), &data));
            let mut written = poll_once(&mut write).await;
            for _ in 0..100 {
                if written.is_some() {
                    break;
                }
                self.seconds(1).await;
                written = poll_once(&mut write).await;
            }
            match written {
                Some(Ok(())) => {}
                Some(Err(error)) => return (block, Some(error)),
                None => return (block, None),
            }
        }
        panic!("the log takes everything");
    }

    fn set_timeout(&self, backing_timeout: u32) {
        self.cache.set_tunables(Tunables { backing_timeout, ..Tunables::default() });
    }
}

fn data(block: u64) -> Vec<u8> {
    (block + 1).to_le_bytes().repeat(BLOCK_BYTES / 8)
}

#[test]
fn writes_wait_while_the_link_is_down_and_write_back_goes_on_by_itself() {
    let volume = Linked::new(Rules::default());
    volume.finish(async {
        volume.server.die();
        let (count, error) = volume.fill(0).await;
        assert!(error.is_none() && count > 0, "after {count} blocks: {error:?}");
        let waiting = data(count);
        let mut waits = std::pin::pin!(volume.cache.write(Sector(count * 8), &waiting));
        assert!(poll_once(&mut waits).await.is_none(), "the log is full");
        let status = volume.cache.status();
        let link = status.link.expect("it is on a server");
        assert!(link.is_awaited() && link.down_for >= Some(Duration::from_secs(60)), "{link:?}");
        assert_eq!((status.failure, status.writeback_error), (None, None));
        volume.server.start();
        waits.await.expect("there is room again");
        volume.cache.drain().await.expect("the link is up");
        let status = volume.cache.status();
        assert_eq!(status.link.and_then(|link| link.down_for), None);
        let read = volume.cache.read(Sector(0), IoBuf::zeroed(BLOCK_BYTES)).await.expect("a read");
        assert_eq!(read[..], data(0));
    });
    let disk = volume.server.device().durable();
    assert_eq!(disk[..BLOCK_BYTES], data(0));
}

/// Write-back fails for so long that writes fail, too, and then the link is lost.
fn lose_the_link_of_a_failing_disk(rules: Rules) {
    let volume = Linked::new(rules);
    volume.finish(async {
        volume.server.device().set_faults(Faults { write: 1.0, ..Faults::default() });
        let (count, error) = volume.fill(0).await;
        assert!(matches!(error, Some(CacheError::Full(_))), "after {count} blocks: {error:?}");
        volume.server.die();
        // Until a batch waits for the link.
        while !volume.cache.status().link.is_some_and(|link| link.is_awaited() && link.waiting > 0)
        {
            volume.seconds(1).await;
        }
        let (_, error) = volume.fill(count).await;
        assert!(error.is_none(), "the link is only down: {error:?}");
        volume.server.start();
        volume.cache.write(Sector(count * 8), &data(count)).await.expect("another disk");
        volume.cache.drain().await.expect("another disk");
    });
}

#[test]
fn a_link_that_is_down_is_no_fault_even_of_a_disk_that_has_failed() {
    lose_the_link_of_a_failing_disk(Rules::default());
}

#[test]
fn an_engine_that_fails_writes_because_the_link_is_down_is_noticed() {
    let rules = Rules::breaking(Rule::LostLinkNoFault);
    let broken = || lose_the_link_of_a_failing_disk(rules);
    assert!(catch_unwind(AssertUnwindSafe(broken)).is_err());
}

#[test]
fn after_the_timeout_writes_fail_as_with_a_failing_disk_until_it_is_raised() {
    let volume = Linked::new(Rules::default());
    volume.finish(async {
        volume.set_timeout(20);
        volume.server.die();
        let (count, error) = volume.fill(0).await;
        assert!(matches!(error, Some(CacheError::Full(_))), "after {count} blocks: {error:?}");
        let status = volume.cache.status();
        let link = status.link.expect("it is on a server");
        assert!(link.has_given_up && link.down_for >= Some(Duration::from_secs(50)), "{link:?}");
        assert!(status.writeback_error.is_some_and(|error| error.contains("timed out")));
        volume.set_timeout(0);
        let (_, error) = volume.fill(count).await;
        assert!(error.is_none(), "it waits again: {error:?}");
        volume.server.start();
        volume.cache.write(Sector(count * 8), &data(count)).await.expect("the link is up");
        volume.cache.drain().await.expect("the link is up");
    });
}

#[test]
fn a_close_needs_no_link() {
    let Linked { simulation, server, log, cache } = {
        let volume = Linked::new(Rules::default());
        volume.finish(async {
            volume.server.die();
            let (count, error) = volume.fill(0).await;
            assert!(error.is_none() && count > 0, "after {count} blocks: {error:?}");
            assert!(volume.cache.status().writing_back);
            volume.cache.close().await.expect("all is in the log");
        });
        volume
    };
    drop(cache);
    server.start();
    let cache = Linked::open(&simulation, &server, &log, Rules::default());
    let read = cache.read(Sector(0), IoBuf::zeroed(to_usize(BLOCK_BYTES as u64)));
    assert_eq!(simulation.block_on(read).expect("it goes on").expect("a read")[..], data(0));
}
