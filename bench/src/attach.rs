//! Attaches crashed caches. One of 64 GiB that is full of dirty blocks: what that reads, how long
//! it takes, and what stays in memory. And large ones with little that is dirty: how long it takes.

use crate::full_log::{self, Data, VOLUME_BLOCKS};
use crate::metered_device::MeteredDevice;
use crate::model_disk::ModelDisk;
use crate::report::{Goal, Round, Row, Table};
use crate::{Options, setup};
use anyhow::{Context, Result};
use libwb::cache::{Cache, OpenOptions, Tunables};
use libwb::device::Device;
use libwb::format::{BLOCK_BYTES, to_u64};
use libwb::reactor::Reactor;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

const CACHE_BYTES: u64 = 64 << 30;
/// How many seconds attaching may take.
const SECONDS: f64 = 3.0;
/// The same with one segment in a hundred dirty: the name, the size, and how many seconds.
const MOSTLY_CLEAN: [(&str, u64, f64); 2] = [("64 GiB", 64 << 30, 0.3), ("1 TiB", 1 << 40, 2.0)];
/// What the kernel module needs for a cached block, approximately.
const MODULE_BYTES: f64 = 48.0;
const MOST_BYTES: f64 = 16.0;

struct Attached {
    read: f64,
    seconds: f64,
    bytes_per_block: f64,
}

/// What is read, and the time.
pub(crate) fn recovery(options: &Options) -> Result<Vec<Table>> {
    let Attached { read, seconds, .. } = attach(options)?;
    let mostly_clean: Vec<(&str, MostlyClean)> = MOSTLY_CLEAN
        .into_iter()
        .map(|(name, bytes, most)| Ok((name, mostly_clean(options, bytes, most)?)))
        .collect::<Result<_>>()?;
    let rows = |goal: Goal, baseline: fn(&MostlyClean) -> f64| {
        let rounds = |it: &MostlyClean| {
            let round = |&cache| Round { baseline: baseline(it), cache };
            it.tails.iter().map(round).collect()
        };
        mostly_clean.iter().map(|(name, it)| Row::new(name, goal, rounds(it))).collect()
    };
    let crashed =
        |what| format!("Recovery of a cache after a crash, one segment in a hundred dirty, {what}");
    let title =
        |what| format!("Recovery of a full cache of 64 GiB after a crash, {what}; a sparse file");
    Ok(vec![
        Table {
            title: title("what is read"),
            unit: "MiB",
            baseline: "reading the device whole",
            rows: vec![Row::new(
                "read",
                Goal::AtMost(0.011),
                vec![Round { baseline: mib(CACHE_BYTES), cache: read }],
            )],
        },
        Table {
            title: title("how long it takes"),
            unit: "seconds",
            baseline: "what it may take",
            rows: vec![Row::new(
                "attach",
                Goal::AtMost(1.0),
                vec![Round { baseline: SECONDS, cache: seconds }],
            )],
        },
        Table {
            title: crashed("how long it takes; sparse files"),
            unit: "seconds",
            baseline: "what it may take",
            rows: rows(Goal::AtMost(1.0), |it| it.most),
        },
        Table {
            title: crashed("beside reading all headers"),
            unit: "seconds",
            baseline: "reading all headers",
            rows: rows(Goal::None, |it| it.all),
        },
    ])
}

/// What stays in memory.
pub(crate) fn memory(options: &Options) -> Result<Vec<Table>> {
    let cache = attach(options)?.bytes_per_block;
    let round = Round { baseline: MODULE_BYTES, cache };
    let goal = Goal::AtMost(MOST_BYTES / MODULE_BYTES);
    Ok(vec![Table {
        title: "Memory of a cache of 64 GiB, full, everything included".into(),
        unit: "resident bytes per cached block of 4 KiB",
        baseline: "the kernel module, about",
        rows: vec![Row::new("index", goal, vec![round])],
    }])
}

fn attach(options: &Options) -> Result<Attached> {
    setup::check_signals()?;
    let reactor = Reactor::start()?;
    let device = setup::sparse_file(&reactor, &options.dir, "cache", CACHE_BYTES)?;
    // Nothing is read from it or written back to it.
    let runtime = Arc::new(reactor.handle().clone());
    let backing: Device =
        Arc::new(ModelDisk::new(runtime.clone(), VOLUME_BLOCKS * to_u64(BLOCK_BYTES)));
    // Nothing is written back.
    let tunables = Tunables { writeback_threshold: 0, ..Tunables::default() };
    reactor.block_on(async {
        setup::format(&device).await?;
        full_log::fill(&device, &setup::extension(&device), Data::Holes).await?;
        let metered = Arc::new(MeteredDevice::new(device));
        let before = resident_bytes()?;
        let started = Instant::now();
        let cache =
            Cache::open(metered.clone(), backing, runtime, OpenOptions::serve().tunables(tunables))
                .await?;
        let seconds = started.elapsed().as_secs_f64();
        cache.pause();
        let read = mib(metered.read_bytes());
        let blocks = cache.status().used_blocks;
        let bytes_per_block = per(resident_bytes()?.saturating_sub(before), blocks);
        Ok(Attached { read, seconds, bytes_per_block })
    })
}

/// How many seconds it takes to attach a cache with little that is dirty.
struct MostlyClean {
    /// At most.
    most: f64,
    /// Reading the tail of the log, in each round.
    tails: Vec<f64>,
    /// Reading all headers.
    all: f64,
}

fn mostly_clean(options: &Options, bytes: u64, most: f64) -> Result<MostlyClean> {
    let path = {
        let reactor = Reactor::start()?;
        let (path, device) = setup::named_sparse_file(&reactor, &options.dir, "cache", bytes)?;
        reactor.block_on(full_log::make_mostly_clean(&device, &setup::extension(&device)))?;
        path
    };
    let serve = OpenOptions::serve();
    // Not measured: the first attach uses memory that the machine has not used before.
    attach_seconds(&path, serve.clone())?;
    let tails: Result<Vec<f64>> =
        (0..options.rounds).map(|_| attach_seconds(&path, serve.clone())).collect();
    let all = attach_seconds(&path, serve.reading_all_headers())?;
    Ok(MostlyClean { most, tails: tails?, all })
}

/// How long it takes to open a cache as a process that was just started does. It is killed
/// afterwards: what it does once the cache is open is not to come into the next measurement.
fn attach_seconds(path: &Path, options: OpenOptions) -> Result<f64> {
    setup::check_signals()?;
    let reactor = Reactor::start()?;
    let device = setup::opened(&reactor, path)?;
    let runtime = Arc::new(reactor.handle().clone());
    let backing: Device =
        Arc::new(ModelDisk::new(runtime.clone(), VOLUME_BLOCKS * to_u64(BLOCK_BYTES)));
    // Nothing is written back.
    let tunables = Tunables { writeback_threshold: 0, ..Tunables::default() };
    reactor.block_on(async {
        let started = Instant::now();
        let _cache = Cache::open(device, backing, runtime, options.tunables(tunables)).await?;
        Ok(started.elapsed().as_secs_f64())
    })
}

fn resident_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib =
        line.and_then(|line| line.trim().strip_suffix(" kB")).context("/proc has no RssAnon")?;
    Ok(kib.trim().parse::<u64>()? * 1024)
}

#[allow(clippy::cast_precision_loss)] // a figure
fn per(bytes: u64, count: u64) -> f64 {
    bytes as f64 / count as f64
}

fn mib(bytes: u64) -> f64 {
    per(bytes, 1 << 20)
}
