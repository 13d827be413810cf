//! `wbctl replay`: write a log back offline.

use crate::create::open_pair;
use crate::{Pair, salvage};
use anyhow::Result;
use libwb::cache::{Cache, Tunables};
use libwb::cli::{self, Io, Output, Progress, count, human_size};
use libwb::device::Device;
use libwb::format::{BLOCK_BYTES, to_u64};
use libwb::log::salvage::{Plan, Summary};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pair: Pair,
    #[command(flatten)]
    salvage: salvage::Salvage,
    /// Say what would be written back, and change nothing
    #[arg(long, conflicts_with = "salvage")]
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
    let (cache, backing) = open_pair(&args.pair)?;
    let (cache, backing) = (io.serve(cache), io.serve(backing));
    let report = if args.dry_run {
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
    let open = async || {
        Cache::open_verified(cache.clone(), backing.clone(), io.runtime(), Tunables::default()).await
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

/// What a replay would do.
fn look(io: &Io, cache: &Device, backing: &Device, args: &Args) -> Result<Report> {
    let look = args.salvage.open(cache, backing, async || Cache::examine(cache, backing).await);
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
fn drain(io: &Io, cache: &Cache, dirty_blocks: u64) -> Result<(), libwb::cache::CacheError> {
    let mut progress = Progress::new("writing back", dirty_blocks, BLOCK_BYTES);
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
