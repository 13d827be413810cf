//! `wbctl create`: formats a cache device, and records the volume.

use crate::config::{RecordedVolume, parse_tunables, refuse_recorded, refuse_shared};
use crate::front_end::{FrontEnd, ServeOption};
use crate::pair::{Pair, absolute, absolute_place};
use crate::sector_size::{self, SectorSize};
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, bail};
use libwb::cache::refuse_size;
use libwb::cli::{Backing, Exit, Io, Output};
use libwb::device::Place;
use libwb::device::fit::refuse_misfit;
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The volume's name
    name: VolumeName,
    #[command(flatten)]
    pair: Pair,
    #[command(flatten)]
    serve: ServeOption,
    #[command(flatten)]
    sector: SectorSize,
    /// Go on in spite of these: the cache device holds a filesystem, a partition table or the like;
    /// the backing device is itself a cache device, or is smaller than the cache device
    #[arg(long)]
    force: bool,
    /// Do not allocate a cache device that is a sparse file. If its filesystem fills up later, wb
    /// retries writes for about 20 seconds; then the volume fails
    #[arg(long)]
    sparse: bool,
    /// Give up the dirty blocks of the cache that the cache device holds. They are lost forever
    #[arg(long)]
    discard_dirty: bool,
    /// Write only the base format of dm-writeboost, without pairing and without a CRC of each block
    #[arg(long)]
    compat: bool,
    /// Tunables to record
    #[arg(value_name = "KEY=VALUE")]
    tunables: Vec<String>,
}

pub(crate) fn create(args: &Args, out: &mut Output) -> Result<Exit> {
    let name = &args.name;
    let insecure = args.pair.insecure.insecure;
    let serve = args.serve.or(FrontEnd::default(), insecure)?;
    let volume = RecordedVolume {
        cache: absolute(&args.pair.cache)?,
        backing: absolute_place(&args.pair.backing)?,
        serve,
        insecure,
        sector_size: args.sector.sector_size,
        tunables: parse_tunables(&args.tunables)?,
    };
    refuse_recorded(name)?;
    let io = Io::start()?;
    let (cache, Backing { device: backing, .. }) = args.pair.open(&io)?;
    refuse_shared(&volume)?;
    refuse_size(backing.name(), backing.size())?;
    sector_size::choose(args.sector.sector_size, &backing)?;
    if !args.force {
        io.block_on(refuse_misfit(cache.size, &backing))?;
    }
    // wbformat needs to lock it.
    drop(cache);
    // The backing device stays locked. A server may take only one client.
    let _locked = volume.backing.path().map(|_| (backing, io));
    // Before wbformat runs, so that it formats nothing that cannot be recorded.
    let record = volume.prepare(name)?;
    let mut format = Command::new(wbformat()?);
    // Refusals carry the name of the program that the user typed.
    format.arg0("wbctl").arg(&args.pair.cache).stdout(Stdio::null());
    if args.compat {
        format.arg("--compat");
    } else {
        format.arg("--label").arg(name.to_string()).arg("--backing").arg(text(&volume.backing));
        format.args(insecure.then_some("--insecure"));
    }
    format
        .args(args.force.then_some("--force"))
        .args(args.discard_dirty.then_some("--discard-dirty"));
    format.args(args.sparse.then_some("--sparse"));
    match format.status().context("cannot run wbformat")? {
        status if status.success() => {}
        // wbformat has printed the reason.
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

/// A place as an argument.
fn text(place: &Place) -> OsString {
    match place {
        Place::Path(path) => path.into(),
        Place::Export(uri) => uri.to_string().into(),
    }
}

/// The program beside this one, or else the one on the search path.
fn wbformat() -> Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("wbformat");
    Ok(if beside.exists() { beside } else { "wbformat".into() })
}
