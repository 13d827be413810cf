//! `wbctl replay`: write a log back offline.

use crate::{Pair, salvage};
use anyhow::Result;
use libwb::cache::{Cache, CacheError, Purpose, Tunables};
use libwb::cli::{self, Io, Output, Progress, count, human_size};
use libwb::device::probe::{Access, open_pair};
use libwb::device::{Device, Overlay};
use libwb::format::{BLOCK_BYTES, SegmentId, to_u64};
use libwb::log::salvage::{Plan, Summary};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How often the progress bar moves.
const PROGRESS: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pair: Pair,
    #[command(flatten)]
    salvage: salvage::Salvage,
    /// Say what would be written back, and change nothing
    #[arg(long, conflicts_with = "salvage")]
    dry_run: bool,
    /// Stop at an earlier point of the log: write back what it held when this segment was the newest
    ///
    /// The cache device is not changed: it stays dirty, and still holds the log to its end. So this can be repeated,
    /// also with another segment that is not earlier, and a replay without it leads to the newest state. wbdump segments
    /// lists the segments. What was written back to the backing device before, or discarded there, is not undone.
    #[arg(long, value_name = "ID", conflicts_with = "salvage")]
    until: Option<u64>,
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
    /// What was given up of a corrupt log; null where nothing had to be.
    salvage: Option<Summary>,
    #[serde(skip)]
    salvage_in_words: Vec<String>,
}

pub(crate) fn replay(args: &Args, out: &mut Output) -> Result<()> {
    let Pair { cache, backing } = &args.pair;
    let again = format!("wbctl replay --cache {} --backing {}", cache.display(), backing.display());
    cli::on_interrupt("wbctl", move || {
        format!(
            "interrupted; what was written back stays so, all else is still in the cache. Go on with: {again}"
        )
    })?;
    let io = Io::start()?;
    let for_cache = if args.until.is_some() { Access::Read } else { Access::Write };
    let (cache, backing) = open_pair(&args.pair.cache, &args.pair.backing, [for_cache, Access::Write])?;
    let (cache, backing) = (io.serve(cache), io.serve(backing));
    let report = if let Some(until) = args.until {
        write_back_until(&io, cache, backing, args, SegmentId(until))?
    } else if args.dry_run {
        look(&io, &cache, &backing, args)?
    } else {
        write_back(&io, cache, backing, args)?
    };
    if args.json {
        out.json(&report)?;
        return Ok(());
    }
    for line in &report.salvage_in_words {
        writeln!(out, "{line}")?;
    }
    if report.dirty_blocks == 0 {
        match args.until {
            Some(id) => writeln!(out, "nothing to write back up to segment {id}")?,
            None => writeln!(out, "nothing to write back: the cache is clean")?,
        }
        return Ok(());
    }
    let what = format!(
        "{} ({}) from {}",
        count(report.dirty_blocks, "dirty block"),
        human_size(report.dirty_blocks * to_u64(BLOCK_BYTES)),
        count(report.segments, "segment"),
    );
    match (args.dry_run, args.until) {
        (true, _) => writeln!(out, "would write back {what}")?,
        (false, Some(id)) => writeln!(
            out,
            "wrote back {what}: the log up to segment {id}; the cache is as it was, with the log to its end"
        )?,
        (false, None) => writeln!(out, "wrote back {what}; the cache is clean")?,
    }
    Ok(())
}

fn write_back(io: &Io, cache: Device, backing: Device, args: &Args) -> Result<Report> {
    let open = async || {
        let (cache, backing) = (cache.clone(), backing.clone());
        Cache::open_for(cache, backing, io.runtime(), Tunables::default(), Purpose::replay()).await
    };
    let (cache, salvaged) = io.block_on(args.salvage.open(&cache, &backing, open))?;
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
        written_back_bytes: cache.status().statistics.counters.written_back_bytes,
        segments: before.dirty_segments,
        recovery_point: before.newest.0,
        salvage: salvaged.as_ref().map(Plan::summary),
        salvage_in_words: salvaged.as_ref().map(salvage::outcome).unwrap_or_default(),
    })
}

/// Writes back the log as it was when a segment was the newest.
fn write_back_until(
    io: &Io,
    cache: Device,
    backing: Device,
    args: &Args,
    until: SegmentId,
) -> Result<Report> {
    // Of a dry run, what recovery puts right is not to reach the device either.
    let backing = if args.dry_run { Arc::new(Overlay::over(backing)) } else { backing };
    let purpose = Purpose::replay_until(until);
    let opening = Cache::open_for(cache, backing, io.runtime(), Tunables::default(), purpose);
    let cache = io.block_on(opening)?;
    let before = cache.status();
    if !args.dry_run {
        // It is not closed: there is nothing to hand over of a log that is left as it is.
        drain(io, &cache, before.dirty_blocks)?;
    }
    Ok(Report {
        cache: args.pair.cache.clone(),
        backing: args.pair.backing.clone(),
        dry_run: args.dry_run,
        dirty_blocks: before.dirty_blocks,
        written_back_bytes: cache.status().statistics.counters.written_back_bytes,
        segments: before.dirty_segments,
        recovery_point: until.0,
        salvage: None,
        salvage_in_words: Vec::new(),
    })
}

/// What a replay would do.
fn look(io: &Io, cache: &Device, backing: &Device, args: &Args) -> Result<Report> {
    let look = args.salvage.open(cache, backing, async || Cache::examine(cache, backing, None).await);
    let ((recovery, live), _) = io.block_on(look)?;
    Ok(Report {
        cache: args.pair.cache.clone(),
        backing: args.pair.backing.clone(),
        dry_run: true,
        dirty_blocks: live.dirty_blocks,
        written_back_bytes: 0,
        segments: recovery.live_count(),
        recovery_point: recovery.point.0,
        salvage: None,
        salvage_in_words: Vec::new(),
    })
}

/// Drains, and shows progress on a terminal.
fn drain(io: &Io, cache: &Cache, dirty_blocks: u64) -> Result<(), CacheError> {
    let mut progress = Progress::new("writing back", dirty_blocks, BLOCK_BYTES);
    let draining = cache.clone();
    let drained = io.runtime().run_watched(async move { draining.drain().await }, PROGRESS, || {
        progress.set(dirty_blocks.saturating_sub(cache.status().blocks_to_write_back));
    });
    drained.unwrap_or(Err(CacheError::Closed))
}
