//! `wbformat`: makes a cache device, and refuses to overwrite anything that may still be of value.

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, Parser};
use libwb::cache::refuse_size;
use libwb::cli::{
    self, Exit, Io, Output, Progress, VolumeDevices, count, human_size, parse_label, place,
    refuse_in_the_clear,
};
use libwb::device::fit::refuse_misfit;
use libwb::device::probe::{Access, OpenError, Opened, open};
use libwb::device::sparse::SparseFile;
use libwb::device::{Device, Place, is_same_device, signatures};
use libwb::format::{Geometry, SECTOR_BYTES, SEGMENT_BYTES, SuperblockExtension, to_u64};
use libwb::log::Use;
use libwb::log::format_device::create;
use libwb::log::superblock::examine_superblock;
use libwb::log::traces::find_segment;
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Make a cache device: an empty log in the format of dm-writeboost.
///
/// Refuses a device in any of these cases: it is in use, or too small; it belongs to a recorded
/// volume; it holds a filesystem, partition table, LVM, RAID or other signature; it holds a cache
/// with dirty blocks, which may be the only copy of that data.
///
/// wbformat first allocates a sparse file, so that the cache has the room that it will need.
#[derive(Parser)]
#[command(name = "wbformat", version, after_help = cli::EXIT_CODES)]
struct Args {
    /// The device to make a cache of: a block device or a file. All its data is lost
    #[arg(value_name = "CACHE")]
    cache: PathBuf,

    /// Go on in spite of these: the device holds a filesystem, a partition table or the like, or
    /// belongs to a recorded volume; the backing device is itself a cache device, or smaller. Does
    /// not give up dirty blocks
    #[arg(long)]
    force: bool,

    /// Give up the dirty blocks of the cache on the device, and the remains of a damaged cache.
    /// They are lost forever
    #[arg(long)]
    discard_dirty: bool,

    /// Leave a sparse file as it is, instead of having its filesystem reserve all the room
    #[arg(long)]
    sparse: bool,

    /// Pair the cache with this backing device: wb will refuse it in front of any other
    #[arg(long, value_name = "DEV|URI", value_parser = place())]
    backing: Option<Place>,

    /// Use a backing device on another host without TLS. Anybody on the way can read and change
    /// what it answers
    #[arg(long, requires = "backing")]
    insecure: bool,

    /// A label for people, of up to 64 bytes
    #[arg(long, value_parser = parse_label)]
    label: Option<String>,

    /// The cache's UUID, instead of a random one
    #[arg(long)]
    uuid: Option<Uuid>,

    /// Write only the base format, without UUID, label, pairing and the CRC of each block
    #[arg(long, conflicts_with_all = ["backing", "label", "uuid"])]
    compat: bool,

    /// Check everything and show what would be done, but write nothing
    #[arg(long)]
    dry_run: bool,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct FormatReport<'a> {
    device: &'a Path,
    formatted: bool,
    size_bytes: u64,
    segments: u32,
    segment_bytes: usize,
    /// Null with --compat.
    uuid: Option<String>,
}

/// The command line, as it is parsed and documented.
pub fn command() -> clap::Command {
    Args::command()
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    cli::run(&name(), Exit::Failed, |out| format(&args, out))
}

/// The name that this program was called by. A caller may pass its own name, and errors then carry
/// that name.
fn name() -> String {
    let path = std::env::args_os().next().map(PathBuf::from);
    let name =
        path.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "wbformat".into())
}

fn format(args: &Args, out: &mut Output) -> Result<Exit> {
    let path = &args.cache;
    let io = Io::start()?;
    let opened = open(path, Access::Write)?;
    let geometry = Geometry::of_device(opened.size).with_context(|| path.display().to_string())?;
    let sparse = if args.sparse { None } else { SparseFile::of(&opened)? };
    let backing =
        args.backing.as_ref().map(|at| open_backing(args, &io, &opened, at)).transpose()?;
    let device = io.serve(opened);
    refuse_dirty(args, &io, &device)?;
    refuse_recorded(args)?;
    refuse_foreign(args)?;
    if let Some(sparse) = &sparse {
        sparse.refuse_full()?;
    }
    let extension =
        if args.compat { None } else { Some(extension(args, &device, backing.as_ref())) };
    if !args.dry_run {
        if let Some(sparse) = &sparse {
            sparse.allocate()?;
        }
        let mut progress = Progress::new("formatting", geometry.lap(), SEGMENT_BYTES);
        io.block_on(create(&device, extension.as_ref(), |done| progress.set(u64::from(done))))?;
    }
    report(args, &device, geometry, extension.as_ref(), out)?;
    Ok(Exit::Done)
}

/// Opens the backing device to pair the cache with. It may be in use.
fn open_backing(args: &Args, io: &Io, cache: &Opened, at: &Place) -> Result<Device> {
    refuse_in_the_clear(at, args.insecure)?;
    let same_path = at.path().filter(|path| is_same_device(&cache.path, path));
    if let Some(path) = same_path {
        bail!(OpenError::SameDevice { cache: cache.path.clone(), backing: path.into() });
    }
    let backing = io.open_backing(at, Access::ReadUnlocked)?.device;
    refuse_size(backing.name(), backing.size())?;
    if !args.force {
        io.block_on(refuse_misfit(cache.size, &backing))?;
    }
    Ok(backing)
}

/// The extension to write beyond the base format.
fn extension(args: &Args, device: &Device, backing: Option<&Device>) -> SuperblockExtension {
    let uuid = args.uuid.unwrap_or_else(Uuid::new_v4);
    let mut extension = SuperblockExtension {
        created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        label: args.label.clone().unwrap_or_default(),
        ..SuperblockExtension::new(uuid, device.size())
    };
    if let Some(backing) = backing {
        extension = extension.paired(backing.size() / to_u64(SECTOR_BYTES), backing.identity());
    }
    extension
}

/// Refuses a device of a recorded volume. `wbctl create` records a volume only after formatting.
fn refuse_recorded(args: &Args) -> Result<()> {
    if args.force {
        return Ok(());
    }
    let volumes = VolumeDevices::all().context("cannot read the records of volumes")?;
    if let Some(VolumeDevices { name, .. }) = volumes.iter().find(|volume| volume.has(&args.cache))
    {
        bail!(
            "{}: refused: it belongs to the volume '{name}'. To give that up, first run: wbctl \
             remove {name}. Or use --force to format the device and leave the volume recorded",
            args.cache.display()
        );
    }
    Ok(())
}

fn refuse_foreign(args: &Args) -> Result<()> {
    if args.force {
        return Ok(());
    }
    let path = args.cache.display();
    if let Some(signature) = signatures::find(&args.cache)? {
        bail!("{path}: refused: it holds: {signature}. Use --force to format it anyway");
    }
    Ok(())
}

fn refuse_dirty(args: &Args, io: &Io, device: &Device) -> Result<()> {
    let path = args.cache.display();
    let superblock = io.block_on(examine_superblock(device))?;
    if args.discard_dirty {
        return Ok(());
    }
    let cannot_tell = |why: &dyn std::fmt::Display| {
        format!(
            "{path}: refused: it holds a cache that is too damaged to tell whether it has dirty \
             blocks ({why}). See wbcheck; use --discard-dirty to give up whatever it holds"
        )
    };
    if let Err(fault) = superblock.magic {
        // The device may have been put to another use since.
        if signatures::find(&args.cache)?.is_some() {
            return Ok(());
        }
        if superblock.extension().is_some() {
            bail!(cannot_tell(&fault));
        }
        return refuse_traces(args, io, device, superblock.geometry);
    }
    if let Err(fault) = superblock.record {
        bail!(cannot_tell(&fault));
    }
    if let Err(error) = superblock.check_extension(device, Use::Read) {
        bail!(cannot_tell(&error));
    }
    // As attach does, which would write back what this finds.
    let dirty = match io.dirty_blocks(device, &superblock.or_no_record()) {
        Ok(dirty) => dirty,
        Err(error) => bail!(cannot_tell(&error)),
    };
    if dirty > 0 {
        bail!(
            "{path}: refused: it holds a cache with {} that may be nowhere else. Write them back \
             to the backing device first; use --discard-dirty to lose them",
            count(dirty, "dirty block")
        );
    }
    Ok(())
}

/// Refuses a device without a superblock that still holds segments.
fn refuse_traces(args: &Args, io: &Io, device: &Device, geometry: Geometry) -> Result<()> {
    let mut progress = Progress::new("looking for segments", geometry.lap(), SEGMENT_BYTES);
    let found = io.block_on(find_segment(device, geometry, |slot| progress.set(u64::from(slot.0))));
    drop(progress);
    if let Some(id) = found {
        bail!(
            "{}: refused: the first MiB of a cache was zeroed or overwritten, but its segments \
             are still there, such as segment {id}. They may hold dirty blocks that are nowhere \
             else; use --discard-dirty to give them up",
            args.cache.display()
        );
    }
    Ok(())
}

fn report(
    args: &Args,
    device: &Device,
    geometry: Geometry,
    extension: Option<&SuperblockExtension>,
    out: &mut Output,
) -> Result<()> {
    if args.json {
        let report = FormatReport {
            device: &args.cache,
            formatted: !args.dry_run,
            size_bytes: device.size(),
            segments: geometry.slots(),
            segment_bytes: SEGMENT_BYTES,
            uuid: extension.map(|extension| extension.uuid.to_string()),
        };
        out.json(&report)?;
        return Ok(());
    }
    let done = if args.dry_run { "would be formatted" } else { "formatted" };
    writeln!(
        out,
        "{}: {done} as a cache of {} ({} of {})",
        args.cache.display(),
        human_size(geometry.lap() * to_u64(SEGMENT_BYTES)),
        count(geometry.lap(), "segment"),
        human_size(to_u64(SEGMENT_BYTES)),
    )?;
    Ok(())
}
