//! A loop device over a cache, against the same front end without a cache. Both stand on memory, or
//! both on files.

use crate::fio::{self, Workload};
use crate::report::{Goal, Round, Row, Table};
use crate::uncached::{DeviceVolume, MemoryVolume};
use crate::{Options, setup};
use anyhow::Result;
use libwb::device::probe::Traits;
use libwb::device::{Device, MemDevice};
use libwb::format::to_usize;
use libwb::reactor::Reactor;
use libwb::serve::loopdev::{LoopDevice, Reserved};
use libwb::serve::{self, Volume};
use std::sync::Arc;

/// The size of the volume. All of it fits the cache, so that reads are hits.
const VOLUME_BYTES: u64 = 512 << 20;
/// More bytes than a cache takes in a second.
const BYTES_PER_SECOND: u64 = 600 << 20;

const WORKLOADS: [Workload; 4] = [
    Workload { name: "4 KiB random write, 32 in flight", pattern: "randwrite", depth: 32 },
    Workload { name: "4 KiB random write, 1 in flight", pattern: "randwrite", depth: 1 },
    Workload { name: "4 KiB random read, 32 in flight", pattern: "randread", depth: 32 },
    Workload { name: "4 KiB random read, 1 in flight", pattern: "randread", depth: 1 },
];

/// Measures both pairs.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    setup::lock_memory();
    Ok(vec![in_memory(options)?, on_files(options)?])
}

/// Write-back begins when half of the log is dirty, and must be idle during measurements.
fn log_bytes(options: &Options) -> u64 {
    2 * (VOLUME_BYTES + BYTES_PER_SECOND * u64::from(options.seconds + 1))
}

fn in_memory(options: &Options) -> Result<Table> {
    let reactor = Reactor::start()?;
    // Not zeros, for which the kernel allocates memory only on the first write.
    let memory = |name, bytes| -> Device {
        Arc::new(MemDevice::with_content(name, vec![0xa5; to_usize(bytes)]))
    };
    let (device, backing) = (memory("cache", log_bytes(options)), memory("backing", VOLUME_BYTES));
    Ok(Table {
        title: "Loop device: cache and backing device are in memory".into(),
        unit: "requests per second",
        baseline: "the same front end over plain memory",
        rows: compare(options, &reactor, MemoryVolume::new(VOLUME_BYTES), device, backing)?,
    })
}

fn on_files(options: &Options) -> Result<Table> {
    let reactor = Reactor::start()?;
    let file = |name, bytes| setup::file(&reactor, &options.dir, name, bytes);
    let (device, backing) = (file("cache", log_bytes(options))?, file("backing", VOLUME_BYTES)?);
    let plain = DeviceVolume(file("plain", VOLUME_BYTES)?);
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
    baseline: impl Volume,
    device: Device,
    backing: Device,
) -> Result<Vec<Row>> {
    let runtime = Arc::new(reactor.handle().clone());
    let cache = reactor.block_on(setup::new_cache(device, backing, runtime))?;
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
    let mut rounds = WORKLOADS.map(|load| (load, Vec::new()));
    for nth in 0..options.rounds {
        for (load, rounds) in &mut rounds {
            // The dirty data of an earlier load must not be written back while this one runs.
            drain()?;
            let run = |served: &LoopDevice| fio::run(served.path(), *load, options.seconds);
            // Each side goes first in turn, in case that is an advantage.
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

fn serve(volume: impl Volume, reactor: &Reactor) -> Result<LoopDevice> {
    let reserved = Reserved::take()?;
    Ok(LoopDevice::attach(
        volume,
        reactor.handle(),
        "wb-bench",
        serve::Options { sector_size: 512, read_only: false, backing: Traits::default() },
        reserved,
        |why: &str| eprintln!("wb-bench: a loop device gets no more requests: {why}"),
    )?)
}
