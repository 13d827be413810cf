//! `wbctl replay`: write a log back offline.

use crate::Pair;
use crate::create::open_pair;
use anyhow::Result;
use libwb::cache::{Cache, Tunables};
use libwb::cli::{Io, Output, Progress, count, human_size};
use libwb::device::Device;
use libwb::format::{BLOCK_BYTES, to_u64};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pair: Pair,
    /// Say what would be written back, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    cache: PathBuf,
    backing: PathBuf,
    /// Whether the devices were left as they are.
    dry_run: bool,
    /// Blocks whose newest version was only in the cache.
    dirty_blocks: u64,
    /// Bytes written to the backing device.
    written_back_bytes: u64,
    /// Segments that were live.
    segments: u64,
    /// The last segment that was applied.
    recovery_point: u64,
}

pub(crate) fn replay(args: &Args, out: &mut Output) -> Result<()> {
    let io = Io::start()?;
    let (cache, backing) = open_pair(&args.pair)?;
    let (cache, backing) = (io.serve(cache), io.serve(backing));
    let report = if args.dry_run {
        look(&io, &cache, &backing, args)?
    } else {
        write_back(&io, cache, backing, args)?
    };
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    if report.dirty_blocks == 0 {
        writeln!(out, "nothing to write back: the cache is clean")?;
        return Ok(());
    }
    let what = format!(
        "{} ({}) from {}",
        count(report.dirty_blocks, "dirty block"),
        human_size(report.dirty_blocks * to_u64(BLOCK_BYTES)),
        count(report.segments, "segment"),
    );
    match args.dry_run {
        true => writeln!(out, "would write back {what}")?,
        false => writeln!(out, "wrote back {what}; the cache is clean")?,
    }
    Ok(())
}

fn write_back(io: &Io, cache: Device, backing: Device, args: &Args) -> Result<Report> {
    let cache = io.block_on(Cache::open(cache, backing, io.runtime(), Tunables::default()))?;
    let before = cache.status();
    let drained = drain(io, &cache, before.dirty_blocks);
    let closed = io.block_on(cache.close());
    drained?;
    closed?;
    Ok(Report {
        cache: args.pair.cache.clone(),
        backing: args.pair.backing.clone(),
        dry_run: false,
        dirty_blocks: before.dirty_blocks,
        written_back_bytes: cache.status().counters.written_back_bytes,
        segments: before.dirty_segments,
        recovery_point: before.newest.0,
    })
}

/// What a replay would do.
fn look(io: &Io, cache: &Device, backing: &Device, args: &Args) -> Result<Report> {
    let (recovery, live) = io.block_on(Cache::examine(cache, backing))?;
    Ok(Report {
        cache: args.pair.cache.clone(),
        backing: args.pair.backing.clone(),
        dry_run: true,
        dirty_blocks: live.dirty_blocks,
        written_back_bytes: 0,
        segments: recovery.live_count(),
        recovery_point: recovery.point.0,
    })
}

/// Drains, and shows progress on a terminal.
fn drain(io: &Io, cache: &Cache, dirty_blocks: u64) -> Result<(), libwb::cache::CacheError> {
    let mut progress = Progress::new("writing back", dirty_blocks);
    let (done, result) = std::sync::mpsc::channel();
    let drained = cache.clone();
    io.runtime().run_now(async move {
        let _ = done.send(drained.drain().await);
    });
    loop {
        match result.recv_timeout(Duration::from_millis(100)) {
            Ok(result) => return result,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                progress.set(dirty_blocks.saturating_sub(cache.status().dirty_blocks));
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                return Err(libwb::cache::CacheError::Closed);
            }
        }
    }
}
