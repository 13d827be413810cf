//! A loop device over a cache on files, against a loop device over plain memory behind the same front end.

use crate::fio::{self, Load};
use crate::memory::Memory;
use crate::report::{Goal, Round, Row, Table};
use crate::{Options, rig};
use anyhow::Result;
use libwb::cache::{Cache, Tunables};
use libwb::reactor::Reactor;
use libwb::serve::loopdev::{LoopDevice, Options as LoopOptions};
use libwb::serve::{Volume, guard_against_reclaim};
use std::sync::Arc;

/// What is served: few enough bytes that all of them fit the cache, so that reads are hits.
const VOLUME_BYTES: u64 = 512 << 20;
/// More than a cache is written in a second.
const BYTES_PER_SECOND: u64 = 600 << 20;

const LOADS: [Load; 4] = [
    Load { name: "4 KiB random write, 32 in flight", pattern: "randwrite", depth: 32 },
    Load { name: "4 KiB random write, 1 in flight", pattern: "randwrite", depth: 1 },
    Load { name: "4 KiB random read, 32 in flight", pattern: "randread", depth: 32 },
    Load { name: "4 KiB random read, 1 in flight", pattern: "randread", depth: 1 },
];

/// Serves both, and loads them in turn.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    if let Err(why) = guard_against_reclaim() {
        eprintln!("wb-bench: {why}; the figures may be less than the daemon's");
    }
    let reactor = Reactor::start()?;
    // Write-back begins when half of the log is dirty; it is to be idle while a figure is taken.
    let log = 2 * (VOLUME_BYTES + BYTES_PER_SECOND * u64::from(options.seconds + 1));
    let backing = rig::file(&reactor, &options.dir, "backing", VOLUME_BYTES)?;
    let device = rig::file(&reactor, &options.dir, "cache", log)?;
    let cache = reactor.block_on(async {
        rig::format(&device).await?;
        let runtime = Arc::new(reactor.handle().clone());
        anyhow::Ok(Cache::open(device, backing, runtime, Tunables::default()).await?)
    })?;
    let memory = serve(Memory::new(VOLUME_BYTES), &reactor)?;
    let cached = match serve(cache.clone(), &reactor) {
        Ok(cached) => cached,
        Err(error) => {
            memory.detach()?;
            return Err(error);
        }
    };
    let rows = rows(options, &memory, &cached, || Ok(reactor.block_on(cache.drain())?));
    let ended = [
        memory.detach().map_err(Into::into),
        cached.detach().map_err(Into::into),
        reactor.block_on(cache.close()).map_err(Into::into),
    ];
    let rows = rows?;
    ended.into_iter().collect::<Result<()>>()?;
    Ok(vec![Table {
        title: format!(
            "Loop device: cache and backing device are files with direct I/O in {}",
            options.dir.display()
        ),
        unit: "requests per second",
        baseline: "the same front end over plain memory",
        rows,
    }])
}

fn rows(
    options: &Options,
    memory: &LoopDevice,
    cached: &LoopDevice,
    drain: impl Fn() -> Result<()>,
) -> Result<Vec<Row>> {
    fio::fill(memory.path())?;
    fio::fill(cached.path())?;
    let mut rounds = LOADS.map(|load| (load, Vec::new()));
    for nth in 0..options.rounds {
        for (load, rounds) in &mut rounds {
            // What an earlier load has left must not be written back while this one runs.
            drain()?;
            let run = |served: &LoopDevice| fio::run(served.path(), *load, options.seconds);
            // Neither is always the first, in case that is of advantage.
            rounds.push(if nth % 2 == 0 {
                let baseline = run(memory)?;
                Round { baseline, cache: run(cached)? }
            } else {
                let cache = run(cached)?;
                Round { baseline: run(memory)?, cache }
            });
        }
    }
    Ok(rounds.into_iter().map(|(load, rounds)| Row::new(load.name, Goal::AtLeast(0.85), rounds)).collect())
}

fn serve(volume: impl Volume, reactor: &Reactor) -> Result<LoopDevice> {
    Ok(LoopDevice::attach(
        volume,
        reactor.handle(),
        "wb-bench",
        LoopOptions { sector_size: 512, read_only: false },
    )?)
}
