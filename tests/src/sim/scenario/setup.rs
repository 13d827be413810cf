//! What a seed decides before a scenario starts.

use super::backing::Backing;
use super::death::Heads;
use super::{Location, Scenario, Watch};
use crate::sim::devices::{fresh_backing, fresh_cache};
use crate::sim::engine::{Engine, EngineConfig};
use crate::sim::oracle::Oracle;
use fastrand::Rng;
use libwb::cache::WriteMode;
use libwb::device::sim::{SimDevice, Simulation};
use parking_lot::Mutex;
use std::sync::Arc;

impl<'a> Scenario<'a> {
    pub(super) fn new(
        engine: &'a dyn Engine,
        seed: u64,
        location: Location,
        watch: &'a mut Watch<'a>,
    ) -> Scenario<'a> {
        let simulation = Simulation::new(seed);
        let runtime = simulation.runtime().clone();
        let mut rng = Rng::with_seed(!seed);
        let segments = match rng.u32(..3) {
            0 => 3,
            1 => rng.u64(1..=14),
            _ => rng.u64(8..=20),
        };
        let unit = if rng.u32(..8) == 0 { 8 } else { 1 };
        let block_size = if rng.u32(..4) == 0 { 4096 } else { 512 };
        // The server says nothing of the sizes that it takes.
        let block_size = if location == Location::Server { 512 } else { block_size };
        let cache_block_size = if rng.u32(..4) == 0 { 4096 } else { 512 };
        let sectors = volume_sectors(&mut rng, block_size);
        let extended = rng.bool();
        let cache =
            SimDevice::new(&runtime, "cache", fresh_cache(segments, extended), cache_block_size);
        // Only commits are written durably, and only an extended device has commits.
        let durable_writes = extended && seed / 4 % 2 == 1;
        let cache = cache.preferring_durable_writes(durable_writes);
        let backing = SimDevice::new(&runtime, "backing", fresh_backing(sectors), block_size);
        let slowness = rng.choice([1, 1, 10, 100]).unwrap_or(1);
        backing.set_slowness(slowness);
        let faulty = rng.u32(..5) == 0;
        let forgetful = !extended && rng.u32(..4) == 0;
        // Without its record, write-back starts again from an older segment.
        let strict = rng.u32(..6) == 0 && !forgetful;
        // There, all writes go through the log. Strict order demands it, and without a record older
        // versions would come back.
        let all_logged = forgetful || strict || !seed.is_multiple_of(4);
        let mode = all_logged.then_some(WriteMode::Back);
        let impatient = faulty && location == Location::Server && seed.is_multiple_of(3);
        let config = EngineConfig { strict, mode, impatient, ..EngineConfig::default() };
        let backing = match location {
            Location::Here => Backing::here(&runtime, backing),
            Location::Server => Backing::on_server(&runtime, backing, engine.rules(), seed),
        };
        let mut oracle = Oracle::new(sectors);
        if strict || seed.is_multiple_of(2) {
            oracle.keep_backing_history();
        }
        if engine.tears_blocks() {
            oracle.let_blocks_tear();
        }
        let settings = format!(
            "{segments} segments, extended: {extended}, durable writes: {durable_writes}, \
             {sectors} sectors, block sizes {cache_block_size} and {block_size}, backing device \
             {slowness} times slower, faulty: {faulty}, forgetful: {forgetful}, strict: {strict}, \
             all through the log: {all_logged}, backing device: {location:?}, impatient: \
             {impatient}"
        );
        Scenario {
            engine,
            watch,
            simulation,
            rng,
            later_rng: Rng::with_seed(seed.rotate_left(32)),
            copy_rng: Rng::with_seed(!seed.rotate_left(32)),
            oracle: Arc::new(Mutex::new(oracle)),
            cache: Arc::new(cache),
            backing,
            unit,
            faulty,
            extended,
            forgetful,
            config,
            volume: None,
            crashed: None,
            crashes: 0,
            heads: Heads::new(seed),
            unanswered: Default::default(),
            coming_again: Vec::new(),
            settings,
        }
    }
}

/// The size of a volume: 256 KiB to 4 MiB, not always a whole number of blocks.
fn volume_sectors(rng: &mut Rng, block_size: u32) -> u64 {
    let most = 512 << rng.u32(0..=4);
    let blocks = rng.u64(most / 2..=most) / 8;
    let odd = if block_size == 512 && rng.u32(..4) == 0 { rng.u64(1..8) } else { 0 };
    blocks * 8 + odd
}
