//! `wbctl upgrade`: adds wb's extension to a device of the kernel module.

use crate::pair::Pair;
use anyhow::{Result, bail};
use libwb::cli::{Backing, Io, Output, count, parse_label};
use libwb::device::Place;
use libwb::log::Use;
use libwb::log::pairing::BackingFacts;
use libwb::log::salvage::Scanned;
use libwb::log::upgrade::Upgrade;
use serde::Serialize;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pair: Pair,
    /// A label for people, of up to 64 bytes
    #[arg(long, value_parser = parse_label)]
    label: Option<String>,
    /// Show what would be changed, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct UpgradeReport<'a> {
    cache: &'a Path,
    backing: &'a Place,
    dry_run: bool,
    written: Vec<String>,
    /// They stay as they are.
    dirty_blocks: u64,
}

pub(crate) fn upgrade(args: &Args, out: &mut Output) -> Result<()> {
    let io = Io::start()?;
    let (cache, Backing { device: backing, .. }) = args.pair.open(&io)?;
    let cache = io.serve(cache);
    let scanned = io.block_on(Scanned::read(&cache, Use::Write, |_| ()))?;
    let label = args.label.as_deref().unwrap_or_default();
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let backing = BackingFacts::of(&backing);
    let upgrade = match io.block_on(Upgrade::plan(&cache, &scanned, &backing, label, created)) {
        Err(error) if error.is_corruption() => {
            bail!("{error}; salvage the log first, see wbcheck")
        }
        other => other?,
    };
    if !args.dry_run {
        io.block_on(upgrade.apply(&cache))?;
    }
    if args.json {
        out.json(&UpgradeReport {
            cache: &args.pair.cache,
            backing: &args.pair.backing,
            dry_run: args.dry_run,
            written: upgrade.changes(),
            dirty_blocks: upgrade.dirty_blocks,
        })?;
        return Ok(());
    }
    let path = args.pair.cache.display();
    let done = if args.dry_run { "would be upgraded; nothing was changed" } else { "upgraded" };
    writeln!(out, "{path}: {done}")?;
    for change in upgrade.changes() {
        writeln!(out, "  - {change}")?;
    }
    writeln!(
        out,
        "The contents of the cache stay as they are ({} not written back yet). The kernel module \
         can still read them.",
        count(upgrade.dirty_blocks, "dirty block")
    )?;
    Ok(())
}
