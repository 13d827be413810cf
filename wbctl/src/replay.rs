//! `wbctl replay`: writes a log back offline.

use crate::notes::{self, About};
use crate::older::Past;
use crate::pair::{Pair, absolute, absolute_place};
use crate::{rival, salvage};
use anyhow::{Result, bail};
use libwb::cache::{Cache, CacheError, OpenOptions};
use libwb::cli::{self, Backing, Io, Output, Progress, SalvageOption, count, human_size};
use libwb::device::probe::Access;
use libwb::device::{Device, Overlay, Place};
use libwb::format::{BLOCK_BYTES, SegmentId, to_u64};
use libwb::log::reach::Reach;
use libwb::log::salvage::{Plan, Summary};
use libwb::log::{LogError, LogErrorKind};
use serde::Serialize;
use std::io::{self, Write};
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
    salvage: SalvageOption,
    /// Show what would be written back, and change nothing
    #[arg(long, conflicts_with = "salvage")]
    dry_run: bool,
    /// Stop at an earlier point of the log: write back what the log held when this segment was the
    /// newest
    ///
    /// The cache device does not change: it stays dirty, and still holds the whole log. So you can
    /// repeat this, also with a later segment. A replay without --until leads to the newest state.
    /// `wbdump segments` lists the segments.
    ///
    /// A replay does not undo earlier write-back or discards on the backing device. If those come
    /// after this segment, it is refused.
    #[arg(long, value_name = "ID", conflicts_with = "salvage")]
    until: Option<u64>,
    /// Use a cache that is older than when wb last saw it: an earlier copy, or a device that went
    /// back in time. With --until, also write over later data
    ///
    /// The data of such a cache may be older than that of the backing device. With --until, an
    /// earlier replay may have put later data on the backing device. Then the result is a mixture
    /// of both, and no state of the volume.
    #[arg(long)]
    older: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct ReplayReport {
    cache: PathBuf,
    backing: Place,
    /// Whether the devices were left unchanged.
    dry_run: bool,
    /// Blocks whose newest version was only in the cache.
    dirty_blocks: u64,
    /// Bytes written to the backing device.
    written_back_bytes: u64,
    /// Segments that were live.
    segments: u64,
    /// The last segment that was applied.
    recovery_point: u64,
    /// What the salvage of a corrupt log gave up; null if there was no salvage.
    salvage: Option<Summary>,
    /// With --until: the first later segment whose data the backing device already held, so that
    /// the result is a mixture; otherwise null.
    mixed_with_segment: Option<u64>,
    #[serde(skip)]
    salvage_in_words: Vec<String>,
}

pub(crate) fn replay(args: &Args, out: &mut Output) -> Result<()> {
    let Pair { cache, backing, insecure } = &args.pair;
    let until = args.until.map_or_else(String::new, |id| format!(" --until {id}"));
    let again = format!(
        "wbctl replay --cache {} --backing {}{}{until}",
        cache.display(),
        backing.in_shell(),
        if insecure.insecure { " --insecure" } else { "" }
    );
    cli::on_interrupt("wbctl", move || {
        format!(
            "interrupted; the data written back stays written back, and the rest is still in the \
             cache. Continue with: {again}"
        )
    })?;
    let io = Io::start()?;
    let to_write = |is_written| if is_written { Access::Write } else { Access::Read };
    let access = [to_write(args.until.is_none() && !args.dry_run), to_write(!args.dry_run)];
    let (cache, Backing { device: backing, .. }) = args.pair.open_for(&io, access)?;
    let cache = io.serve(cache);
    let past = Past::look_up(&io, &cache, args.older, |why| cli::complain("wbctl", why))?;
    rival::refuse(&io, &args.pair.cache, past.uuid.as_deref(), &args.pair.backing)?;
    let report = if let Some(until) = args.until {
        write_back_until(&io, cache, backing, args, SegmentId(until), past.reach)
    } else if args.dry_run {
        look(&io, &cache, &backing, args, past.reach)
    } else {
        write_back(&io, cache, backing, args, past.reach)
    };
    let report = report.map_err(|e| past.explain(e))?;
    if args.json {
        out.json(&report)?;
        return Ok(());
    }
    Ok(in_words(&report, args, out)?)
}

fn in_words(report: &ReplayReport, args: &Args, out: &mut Output) -> io::Result<()> {
    for line in &report.salvage_in_words {
        writeln!(out, "{line}")?;
    }
    let what = format!(
        "{} ({}) from {}",
        count(report.dirty_blocks, "dirty block"),
        human_size(report.dirty_blocks * to_u64(BLOCK_BYTES)),
        count(report.segments, "segment"),
    );
    match (report.dirty_blocks, args.dry_run, args.until) {
        (0, _, Some(id)) => writeln!(out, "nothing to write back up to segment {id}")?,
        (0, _, None) => writeln!(out, "nothing to write back: the cache is clean")?,
        (_, true, _) => writeln!(out, "would write back {what}")?,
        (_, false, Some(id)) => writeln!(
            out,
            "wrote back {what}: the log up to segment {id}; the cache is unchanged, and still \
             holds the whole log"
        )?,
        (_, false, None) => writeln!(out, "wrote back {what}; the cache is clean")?,
    }
    if let Some(segment) = report.mixed_with_segment {
        let is = if args.dry_run { "would be" } else { "is" };
        writeln!(
            out,
            "the backing device already held what segment {segment} wrote: the result {is} a \
             mixture, and no state of the volume"
        )?;
    }
    Ok(())
}

fn write_back(
    io: &Io,
    cache: Device,
    backing: Device,
    args: &Args,
    known: Option<Reach>,
) -> Result<ReplayReport> {
    let open = async |known| {
        let (cache, backing) = (cache.clone(), backing.clone());
        let options = OpenOptions::replay().knowing(known);
        Cache::open(cache, backing, io.runtime(), options).await
    };
    let (cache, salvaged) =
        io.block_on(salvage::open(&args.salvage, &cache, &backing, known, open))?;
    let before = cache.status();
    let drained = drain(io, &cache, before.dirty_blocks);
    let closed = io.block_on(cache.close());
    let about = About {
        volume: None,
        cache: absolute(&args.pair.cache)?,
        backing: absolute_place(&args.pair.backing)?,
    };
    if let Err(e) = notes::note(&cache, &about, closed.is_ok()) {
        cli::complain("wbctl", format!("{e:#}"));
    }
    drained?;
    closed?;
    Ok(ReplayReport {
        cache: args.pair.cache.clone(),
        backing: args.pair.backing.clone(),
        dry_run: false,
        dirty_blocks: before.dirty_blocks,
        written_back_bytes: cache.status().statistics.counters.written_back_bytes,
        segments: before.dirty_segments,
        recovery_point: before.newest.0,
        salvage: salvaged.as_ref().map(Plan::summary),
        mixed_with_segment: None,
        salvage_in_words: salvaged.as_ref().map(salvage::outcome).unwrap_or_default(),
    })
}

/// Writes back the log as it was when the segment `until` was the newest.
fn write_back_until(
    io: &Io,
    cache: Device,
    backing: Device,
    args: &Args,
    until: SegmentId,
    known: Option<Reach>,
) -> Result<ReplayReport> {
    // In a dry run, the repairs of recovery must not reach the device either.
    let backing = if args.dry_run { Arc::new(Overlay::over(backing)) } else { backing };
    let open = |options: OpenOptions| {
        let (cache, backing) = (cache.clone(), backing.clone());
        io.block_on(Cache::open(cache, backing, io.runtime(), options.knowing(known)))
    };
    let options = OpenOptions::replay_until(until);
    let opened = open(options.clone());
    let ahead = match &opened {
        Err(CacheError::Log(LogError { kind: LogErrorKind::Ahead { segment, .. }, .. })) => {
            Some(*segment)
        }
        _ => None,
    };
    let (cache, mixed_with_segment) = match (opened, ahead) {
        (Err(_), Some(segment)) if args.older => (open(options.mixing(true))?, Some(segment.0)),
        (Err(e), Some(_)) => bail!("{e}; --older goes on all the same"),
        (opened, _) => (opened?, None),
    };
    let before = cache.status();
    if !args.dry_run {
        // The cache is not closed: its log stays as it is, so there is nothing to hand over.
        drain(io, &cache, before.dirty_blocks)?;
    }
    Ok(ReplayReport {
        cache: args.pair.cache.clone(),
        backing: args.pair.backing.clone(),
        dry_run: args.dry_run,
        dirty_blocks: before.dirty_blocks,
        written_back_bytes: cache.status().statistics.counters.written_back_bytes,
        segments: before.dirty_segments,
        recovery_point: until.0,
        salvage: None,
        mixed_with_segment,
        salvage_in_words: Vec::new(),
    })
}

/// Finds out what a replay would do.
fn look(
    io: &Io,
    cache: &Device,
    backing: &Device,
    args: &Args,
    known: Option<Reach>,
) -> Result<ReplayReport> {
    let examine = async |known| Cache::examine(cache, backing, known).await;
    let look = salvage::open(&args.salvage, cache, backing, known, examine);
    let ((recovery, live), _) = io.block_on(look)?;
    Ok(ReplayReport {
        cache: args.pair.cache.clone(),
        backing: args.pair.backing.clone(),
        dry_run: true,
        dirty_blocks: live.dirty_blocks,
        written_back_bytes: 0,
        segments: recovery.live_count(),
        recovery_point: recovery.point.0,
        salvage: None,
        mixed_with_segment: None,
        salvage_in_words: Vec::new(),
    })
}

/// Drains, and shows progress on a terminal.
fn drain(io: &Io, cache: &Cache, dirty_blocks: u64) -> Result<(), CacheError> {
    let mut progress = Progress::new("writing back", dirty_blocks, BLOCK_BYTES);
    let draining = cache.clone();
    let drained = io.runtime().run_watched(async move { draining.drain().await }, PROGRESS, || {
        progress.set(dirty_blocks.saturating_sub(cache.status().blocks_to_write_back));
        true
    });
    drained.unwrap_or(Err(CacheError::Closed))
}
