//! `wbctl create`: format a cache device, and record the volume.

use crate::Pair;
use crate::config::{Volume, parse_tunables, refuse_recorded, refuse_shared};
use crate::place::Name;
use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use libwb::cache::refuse_size;
use libwb::cli::{Exit, Output};
use libwb::device::fit::refuse_misfit;
use libwb::device::probe::{self, Access, OpenError, Opened};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The volume's name
    name: Name,
    #[command(flatten)]
    pair: Pair,
    /// Logical sector size of the loop device in bytes; by default that of the backing device
    #[arg(long, value_parser = sector_sizes(), hide_possible_values = true, value_name = "512|4096")]
    sector_size: Option<u32>,
    /// Go on although the cache device holds a filesystem, a partition table or the like, or the
    /// backing device is a cache device itself, or smaller than the cache device
    #[arg(long)]
    force: bool,
    /// Do not allocate a cache device that is a sparse file. If its filesystem is full later,
    /// writes are tried again for some 20 seconds; then the volume fails
    #[arg(long)]
    sparse: bool,
    /// Give up the dirty blocks of the cache that is on the cache device. They are lost for ever
    #[arg(long)]
    discard_dirty: bool,
    /// Write the base format of dm-writeboost alone, without pairing and the CRC of each block
    #[arg(long)]
    compat: bool,
    /// Tunables to record
    #[arg(value_name = "KEY=VALUE")]
    tunables: Vec<String>,
}

/// The sector sizes, as completions offer them.
pub(crate) fn sector_sizes() -> impl TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["512", "4096"]).try_map(|text| parse_sector_size(&text))
}

/// Reads a sector size.
pub(crate) fn parse_sector_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("must be 512 or 4096".into()),
    }
}

/// Opens both devices of a pair, to read and write them alone.
pub(crate) fn open_pair(pair: &Pair) -> Result<(Opened, Opened), OpenError> {
    probe::open_pair(&pair.cache, &pair.backing, [Access::Write; 2])
}

pub(crate) fn create(args: &Args, out: &mut Output) -> Result<Exit> {
    let name = &args.name;
    let volume = Volume {
        cache: absolute(&args.pair.cache)?,
        backing: absolute(&args.pair.backing)?,
        sector_size: args.sector_size,
        tunables: parse_tunables(&args.tunables)?,
    };
    refuse_recorded(name)?;
    let (cache, backing) = open_pair(&args.pair)?;
    refuse_shared(&volume)?;
    refuse_size(&backing.path.to_string_lossy(), backing.size)?;
    sector_size(args.sector_size, &backing)?;
    if !args.force {
        refuse_misfit(&cache, &backing)?;
    }
    // wbformat is to have it.
    drop(cache);
    // Before anything is formatted, so that what cannot be recorded is not.
    let record = volume.prepare(name)?;
    let mut format = Command::new(wbformat()?);
    // What is refused is refused by the program that was typed.
    format.arg0("wbctl").arg(&args.pair.cache).stdout(Stdio::null());
    if args.compat {
        format.arg("--compat");
    } else {
        format.arg("--label").arg(name.to_string()).arg("--backing").arg(&args.pair.backing);
    }
    format
        .args(args.force.then_some("--force"))
        .args(args.discard_dirty.then_some("--discard-dirty"));
    format.args(args.sparse.then_some("--sparse"));
    match format.status().context("cannot run wbformat")? {
        status if status.success() => {}
        // It has said why.
        status if status.code() == Some(Exit::Failed as i32) => return Ok(Exit::Failed),
        status => bail!("volume '{name}' was not created: wbformat: {status}"),
    }
    record.save().context("the cache is formatted, but the volume is not recorded")?;
    writeln!(
        out,
        "created '{name}', recorded in {}; start it with: wbctl attach {name}",
        name.config_file().display()
    )?;
    Ok(Exit::Done)
}

/// The sector size to serve a backing device with.
pub(crate) fn sector_size(wanted: Option<u32>, backing: &Opened) -> Result<u32> {
    let wanted = wanted.unwrap_or(if backing.block_size > 512 { 4096 } else { 512 });
    if wanted < backing.block_size {
        bail!(
            "{}: has blocks of {} bytes, so sectors of {wanted} bytes cannot be served; use \
             --sector-size 4096",
            backing.path.display(),
            backing.block_size
        );
    }
    if !backing.size.is_multiple_of(wanted.into()) {
        bail!(
            "{}: {} bytes are no multiple of {wanted}, so its end could not be served in sectors \
             of {wanted} bytes; use --sector-size 512",
            backing.path.display(),
            backing.size
        );
    }
    Ok(wanted)
}

pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| path.display().to_string())
}

/// The program beside this one, or else the one on the search path.
fn wbformat() -> Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("wbformat");
    Ok(if beside.exists() { beside } else { "wbformat".into() })
}
