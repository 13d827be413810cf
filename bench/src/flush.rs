//! Small writes with a flush each: how long each takes, and what it costs the cache device.

use crate::Options;
use crate::metered_device::MeteredDevice;
use crate::report::{Goal, Round, Row, Table};
use crate::setup;
use anyhow::Result;
use fastrand::Rng;
use futures_util::future::try_join_all;
use libwb::cache::Status;
use libwb::device::{Device, IoBuf, MemDevice, SharedBuf};
use libwb::format::{BLOCK_BYTES, BlockNo, PLACES, SEGMENT_BYTES, to_u64};
use libwb::reactor::Reactor;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

const VOLUME_BYTES: u64 = 256 << 20;
const LOG_BYTES: u64 = 1 << 30;
/// What the module spends on a flush.
const SEGMENT_KIB: f64 = 512.0;
const MOST_KIB: f64 = 8.5;

/// The figures of the engine.
struct Cost {
    micros: f64,
    log_kib: f64,
    written_kib: f64,
}

/// Measures both sides in turn, with one request at a time and with sixteen.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    let reactor = Reactor::start()?;
    let device = match &options.cache {
        Some(path) => setup::opened(&reactor, path)?,
        None => setup::file(&reactor, &options.dir, "cache", LOG_BYTES)?,
    };
    let mut latency = Vec::new();
    let mut bytes = Vec::new();
    let rows = [
        (1, "write and flush, 1 at a time", "log used, 1 at a time", "bytes written, 1 at a time"),
        (
            16,
            "write and flush, 16 at a time",
            "log used, 16 at a time",
            "bytes written, 16 at a time",
        ),
    ];
    for (depth, name, log_name, bytes_name) in rows {
        let (mut times, mut log, mut written) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            setup::check_signals()?;
            let length = Duration::from_secs(options.seconds.into());
            let baseline = reactor.block_on(raw(&device, depth, length, false))?;
            let cost = reactor.block_on(engine(&reactor, &device, depth, length))?;
            times.push(Round { baseline, cache: cost.micros });
            log.push(Round { baseline: SEGMENT_KIB, cache: cost.log_kib });
            written.push(Round { baseline: SEGMENT_KIB, cache: cost.written_kib });
        }
        latency.push(Row::new(name, Goal::AtMost(1.3), times));
        bytes.push(Row::new(log_name, Goal::AtMost(MOST_KIB / SEGMENT_KIB), log));
        bytes.push(Row::new(bytes_name, Goal::AtMost(MOST_KIB / SEGMENT_KIB), written));
    }
    let title = |what| match &options.cache {
        Some(path) => format!("{what}: the cache device is {}", path.display()),
        None => {
            let dir = options.dir.display();
            format!("{what}: the cache device is a file with direct I/O in {dir}")
        }
    };
    Ok(vec![
        Table {
            title: title("Flush, latency of a random 4 KiB write and a flush"),
            unit: "microseconds, mean",
            baseline: "a write of 8 KiB and fdatasync on the same file, as many at a time",
            rows: latency,
        },
        Table {
            title: title("Flush, what it costs the cache device"),
            unit: "KiB per flush",
            baseline: "the kernel module, which spends a segment on each",
            rows: bytes,
        },
        Table {
            title: title("Durable writes, latency"),
            unit: "microseconds, mean",
            baseline: "a write and a flush of the device",
            rows: durable_writes(options, &reactor, &device)?,
        },
    ])
}

/// Compares durable writes with writes and flushes, of the device itself and below the engine. The
/// engine uses them only where the device prefers them.
fn durable_writes(options: &Options, reactor: &Reactor, device: &Device) -> Result<Vec<Row>> {
    // A layer has no durable writes.
    let plain: Device = Arc::new(MeteredDevice::new(device.clone()));
    let (mut itself, mut below) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        setup::check_signals()?;
        let length = Duration::from_secs(options.seconds.into());
        itself.push(Round {
            baseline: reactor.block_on(raw(device, 1, length, false))?,
            cache: reactor.block_on(raw(device, 1, length, true))?,
        });
        if device.prefers_durable_writes() {
            below.push(Round {
                baseline: reactor.block_on(engine(reactor, &plain, 1, length))?.micros,
                cache: reactor.block_on(engine(reactor, device, 1, length))?.micros,
            });
        }
    }
    let mut rows = vec![Row::new("8 KiB, the device itself", Goal::None, itself)];
    if !below.is_empty() {
        rows.push(Row::new("write and flush, the engine", Goal::AtMost(0.9), below));
    }
    Ok(rows)
}

/// Repeats an operation, several at a time. Returns the mean time in microseconds, and the number
/// of repetitions.
async fn repeat(
    depth: u64,
    length: Duration,
    once: impl AsyncFn(u64) -> Result<()>,
) -> Result<(f64, f64)> {
    let started = Instant::now();
    let total = Cell::new((Duration::ZERO, 0_u32));
    try_join_all((0..depth).map(async |_| {
        while started.elapsed() < length {
            let (time, count) = total.get();
            total.set((time, count + 1));
            let before = Instant::now();
            once(count.into()).await?;
            let (time, count) = total.get();
            total.set((time + before.elapsed(), count));
        }
        anyhow::Ok(())
    }))
    .await?;
    let (time, count) = total.get();
    Ok((time.as_secs_f64() * 1e6 / f64::from(count), f64::from(count)))
}

async fn raw(device: &Device, depth: u64, length: Duration, durably: bool) -> Result<f64> {
    const BYTES: u64 = 2 * BLOCK_BYTES as u64;
    let mut buf = IoBuf::zeroed(2 * BLOCK_BYTES);
    buf.fill(0x5a);
    let data = SharedBuf::from(buf);
    let places = device.size() / BYTES;
    let once = async |nth: u64| {
        let offset = nth % places * BYTES;
        if durably {
            return Ok(device.write_durably(offset, vec![data.clone()]).await?);
        }
        device.write(offset, data.clone()).await?;
        Ok(device.flush().await?)
    };
    Ok(repeat(depth, length, once).await?.0)
}

async fn engine(reactor: &Reactor, device: &Device, depth: u64, length: Duration) -> Result<Cost> {
    let backing = Arc::new(MemDevice::new("backing", VOLUME_BYTES));
    let runtime = Arc::new(reactor.handle().clone());
    let cache = setup::new_cache(device.clone(), backing, runtime).await?;
    let before = cache.status();
    let data = [0x5a; BLOCK_BYTES];
    let once = async |nth| {
        let block = Rng::with_seed(nth).u64(..VOLUME_BYTES / to_u64(BLOCK_BYTES));
        cache.write(BlockNo(block).sector(), &data).await?;
        Ok(cache.flush().await?)
    };
    let (micros, count) = repeat(depth, length, once).await?;
    let after = cache.status();
    cache.close().await?;
    Ok(Cost {
        micros,
        log_kib: (log_bytes(&after) - log_bytes(&before)) / 1024.0 / count,
        written_kib: (written_bytes(&after) - written_bytes(&before)) / 1024.0 / count,
    })
}

/// Bytes of the log used since its beginning: whole segments, and part of the current one.
#[allow(clippy::cast_precision_loss)] // a figure
fn log_bytes(status: &Status) -> f64 {
    let places = status.current.0 * u64::from(PLACES) + status.next_place % u64::from(PLACES);
    places as f64 * SEGMENT_BYTES as f64 / f64::from(PLACES)
}

#[allow(clippy::cast_precision_loss)] // a figure
fn written_bytes(status: &Status) -> f64 {
    status.statistics.counters.cache_write_bytes as f64
}
