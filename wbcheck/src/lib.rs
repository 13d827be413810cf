//! `wbcheck`: reads a cache device and says whether it is sound. It changes nothing, unless it is
//! told to repair.

mod findings;
mod one_segment;
mod repair;
mod report;
mod words;

use anyhow::{Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{CommandFactory, Parser};
use findings::{Backing, Findings};
use libwb::cli::{self, Exit, Io, Output};
use libwb::device::Device;
use libwb::device::probe::{Access, open, open_pair};
use libwb::device::signatures;
use libwb::format::{SECTOR_BYTES, SegmentId, SuperblockFault, to_u64};
use libwb::log::pairing::check_pairing;
use libwb::log::salvage::SalvageMode;
use libwb::log::superblock::{RawSuperblock, examine_superblock};
use libwb::log::{LogError, LogErrorKind, Use};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

const EXIT_CODES: &str = "\
Exit codes:
  0  sound, also after a power cut
  1  errors were found, and all repaired (--repair)
  2  the command line makes no sense
  4  errors found, and still there
  8  could not check: for example the device is in use, or is no cache device";

/// Check a cache device. Reads the whole device, and changes nothing but with --repair.
///
/// The first line of the output is the verdict. What a power cut explains is no error; it is noted,
/// and nothing that was acknowledged as durable is lost.
#[derive(Parser)]
#[command(name = "wbcheck", version, after_help = EXIT_CODES)]
struct Args {
    /// The cache device: a block device or a file
    #[arg(value_name = "CACHE")]
    cache: PathBuf,

    /// Check as well that all dirty data fits on this backing device
    #[arg(long, value_name = "DEV")]
    backing: Option<PathBuf>,

    /// Check this segment alone. The others are read as attaching reads them: mostly their headers
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u64).range(1..=SegmentId::MAX.0))]
    segment: Option<u64>,

    /// Read the headers alone, which is much faster but does not notice damaged data
    #[arg(long, conflicts_with = "segment")]
    headers_only: bool,

    /// Repair what can be without giving up any data that recovery would use: what a power cut has
    /// torn, what is damaged but written back, a damaged copy of the superblock extension, the
    /// first bytes of a device that has one
    ///
    /// After that, the kernel module reads the same volume from the log as wb, as after a detach:
    /// no segment is left at which it would stop, or that is written back and from which it would
    /// take old data for new. The device must not be attached.
    #[arg(long, conflicts_with_all = ["segment", "headers_only"])]
    repair: bool,

    /// With --repair, go on with a corrupt log, and give up what has to be: with skip the damaged
    /// blocks alone, with stop all that came after them
    ///
    /// Without it, what each way would give up is shown. Copy the device first: what is given up is
    /// gone for ever.
    #[arg(
        long,
        value_name = "skip|stop",
        value_parser = PossibleValuesParser::new(["skip", "stop"]).try_map(|way| way.parse::<SalvageMode>()),
        hide_possible_values = true,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "skip",
        requires = "repair"
    )]
    salvage: Option<SalvageMode>,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,

    /// Print nothing when the device is sound, and the verdict alone when it is not
    #[arg(long, conflicts_with = "json")]
    quiet: bool,
}

/// What a check works on.
struct Subject {
    io: Io,
    device: Device,
    superblock: RawSuperblock,
    backing: Option<Backing>,
    /// What was wrong with the magic before it was written anew.
    damaged_magic: Option<SuperblockFault>,
}

impl Subject {
    fn read_superblock(&mut self) -> Result<()> {
        self.superblock = self.io.block_on(examine_superblock(&self.device))?;
        Ok(())
    }
}

/// The command line, as it is parsed and documented.
pub fn command() -> clap::Command {
    Args::command()
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    cli::run("wbcheck", Exit::CouldNotCheck, |out| check(&args, out))
}

fn check(args: &Args, out: &mut Output) -> Result<Exit> {
    let mut subject = prepare(args)?;
    if let Some(id) = args.segment {
        return one_segment::check(&subject, SegmentId(id), args, out);
    }
    let findings = Findings::gather(&subject, args)?;
    if args.repair {
        return repair::repair(&mut subject, findings, args, out);
    }
    print(&findings, args, out)
}

fn print(findings: &Findings, args: &Args, out: &mut Output) -> Result<Exit> {
    let verdict = findings.verdict();
    if args.json {
        out.json(&report::Report::of(findings, None))?;
    } else if !args.quiet {
        words::print(findings, out)?;
    } else if verdict.exit() != Exit::Done {
        writeln!(out, "{}", words::headline(findings))?;
    }
    Ok(verdict.exit())
}

fn prepare(args: &Args) -> Result<Subject> {
    let io = Io::start()?;
    let access = if args.repair { Access::Write } else { Access::Read };
    let (opened, backing) = match &args.backing {
        None => (open(&args.cache, access)?, None),
        // Only its size matters, so it may be in use.
        Some(path) => {
            let (opened, backing) = open_pair(&args.cache, path, [access, Access::ReadUnlocked])?;
            let sectors = backing.size / to_u64(SECTOR_BYTES);
            let identity = Some(backing.identity_text);
            (opened, Some(Backing { path: path.clone(), sectors, identity }))
        }
    };
    let device = io.serve(opened);
    let superblock = io.block_on(examine_superblock(&device))?;
    if let Err(fault) = superblock.magic {
        refuse_other_than_damaged(
            args,
            &superblock,
            LogError::new(&device, LogErrorKind::Superblock { fault }),
        )?;
    }
    superblock.check_extension(&device, if args.repair { Use::Write } else { Use::Read })?;
    if let (Some(extension), Some(backing)) = (superblock.extension(), &backing) {
        let name = backing.path.display().to_string();
        check_pairing(&device, extension, &backing.facts(&name))?;
    }
    let recorded = superblock.extension().filter(|extension| extension.backing_sectors != 0);
    let recorded = recorded.map(|extension| Backing {
        path: "the backing device it was made for".into(),
        sectors: extension.backing_sectors,
        identity: None,
    });
    let backing = backing.or(recorded);
    let damaged_magic = superblock.magic.err();
    let mut subject = Subject { io, device, superblock, backing, damaged_magic };
    if subject.damaged_magic.is_some() {
        repair::restore_magic(&mut subject)?;
    }
    Ok(subject)
}

/// Refuses a device without the magic, unless it is a cache all the same and is to be repaired.
fn refuse_other_than_damaged(
    args: &Args,
    superblock: &RawSuperblock,
    error: LogError,
) -> Result<()> {
    let signature = signatures::find(&args.cache).ok().flatten();
    match (superblock.extension(), signature) {
        (None, None) => Err(error.into()),
        (None, Some(signature)) => bail!("{error}; it holds: {signature}"),
        (Some(_), Some(signature)) => bail!(
            "{error}; it holds: {signature}. Yet it was formatted as a cache: if that is still \
             needed, copy the device, wipe what was put on it (wipefs --all), then use wbcheck \
             --repair"
        ),
        (Some(_), None) if !args.repair => bail!(
            "{error}; yet it was formatted as one, so its first bytes are damaged: copy it, then \
             use wbcheck --repair, which writes them anew"
        ),
        (Some(_), None) => Ok(()),
    }
}
