//! Writes from an empty cache to a full one, over a backing device that is much slower.

use crate::Options;
use crate::report::{Goal, Round, Row, Table};
use crate::rig;
use crate::watched::Watched;
use anyhow::Result;
use futures_util::future::try_join_all;
use libwb::cache::{Cache, Tunables};
use libwb::device::{Device, MemDevice};
use libwb::format::{BLOCK_BYTES, BlockNo, to_u64, to_usize};
use libwb::reactor::Reactor;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LOG_BYTES: u64 = 128 << 20;
const VOLUME_BYTES: u64 = 1 << 30;
const VOLUME_BLOCKS: u64 = VOLUME_BYTES / BLOCK_BYTES as u64;
/// What the backing device writes in a second.
const RATE: f64 = 64.0 * 1024.0 * 1024.0;
const WRITERS: usize = 8;
/// The log counts as full from the moment when less than this part of it is free: one in so many.
const FULL: u64 = 8;

#[derive(Default)]
struct Seen {
    /// Microseconds, from the empty cache on, and since it was full.
    all: RefCell<Vec<f64>>,
    full: RefCell<Vec<f64>>,
    full_since: Cell<Option<Instant>>,
    next: Cell<u64>,
}

/// Measures once; the time for a figure is that on the full cache.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    let reactor = Reactor::start()?;
    let runtime = Arc::new(reactor.handle().clone());
    let cache: Device = Arc::new(MemDevice::new("cache", LOG_BYTES));
    let memory: Device = Arc::new(MemDevice::new("backing", VOLUME_BYTES));
    let backing: Device = Arc::new(Watched::throttled(memory, runtime.clone(), RATE));
    let length = Duration::from_secs(u64::from(options.seconds) * 3);
    let seen = Seen::default();
    let took = reactor.block_on(async {
        rig::format(&cache).await?;
        let cache = Cache::open(cache, backing, runtime, Tunables::default()).await?;
        try_join_all((0..WRITERS).map(|_| writer(&cache, &seen, length))).await?;
        let took = seen.full_since.get().map(|since| since.elapsed()).unwrap_or_default();
        cache.close().await?;
        anyhow::Ok(took)
    })?;
    Ok(tables(&seen, took))
}

async fn writer(cache: &Cache, seen: &Seen, length: Duration) -> Result<()> {
    let data = [0x5a; BLOCK_BYTES];
    while seen.full_since.get().is_none_or(|since| since.elapsed() < length) {
        rig::check_signals()?;
        let nth = seen.next.get();
        seen.next.set(nth + 1);
        if seen.full_since.get().is_none() && nth.is_multiple_of(64) {
            let status = cache.status();
            if status.free_segments * FULL < status.segments {
                seen.full_since.set(Some(Instant::now()));
            }
        }
        // Scattered, and none twice before all were written: the factor is odd.
        let block = BlockNo(nth.wrapping_mul(0x9e37_79b9) % VOLUME_BLOCKS);
        let before = Instant::now();
        cache.write(block.sector(), &data).await?;
        let micros = before.elapsed().as_secs_f64() * 1e6;
        seen.all.borrow_mut().push(micros);
        if seen.full_since.get().is_some() {
            seen.full.borrow_mut().push(micros);
        }
        futures_lite::future::yield_now().await;
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss)] // figures
fn tables(seen: &Seen, took: Duration) -> Vec<Table> {
    let written = (seen.full.borrow().len() * BLOCK_BYTES) as f64 / took.as_secs_f64();
    let (all, full) = (sorted(&seen.all), sorted(&seen.full));
    let row = |name, goal, figures: &[f64], per_mille| {
        Row::new(
            name,
            goal,
            vec![Round { baseline: percentile(figures, 500), cache: percentile(figures, per_mille) }],
        )
    };
    let title = |what| {
        format!("Full cache over a backing device of 64 MiB/s, 4 KiB random writes, 8 at a time: {what}")
    };
    let throughput = Round { baseline: RATE / f64::from(1 << 20), cache: written / f64::from(1 << 20) };
    vec![
        Table {
            title: title("throughput"),
            unit: "MiB per second",
            baseline: "the rate of the backing device",
            rows: vec![Row::new("full", Goal::AtLeast(0.95), vec![throughput])],
        },
        Table {
            title: title("latency"),
            unit: "microseconds",
            baseline: "the median of the same writes",
            rows: vec![
                row("full, p99", Goal::None, &full, 990),
                row("full, p99.9", Goal::AtMost(10.0), &full, 999),
                row("from empty to full, p99", Goal::None, &all, 990),
                row("from empty to full, p99.9", Goal::None, &all, 999),
            ],
        },
    ]
}

fn sorted(figures: &RefCell<Vec<f64>>) -> Vec<f64> {
    let mut figures = figures.borrow().clone();
    figures.sort_by(f64::total_cmp);
    figures
}

/// In thousandths.
fn percentile(sorted: &[f64], per_mille: u64) -> f64 {
    let nth = to_usize(to_u64(sorted.len()) * per_mille / 1000);
    sorted.get(nth).or(sorted.last()).copied().unwrap_or(f64::NAN)
}
