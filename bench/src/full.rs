//! Writes from an empty cache to a full one, over a much slower backing device. Virtual time shows
//! the policy alone, and not what else the machine does.

use crate::Options;
use crate::metered_device::MeteredDevice;
use crate::report::{Goal, Round, Row, Table};
use crate::setup;
use crate::virtual_time::VirtualTime;
use anyhow::{Context, Result};
use futures_util::future::try_join_all;
use libwb::cache::Cache;
use libwb::device::{Device, MemDevice};
use libwb::format::{BLOCK_BYTES, BlockNo, to_u64, to_usize};
use libwb::runtime::Runtime;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

const LOG_BYTES: u64 = 128 << 20;
const VOLUME_BYTES: u64 = 1 << 30;
const VOLUME_BLOCKS: u64 = VOLUME_BYTES / BLOCK_BYTES as u64;
/// What the backing device writes in a second, in bytes.
const RATE: f64 = 64.0 * 1024.0 * 1024.0;
const WRITERS: usize = 8;
/// How long a write takes that waits for nothing. A front end is about as fast.
const SERVICE: Duration = Duration::from_micros(20);
/// How long the full cache is watched.
const LENGTH: Duration = Duration::from_secs(30);
/// The log counts as full once less than one part in this many is free.
const FULL: u64 = 8;

/// How far the log has filled up.
const PHASES: [(&str, &str, &str); 4] = [
    ("first half, p50", "first half, p99", "first half, p99.9"),
    ("third quarter, p50", "third quarter, p99", "third quarter, p99.9"),
    ("up to seven eighths, p50", "up to seven eighths, p99", "up to seven eighths, p99.9"),
    ("full, p50", "full, p99", "full, p99.9"),
];

#[derive(Default)]
struct Seen {
    /// Microseconds, for each phase.
    phases: [RefCell<Vec<f64>>; 4],
    phase: Cell<usize>,
    full_since: Cell<Option<Duration>>,
    next: Cell<u64>,
}

/// Measures once: the result is the same each time.
pub(crate) fn measure(_options: &Options) -> Result<Vec<Table>> {
    let time = VirtualTime::default();
    let runtime: Arc<dyn Runtime> = Arc::new(time.clone());
    let cache: Device = Arc::new(MemDevice::new("cache", LOG_BYTES));
    let memory: Device = Arc::new(MemDevice::new("backing", VOLUME_BYTES));
    let backing: Device = Arc::new(MeteredDevice::throttled(memory, runtime.clone(), RATE));
    let seen = Seen::default();
    let run = async {
        let cache = setup::new_cache(cache, backing, runtime).await?;
        try_join_all((0..WRITERS).map(|_| writer(&cache, &seen, &time))).await?;
        let took = seen.full_since.get().map(|since| time.now() - since).unwrap_or_default();
        cache.close().await?;
        anyhow::Ok(took)
    };
    let took = time.block_on(run).context("a future waits for an event that never comes")??;
    Ok(tables(&seen, took))
}

async fn writer(cache: &Cache, seen: &Seen, time: &VirtualTime) -> Result<()> {
    let data = [0x5a; BLOCK_BYTES];
    while seen.full_since.get().is_none_or(|since| time.now() - since < LENGTH) {
        setup::check_signals()?;
        let nth = seen.next.get();
        seen.next.set(nth + 1);
        if seen.full_since.get().is_none() {
            note_phase(cache, seen, time);
        }
        // Scattered, and no block twice before all were written: the factor is odd.
        let block = BlockNo(nth.wrapping_mul(0x9e37_79b9) % VOLUME_BLOCKS);
        let before = time.now();
        cache.write(block.sector(), &data).await?;
        time.sleep(SERVICE).await;
        let micros = (time.now() - before).as_secs_f64() * 1e6;
        seen.phases[seen.phase.get()].borrow_mut().push(micros);
    }
    Ok(())
}

fn note_phase(cache: &Cache, seen: &Seen, time: &VirtualTime) {
    let status = cache.status();
    let free = |part| status.free_segments * part >= status.segments;
    let phase = [2, 4, FULL].into_iter().position(free).unwrap_or(3);
    seen.phase.set(phase.max(seen.phase.get()));
    if phase == 3 {
        seen.full_since.set(Some(time.now()));
    }
}

#[allow(clippy::cast_precision_loss)] // figures
fn tables(seen: &Seen, took: Duration) -> Vec<Table> {
    let phases = seen.phases.each_ref().map(sorted);
    let written = (phases[3].len() * BLOCK_BYTES) as f64 / took.as_secs_f64();
    let title = |what| {
        format!(
            "Full cache over a backing device of 64 MiB/s, 4 KiB random writes, 8 at a time: \
             {what}"
        )
    };
    let throughput =
        Round { baseline: RATE / f64::from(1 << 20), cache: written / f64::from(1 << 20) };
    let rows = phases.iter().zip(PHASES).flat_map(|(figures, (p50, p99, p999))| {
        let goal = if p50.starts_with("full") { Goal::AtMost(10.0) } else { Goal::None };
        let row = |name, goal, per_mille| {
            let (baseline, cache) = (percentile(figures, 500), percentile(figures, per_mille));
            Row::new(name, goal, vec![Round { baseline, cache }])
        };
        [row(p50, Goal::None, 500), row(p99, Goal::None, 990), row(p999, goal, 999)]
    });
    vec![
        Table {
            title: title("throughput"),
            unit: "MiB per second",
            baseline: "the rate of the backing device",
            rows: vec![Row::new("full", Goal::AtLeast(0.95), vec![throughput])],
        },
        Table {
            title: title("latency while the log fills up"),
            unit: "microseconds; a write that waits for nothing takes 20",
            baseline: "the median of the same writes",
            rows: rows.collect(),
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
