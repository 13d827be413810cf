//! wbcheck on a full cache, against reading the same file.

use crate::full_log::{self, Data};
use crate::report::{Goal, Round, Row, Table};
use crate::{Options, setup};
use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use libwb::device::{Device, IoBuf};
use libwb::format::to_u64;
use libwb::reactor::Reactor;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;
use tempfile::TempPath;

const CACHE_BYTES: u64 = 8 << 30;
const READ_BYTES: usize = 1 << 20;

/// Measures both in turn.
pub(crate) fn measure(options: &Options) -> Result<Vec<Table>> {
    let path = full_cache(&options.dir)?;
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        setup::check_signals()?;
        let baseline = megabytes_per_second(|| read_whole(&path))?;
        rounds.push(Round { baseline, cache: megabytes_per_second(|| wbcheck(&path))? });
    }
    Ok(vec![Table {
        title: format!(
            "Check of a full cache of 8 GiB: a file with direct I/O in {}",
            options.dir.display()
        ),
        unit: "MB per second",
        baseline: "reading the file, 1 MiB at a time, 8 in flight",
        rows: vec![Row::new("wbcheck", Goal::AtLeast(0.9), rounds)],
    }])
}

// The reactor closes a file some time after its last use, and wbcheck needs exclusive access. So
// each use has its own reactor, which closes all files when it ends.

fn full_cache(dir: &Path) -> Result<TempPath> {
    let reactor = Reactor::start()?;
    let (path, device) = setup::named_file(&reactor, dir, "cache", CACHE_BYTES)?;
    reactor.block_on(async {
        setup::format(&device).await?;
        full_log::fill(&device, &setup::extension(&device), Data::Written).await
    })?;
    Ok(path)
}

fn read_whole(path: &Path) -> Result<()> {
    let reactor = Reactor::start()?;
    let device = setup::opened(&reactor, path)?;
    reactor.block_on(read(&device))
}

fn megabytes_per_second(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(setup::megabytes_per_second(CACHE_BYTES, started))
}

async fn read(device: &Device) -> Result<()> {
    let reads = (0..CACHE_BYTES / to_u64(READ_BYTES))
        .map(|nth| device.read(nth * to_u64(READ_BYTES), IoBuf::zeroed(READ_BYTES)));
    stream::iter(reads)
        .buffer_unordered(setup::SEGMENTS_IN_FLIGHT)
        .try_for_each(async |_| Ok(()))
        .await?;
    Ok(())
}

/// The program beside this one.
fn wbcheck(path: &Path) -> Result<()> {
    let program = std::env::current_exe()?.with_file_name("wbcheck");
    let mut command = Command::new(&program);
    command.arg("--quiet").arg(path).stdin(Stdio::null()).stdout(Stdio::null());
    let status = command
        .status()
        .with_context(|| format!("cannot run {}; build it first", program.display()))?;
    ensure!(status.success(), "wbcheck found fault with the cache");
    Ok(())
}
