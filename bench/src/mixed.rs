//! Small writes with a flush each, beside what keeps the devices busy: how long each takes.

use crate::Options;
use crate::report::{Goal, Round, Row, Table};
use crate::setup::{self, megabytes_per_second};
use anyhow::{Context, Result};
use fastrand::Rng;
use futures_channel::oneshot;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, FuturesUnordered};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use libwb::cache::Cache;
use libwb::device::{Device, IoBuf};
use libwb::format::{BLOCK_BYTES, BlockNo, to_u64, to_usize};
use libwb::reactor::Reactor;
use libwb::runtime::Runtime;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const LOG_BYTES: u64 = 1 << 30;
/// What the volume's first part holds in the log, dirty, its blocks in random order.
const HELD_BLOCKS: u64 = (512 << 20) / BLOCK_BYTES as u64;
/// Beyond that, the volume holds nothing; it is there to be discarded.
const VOLUME_BYTES: u64 = 64 << 30;
const READ_BYTES: usize = 1 << 20;
/// Writes that fill the log at a time.
const FILLERS: usize = 64;
/// How often `meanwhile` of the reactor is asked.
const WATCHED: Duration = Duration::from_millis(100);

/// What goes on beside the writes.
#[derive(Clone, Copy)]
enum Beside {
    Nothing,
    /// So many readers of 1 MiB, in scattered blocks, each one after the other.
    Readers(u64),
    /// Discards of all that the log does not hold, one after the other.
    Discard,
    /// A drain of all that the log holds.
    Drain,
}

const WORKLOADS: [(Beside, &str, &str, Goal); 5] = [
    (Beside::Readers(1), "beside 1 reader, p50", "beside 1 reader, p99", Goal::None),
    (Beside::Readers(8), "beside 8 readers, p50", "beside 8 readers, p99", Goal::AtMost(4.0)),
    (Beside::Readers(64), "beside 64 readers, p50", "beside 64 readers, p99", Goal::None),
    (Beside::Discard, "beside a discard, p50", "beside a discard, p99", Goal::None),
    (Beside::Drain, "beside a drain, p50", "beside a drain, p99", Goal::None),
];

/// The readers whose throughput is measured as well.
const READERS: Beside = Beside::Readers(8);

/// What one measurement found.
struct Found {
    /// Of the writes, in microseconds.
    p50: f64,
    p99: f64,
    /// MB that the readers got in a second.
    read: f64,
}

/// Measures alone and beside each workload in turn.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    let reactor = Reactor::start()?;
    let device = setup::file(&reactor, &options.dir, "cache", LOG_BYTES)?;
    let backing = setup::sparse_file(&reactor, &options.dir, "backing", VOLUME_BYTES)?;
    let mut read = Vec::new();
    let mut rounds: [(Vec<Round>, Vec<Round>); WORKLOADS.len()] = Default::default();
    for _ in 0..options.rounds {
        setup::check_signals()?;
        let cache = filled(&reactor, &device, &backing)?;
        let length = Duration::from_secs(options.seconds.into());
        let alone = watched(&reactor, &cache, Beside::Nothing, length, true)?;
        let baseline = watched(&reactor, &cache, READERS, length, false)?.read;
        let both = watched(&reactor, &cache, READERS, length, true)?;
        read.push(Round { baseline, cache: both.read });
        for ((beside, ..), (p50, p99)) in WORKLOADS.iter().zip(&mut rounds) {
            let found = watched(&reactor, &cache, *beside, length, true)?;
            p50.push(Round { baseline: alone.p50, cache: found.p50 });
            p99.push(Round { baseline: alone.p99, cache: found.p99 });
        }
        reactor.block_on(cache.close())?;
    }
    let rows = WORKLOADS.iter().zip(rounds).flat_map(|((_, p50, p99, goal), rounds)| {
        [Row::new(p50, *goal, rounds.0), Row::new(p99, Goal::None, rounds.1)]
    });
    let title = |what| {
        format!("{what}: both devices are files with direct I/O in {}", options.dir.display())
    };
    Ok(vec![
        Table {
            title: title("A random 4 KiB write and a flush, beside other work"),
            unit: "microseconds",
            baseline: "the same percentile of the same writes alone",
            rows: rows.collect(),
        },
        Table {
            title: title("Reads of 1 MiB in scattered blocks, beside such writes"),
            unit: "MB per second",
            baseline: "the same reads alone",
            rows: vec![Row::new("8 readers", Goal::None, read)],
        },
    ])
}

/// A new cache whose log holds blocks that are neighbours on the volume and lie scattered on the
/// cache device. Nothing is written back unless it is drained.
fn filled(reactor: &Reactor, device: &Device, backing: &Device) -> Result<Cache> {
    let runtime = Arc::new(reactor.handle().clone());
    reactor.block_on(async {
        let cache = setup::new_cache(device.clone(), backing.clone(), runtime).await?;
        cache.pause();
        let mut blocks: Vec<u64> = (0..HELD_BLOCKS).collect();
        Rng::with_seed(1).shuffle(&mut blocks);
        let data = [0x5a; BLOCK_BYTES];
        let writes = blocks.into_iter().map(|nth| cache.write(BlockNo(nth).sector(), &data));
        stream::iter(writes).buffer_unordered(FILLERS).try_for_each(async |()| Ok(())).await?;
        cache.flush().await?;
        Ok(cache)
    })
}

/// Measures on the reactor's thread, where requests of a volume go on once they must wait. `writes`
/// says whether there are any.
fn watched(
    reactor: &Reactor,
    cache: &Cache,
    beside: Beside,
    length: Duration,
    writes: bool,
) -> Result<Found> {
    let (cache, handle) = (cache.clone(), reactor.handle().clone());
    let work = async move {
        let (shared, ended) = (Arc::<Shared>::default(), FuturesUnordered::new());
        for other in others(&cache, beside, &shared) {
            let (done, end) = oneshot::channel();
            handle.spawn(Box::pin(async move { drop(done.send(other.await)) }));
            ended.push(end);
        }
        let started = Instant::now();
        let micros = match writes {
            true => write(&cache, length, &shared.over).await,
            false => {
                handle.sleep(length).await;
                Ok(Vec::new())
            }
        };
        let read = megabytes_per_second(shared.read.load(Ordering::Relaxed), started);
        shared.over.store(true, Ordering::Relaxed);
        ended.map(|end| end?).try_for_each(async |()| Ok(())).await?;
        let mut micros = micros?;
        micros.sort_by(f64::total_cmp);
        Ok(Found { p50: percentile(&micros, 50), p99: percentile(&micros, 99), read })
    };
    let work = reactor.handle().run_watched(work, WATCHED, || setup::check_signals().is_ok());
    work.context("interrupted")?
}

/// Writes and flushes one by one, until the time or the other work is over. Returns how long each
/// took.
async fn write(cache: &Cache, length: Duration, over: &AtomicBool) -> Result<Vec<f64>> {
    let (started, mut rng, mut micros) = (Instant::now(), Rng::with_seed(2), Vec::new());
    let data = [0xa5; BLOCK_BYTES];
    while started.elapsed() < length && !over.load(Ordering::Relaxed) {
        let block = BlockNo(rng.u64(..HELD_BLOCKS));
        let before = Instant::now();
        cache.write(block.sector(), &data).await?;
        cache.flush().await?;
        micros.push(before.elapsed().as_secs_f64() * 1e6);
    }
    Ok(micros)
}

/// What the writes share with the other work.
#[derive(Default)]
struct Shared {
    over: AtomicBool,
    /// Bytes.
    read: AtomicU64,
}

/// The other work, each part of it to be a task: it goes on until all is over.
fn others(
    cache: &Cache,
    beside: Beside,
    shared: &Arc<Shared>,
) -> Vec<BoxFuture<'static, Result<()>>> {
    let task = |nth| (cache.clone(), shared.clone(), Rng::with_seed(nth));
    match beside {
        Beside::Nothing => Vec::new(),
        Beside::Readers(count) => (0..count).map(|nth| read(task(nth)).boxed()).collect(),
        Beside::Discard => vec![discard(task(0)).boxed()],
        Beside::Drain => vec![drain(task(0)).boxed()],
    }
}

type Task = (Cache, Arc<Shared>, Rng);

async fn read((cache, shared, mut rng): Task) -> Result<()> {
    let places = HELD_BLOCKS * to_u64(BLOCK_BYTES) / to_u64(READ_BYTES);
    while !shared.over.load(Ordering::Relaxed) {
        let first = BlockNo(rng.u64(..places) * to_u64(READ_BYTES / BLOCK_BYTES));
        cache.read(first.sector(), IoBuf::zeroed(READ_BYTES)).await?;
        shared.read.fetch_add(to_u64(READ_BYTES), Ordering::Relaxed);
    }
    Ok(())
}

async fn discard((cache, shared, _): Task) -> Result<()> {
    let first = BlockNo(HELD_BLOCKS);
    while !shared.over.load(Ordering::Relaxed) {
        cache.discard(first.sector(), VOLUME_BYTES - first.bytes()).await?;
    }
    Ok(())
}

async fn drain((cache, shared, _): Task) -> Result<()> {
    cache.drain().await?;
    shared.over.store(true, Ordering::Relaxed);
    Ok(())
}

fn percentile(sorted: &[f64], percent: u64) -> f64 {
    let nth = to_usize(to_u64(sorted.len()) * percent / 100);
    sorted.get(nth).or(sorted.last()).copied().unwrap_or(f64::NAN)
}
