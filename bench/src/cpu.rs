//! Processor time per write into the engine, with all of its background work, on devices in memory.

use crate::Options;
use crate::report::{Goal, Round, Row, Table};
use crate::setup::{self, SEGMENT};
use anyhow::Result;
use async_task::Runnable;
use fastrand::Rng;
use futures_lite::future::{poll_once, yield_now};
use futures_util::future::BoxFuture;
use libwb::device::{Device, MemDevice};
use libwb::format::{BLOCK_BYTES, BlockNo, to_u64};
use libwb::runtime::Runtime;
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::Future;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The size of the volume, and of the memory that writes come from: larger than the processor's
/// caches.
const VOLUME_BYTES: usize = 128 << 20;
/// Writes in a round for each second that a figure is to take.
const WRITES_PER_SECOND: u64 = 100_000;

/// The log's size for each write.
enum Log {
    /// Nothing is written back.
    Long,
    /// A few percent of the written data: write-back runs all the time.
    Short,
}

/// Measures both in turn, on this thread alone.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    let source: Vec<u8> = (0..=255).cycle().take(VOLUME_BYTES).collect();
    let writes = WRITES_PER_SECOND * u64::from(options.seconds);
    let mut long = Vec::new();
    let mut short = Vec::new();
    for _ in 0..options.rounds {
        long.push(round(&source, writes, Log::Long)?);
        short.push(round(&source, writes, Log::Short)?);
    }
    Ok(vec![Table {
        title: "Engine: everything on one thread; devices in memory, which is one more copy for \
                each write to them"
            .into(),
        unit: "ns of processor time per 4 KiB",
        baseline: "copying 4 KiB and its CRC-32C",
        rows: vec![
            Row::new("4 KiB random write", Goal::AtMost(4.0), long),
            Row::new("4 KiB random write, and write-back", Goal::None, short),
        ],
    }])
}

fn round(source: &[u8], writes: u64, log: Log) -> Result<Round> {
    setup::check_signals()?;
    let baseline = copy_and_checksum(source, writes);
    Ok(Round { baseline, cache: engine(source, writes, log)? })
}

fn random_block<'a>(random: &mut Rng, source: &'a [u8]) -> (BlockNo, &'a [u8]) {
    let (blocks, _) = source.as_chunks::<BLOCK_BYTES>();
    let block = random.u64(..to_u64(blocks.len()));
    (BlockNo(block), &blocks[libwb::format::to_usize(block)])
}

fn copy_and_checksum(source: &[u8], count: u64) -> f64 {
    let mut segments = vec![0xa5; 8 * SEGMENT];
    let mut random = Rng::with_seed(1);
    let (places, _) = segments.as_chunks_mut::<BLOCK_BYTES>();
    let started = processor_time();
    for nth in 0..libwb::format::to_usize(count) {
        let place = &mut places[nth % (8 * SEGMENT / BLOCK_BYTES)];
        place.copy_from_slice(random_block(&mut random, source).1);
        black_box(crc32c::crc32c(black_box(place)));
    }
    nanoseconds_each(started, count)
}

fn engine(source: &[u8], writes: u64, log: Log) -> Result<f64> {
    let bytes = libwb::format::to_usize(writes) * BLOCK_BYTES;
    let log = match log {
        Log::Long => bytes * 2 + bytes / 4,
        Log::Short => 32 << 20,
    };
    // Not zeros, so that all memory is resident.
    let cache: Device = Arc::new(MemDevice::with_content("cache", vec![0xa5; log]));
    let backing: Device = Arc::new(MemDevice::with_content("backing", vec![0xa5; VOLUME_BYTES]));
    let here = Arc::new(ThisThread::new());
    let runtime = here.clone();
    here.block_on(async move {
        let cache = setup::new_cache(cache, backing, runtime).await?;
        let mut random = Rng::with_seed(1);
        let started = processor_time();
        for _ in 0..writes {
            let (block, data) = random_block(&mut random, source);
            cache.write(block.sector(), data).await?;
            yield_now().await;
        }
        cache.flush().await?;
        let figure = nanoseconds_each(started, writes);
        cache.close().await?;
        Ok(figure)
    })
}

fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

#[allow(clippy::cast_precision_loss)] // a figure
fn nanoseconds_each(started: Duration, count: u64) -> f64 {
    processor_time().saturating_sub(started).as_secs_f64() * 1e9 / count as f64
}

/// Runs all tasks on the thread that waits for one of them. Sleeps never end, since nothing here is
/// idle.
struct ThisThread {
    tasks: Arc<Mutex<VecDeque<Runnable>>>,
    started: Instant,
}

impl ThisThread {
    fn new() -> ThisThread {
        ThisThread { tasks: Arc::default(), started: Instant::now() }
    }

    /// Polls a future until it ends, and runs ready tasks in between. A task is either ready or
    /// waits for another task, so there is no need to sleep.
    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        futures_lite::future::block_on(async {
            loop {
                if let Some(output) = poll_once(future.as_mut()).await {
                    return output;
                }
                while let Some(task) = { self.tasks.lock().pop_front() } {
                    task.run();
                }
            }
        })
    }
}

impl Runtime for ThisThread {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let tasks = self.tasks.clone();
        let (runnable, task) =
            async_task::spawn(task, move |runnable| tasks.lock().push_back(runnable));
        task.detach();
        runnable.schedule();
    }

    fn sleep(&self, _duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn wall_clock(&self) -> Duration {
        self.now()
    }
}
