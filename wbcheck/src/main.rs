//! `wbcheck`: reads a cache device, changes nothing, and says whether it is sound.

mod findings;
mod one_segment;
mod report;
mod words;

use anyhow::{Result, bail};
use clap::Parser;
use findings::{Backing, Findings};
use libwb::cli::{self, Exit, Io, Output};
use libwb::device::Device;
use libwb::device::probe::{Access, open};
use libwb::format::{SECTOR_BYTES, SegmentId, to_u64};
use libwb::log::LogError;
use libwb::log::scan::{BackingFacts, RawSuperblock, check_pairing, examine_superblock};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

const EXIT_CODES: &str = "\
Exit codes:
  0  sound, also after a power cut
  2  the command line makes no sense
  4  errors found
  8  could not check: for example the device is in use, or is no cache device";

/// Check a cache device. Reads the whole device and changes nothing.
///
/// The first line of the output is the verdict. What a power cut explains is no error; it is noted, and nothing that was
/// acknowledged as durable is lost.
#[derive(Parser)]
#[command(name = "wbcheck", version, after_help = EXIT_CODES)]
struct Args {
    /// The cache device: a block device or a file
    #[arg(value_name = "CACHE")]
    cache: PathBuf,

    /// Check as well that all dirty data fits on this backing device
    #[arg(long, value_name = "DEV")]
    backing: Option<PathBuf>,

    /// Check this segment alone. Of the others, only the headers are read
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u64).range(1..=SegmentId::MAX.0))]
    segment: Option<u64>,

    /// Read the headers alone, which is much faster but does not notice damaged data
    #[arg(long, conflicts_with = "segment")]
    headers_only: bool,

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
}

fn main() -> ExitCode {
    let args = Args::parse();
    cli::run("wbcheck", Exit::CouldNotCheck, |out| check(&args, out))
}

fn check(args: &Args, out: &mut Output) -> Result<Exit> {
    let subject = prepare(args)?;
    if let Some(id) = args.segment {
        return one_segment::check(&subject, SegmentId(id), args, out);
    }
    let findings = Findings::gather(&subject, args)?;
    let verdict = findings.verdict();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report::Report::of(&findings))?)?;
    } else if !args.quiet {
        words::print(&findings, out)?;
    } else if verdict.exit() != Exit::Done {
        writeln!(out, "{}", words::headline(&findings))?;
    }
    Ok(verdict.exit())
}

fn prepare(args: &Args) -> Result<Subject> {
    let io = Io::start()?;
    let opened = open(&args.cache, Access::Read)?;
    let backing = match &args.backing {
        None => None,
        // Only its size matters, so it may be in use.
        Some(path) => {
            let backing = open(path, Access::ReadUnlocked)?;
            if backing.identity == opened.identity {
                bail!("{} is the cache device itself, not its backing device", path.display());
            }
            Some((
                backing.identity_text,
                Backing { path: path.clone(), sectors: backing.size / to_u64(SECTOR_BYTES) },
            ))
        }
    };
    let device = io.serve(opened);
    let superblock = io.block_on(examine_superblock(&device))?;
    if let Err(fault) = superblock.magic {
        return Err(LogError::Superblock { device: device.name().to_string(), fault }.into());
    }
    superblock.check_extension(&device)?;
    if let (Some(extension), Some((identity, backing))) = (superblock.extension(), &backing) {
        let name = backing.path.display().to_string();
        let facts = BackingFacts { name: &name, sectors: backing.sectors, identity };
        check_pairing(&device, extension, &facts)?;
    }
    let recorded = superblock.extension().filter(|extension| extension.backing_sectors != 0);
    let recorded = recorded.map(|extension| Backing {
        path: "the backing device it was made for".into(),
        sectors: extension.backing_sectors,
    });
    let backing = backing.map(|(_, backing)| backing).or(recorded);
    Ok(Subject { io, device, superblock, backing })
}
