//! Random writes into the engine on a real file, against sequential writes of whole segments to the
//! same file.

use crate::Options;
use crate::report::{Goal, Round, Row, Table};
use crate::setup;
use anyhow::Result;
use fastrand::Rng;
use libwb::device::{Device, MemDevice};
use libwb::format::{BLOCK_BYTES, BlockNo, to_u64};
use libwb::reactor::Reactor;
use std::sync::Arc;
use std::time::Instant;

/// Bytes written on each side for each second of a measurement. The slower side takes longer.
const BYTES_PER_SECOND: u64 = 1 << 30;
/// The backing device gets no writes: the log is longer than all that is written.
const VOLUME_BYTES: u64 = 256 << 20;
/// How many writes between two checks for a signal.
const BURST: u64 = 4096;

/// Writes the same number of bytes to the file in both ways, in turn, and makes them durable each
/// time.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    setup::lock_memory();
    let reactor = Reactor::start()?;
    let bytes = BYTES_PER_SECOND * u64::from(options.seconds);
    // Write-back begins when half of the log is dirty.
    let device = setup::file(&reactor, &options.dir, "cache", bytes * 2 + bytes / 4)?;
    let rounds = (0..options.rounds)
        .map(|_| {
            let baseline = sequential(&reactor, &device, bytes)?;
            let cache = random(&reactor, &device, bytes)?;
            Ok(Round { baseline, cache })
        })
        .collect::<Result<_>>()?;
    Ok(vec![Table {
        title: format!(
            "Append: the cache device is a file with direct I/O in {}",
            options.dir.display()
        ),
        unit: "MB per second, with the final flush",
        baseline: "sequential writes of 512 KiB to that file, 8 in flight",
        rows: vec![Row::new("4 KiB random write", Goal::AtLeast(0.97), rounds)],
    }])
}

fn sequential(reactor: &Reactor, device: &Device, bytes: u64) -> Result<f64> {
    let started = Instant::now();
    reactor.block_on(setup::write_sequentially(device, bytes))?;
    setup::check_signals()?;
    Ok(setup::megabytes_per_second(bytes, started))
}

fn random(reactor: &Reactor, device: &Device, bytes: u64) -> Result<f64> {
    let backing = Arc::new(MemDevice::new("backing", VOLUME_BYTES));
    let runtime = Arc::new(reactor.handle().clone());
    reactor.block_on(async {
        let cache = setup::new_cache(device.clone(), backing, runtime).await?;
        let started = Instant::now();
        let mut random = Rng::with_seed(1);
        let block = [0x5a; BLOCK_BYTES];
        for nth in 0..bytes / to_u64(BLOCK_BYTES) {
            let to = BlockNo(random.u64(..VOLUME_BYTES / to_u64(BLOCK_BYTES)));
            cache.write(to.sector(), &block).await?;
            if nth % BURST == 0 {
                setup::check_signals()?;
            }
        }
        cache.flush().await?;
        let figure = setup::megabytes_per_second(bytes, started);
        cache.close().await?;
        Ok(figure)
    })
}
