//! A loop device over a cache, against the same front end without one: over plain memory where the
//! cache device is memory, and over a file where it is a file.

use crate::fio::{self, Load};
use crate::memory::{Memory, Plain};
use crate::report::{Goal, Round, Row, Table};
use crate::{Options, rig};
use anyhow::Result;
use libwb::cache::{Cache, Tunables};
use libwb::device::{Device, MemDevice};
use libwb::format::to_usize;
use libwb::reactor::Reactor;
use libwb::serve::ServedVolume;
use libwb::serve::loopdev::{LoopDevice, Options as LoopOptions, Reserved};
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

/// Measures both pairs.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    rig::lock_memory();
    Ok(vec![in_memory(options)?, on_files(options)?])
}

/// Write-back begins when half of the log is dirty; it is to be idle while a figure is taken.
fn log_bytes(options: &Options) -> u64 {
    2 * (VOLUME_BYTES + BYTES_PER_SECOND * u64::from(options.seconds + 1))
}

fn in_memory(options: &Options) -> Result<Table> {
    let reactor = Reactor::start()?;
    // Not zeros, which are given memory as late as they are written.
    let memory = |name, bytes| -> Device {
        Arc::new(MemDevice::with_content(name, vec![0xa5; to_usize(bytes)]))
    };
    let (device, backing) = (memory("cache", log_bytes(options)), memory("backing", VOLUME_BYTES));
    Ok(Table {
        title: "Loop device: cache and backing device are in memory".into(),
        unit: "requests per second",
        baseline: "the same front end over plain memory",
        rows: compare(options, &reactor, Memory::new(VOLUME_BYTES), device, backing)?,
    })
}

fn on_files(options: &Options) -> Result<Table> {
    let reactor = Reactor::start()?;
    let file = |name, bytes| rig::file(&reactor, &options.dir, name, bytes);
    let (device, backing) = (file("cache", log_bytes(options))?, file("backing", VOLUME_BYTES)?);
    let plain = Plain(file("plain", VOLUME_BYTES)?);
    Ok(Table {
        title: format!(
            "Loop device: cache and backing device are files with direct I/O in {}",
            options.dir.display()
        ),
        unit: "requests per second",
        baseline: "the same front end over such a file",
        rows: compare(options, &reactor, plain, device, backing)?,
    })
}

/// Serves both, and loads them in turn.
fn compare(
    options: &Options,
    reactor: &Reactor,
    baseline: impl ServedVolume,
    device: Device,
    backing: Device,
) -> Result<Vec<Row>> {
    let cache = reactor.block_on(async {
        rig::format(&device).await?;
        let runtime = Arc::new(reactor.handle().clone());
        anyhow::Ok(Cache::open(device, backing, runtime, Tunables::default()).await?)
    })?;
    let baseline = serve(baseline, reactor)?;
    let cached = match serve(cache.clone(), reactor) {
        Ok(cached) => cached,
        Err(error) => {
            baseline.detach()?;
            return Err(error);
        }
    };
    let rows = rows(options, &baseline, &cached, || Ok(reactor.block_on(cache.drain())?));
    let ended = [
        baseline.detach().map_err(Into::into),
        cached.detach().map_err(Into::into),
        reactor.block_on(cache.close()).map_err(Into::into),
    ];
    let rows = rows?;
    ended.into_iter().collect::<Result<()>>()?;
    Ok(rows)
}

fn rows(
    options: &Options,
    baseline: &LoopDevice,
    cached: &LoopDevice,
    drain: impl Fn() -> Result<()>,
) -> Result<Vec<Row>> {
    fio::fill(baseline.path())?;
    fio::fill(cached.path())?;
    let mut rounds = LOADS.map(|load| (load, Vec::new()));
    for nth in 0..options.rounds {
        for (load, rounds) in &mut rounds {
            // What an earlier load has left must not be written back while this one runs.
            drain()?;
            let run = |served: &LoopDevice| fio::run(served.path(), *load, options.seconds);
            // Neither is always the first, in case that is of advantage.
            rounds.push(if nth % 2 == 0 {
                let baseline = run(baseline)?;
                Round { baseline, cache: run(cached)? }
            } else {
                let cache = run(cached)?;
                Round { baseline: run(baseline)?, cache }
            });
        }
    }
    Ok(rounds
        .into_iter()
        .map(|(load, rounds)| Row::new(load.name, Goal::AtLeast(0.85), rounds))
        .collect())
}

fn serve(volume: impl ServedVolume, reactor: &Reactor) -> Result<LoopDevice> {
    let reserved = Reserved::take()?;
    Ok(LoopDevice::attach(
        volume,
        reactor.handle(),
        "wb-bench",
        LoopOptions { sector_size: 512, read_only: false },
        reserved,
        |_| Ok(()),
    )?)
}
