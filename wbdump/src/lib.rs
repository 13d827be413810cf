//! `wbdump`: shows the log on a cache device, however damaged it is.

mod block;
mod blocks;
mod identity;
mod map;
mod segment;
mod segments;
mod superblock;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};
use libwb::cli::{self, Exit, Io, Output, Progress};
use libwb::device::Device;
use libwb::device::probe::{Access, OpenError};
use libwb::format::{BlockNo, Geometry, SEGMENT_BYTES, SegmentId, Slot, to_usize};
use libwb::log::Use;
use libwb::log::recovery::{Recovery, explained, recover};
use libwb::log::scan::{SlotContent, SlotState, read_slot, scan, scan_trusting};
use libwb::log::superblock::{RawSuperblock, examine_damaged_superblock};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Show the log on a cache device. Changes nothing, and works on damaged devices.
///
/// A device that is in use is read all the same, with a warning: what is shown may then be a
/// mixture of states.
#[derive(Parser)]
#[command(name = "wbdump", version, after_help = cli::EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Show the superblock and totals of what the log holds. Reads the whole device
    Super(Target),
    /// Show which cache it is, as variables for udev and scripts. Reads the superblock alone
    Identity {
        /// The cache device: a block device or a file
        #[arg(value_name = "CACHE")]
        cache: PathBuf,
    },
    /// List the segments in log order, oldest first. Reads the whole device
    ///
    /// Slots that were never written are counted; with --json each has its line, after the others.
    Segments {
        #[command(flatten)]
        target: Target,
        /// Only segments that attaching would apply
        #[arg(long)]
        live: bool,
        /// Only slots that are damaged
        #[arg(long, conflicts_with = "live")]
        bad: bool,
    },
    /// Show one segment: its header and its metablocks. The others are read as attaching reads them
    Segment {
        #[command(flatten)]
        target: Target,
        /// The segment's id, a number from 1
        #[arg(value_name = "ID", value_parser = clap::value_parser!(u64).range(1..=SegmentId::MAX.0))]
        id: u64,
    },
    /// Show every version of one block that the log holds, oldest first. Reads the whole device
    Block {
        #[command(flatten)]
        target: Target,
        /// The block's number on the backing device, in units of 4096 bytes (a sector number
        /// divided by 8)
        #[arg(value_name = "N", value_parser = clap::value_parser!(u64).range(0..=u64::MAX / 8))]
        block: u64,
        /// Dump the data of each version in hexadecimal
        #[arg(long)]
        data: bool,
        /// Write the 4096 bytes of the newest version that attaching would not drop, and nothing
        /// else, to standard output. Only its dirty sectors are newer than the backing device
        #[arg(long, conflicts_with_all = ["data", "json"])]
        raw: bool,
    },
    /// List the dirty blocks, each with its newest version that attaching would apply. Reads the
    /// whole device
    ///
    /// In a log of the kernel module, an older version can hold dirty sectors that the newest
    /// lacks; see `wbdump block`.
    Blocks(Target),
    /// Draw the log, and where its dirty blocks lie on the backing device. Reads the whole device
    ///
    /// The log is drawn oldest segment first. A character or square that stands for several
    /// segments shows the worst of them. The recovery point is the last segment that attaching
    /// would apply.
    Map {
        /// The cache device: a block device or a file
        #[arg(value_name = "CACHE")]
        cache: PathBuf,
        /// Write a picture to this file instead
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
}

#[derive(Args)]
struct Target {
    /// The cache device: a block device or a file
    #[arg(value_name = "CACHE")]
    cache: PathBuf,
    /// Print JSON, one object a line, instead of text
    #[arg(long)]
    json: bool,
}

/// The command line, as it is parsed and documented.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    cli::run("wbdump", Exit::Failed, |out| dump(cli.verb, out).map(|()| Exit::Done))
}

fn dump(verb: Verb, out: &mut Output) -> Result<()> {
    match verb {
        Verb::Super(target) => superblock::show(&Log::open(&target.cache)?, target.json, out),
        Verb::Identity { cache } => identity::show(&cache, out),
        Verb::Segments { target, live, bad } => {
            let only = segments::Only { live, bad };
            segments::list(&Log::open(&target.cache)?, only, target.json, out)
        }
        Verb::Segment { target, id } => {
            segment::show(&Log::open(&target.cache)?, SegmentId(id), target.json, out)
        }
        Verb::Block { target, block, data, raw } => {
            let log = Log::open(&target.cache)?;
            let versions = block::Versions::find(&log, BlockNo(block));
            if raw { versions.write_newest(out) } else { versions.list(data, target.json, out) }
        }
        Verb::Blocks(target) => blocks::list(&Log::open(&target.cache)?, target.json, out),
        Verb::Map { cache, svg } => map::show(&Log::open(&cache)?, svg.as_deref(), out),
    }
}

/// A cache device, opened.
struct Log {
    io: Io,
    device: Device,
    superblock: RawSuperblock,
}

impl Log {
    fn open(path: &Path) -> Result<Log> {
        let io = Io::start()?;
        let device = match io.open(path, Access::Read) {
            Err(OpenError::InUse { .. }) => {
                cli::complain(
                    "wbdump",
                    format_args!("warning: {} is in use and may change meanwhile", path.display()),
                );
                io.open(path, Access::ReadUnlocked)?
            }
            other => other?,
        };
        let (superblock, [no_magic, no_record]) =
            io.block_on(examine_damaged_superblock(&device))?;
        for (unread, wrong) in
            [(no_magic, superblock.magic.err()), (no_record, superblock.record.err())]
        {
            match (unread, wrong) {
                (Some(error), _) => cli::complain("wbdump", format_args!("warning: {error}")),
                (None, Some(fault)) => {
                    cli::complain("wbdump", format_args!("warning: {}: {fault}", path.display()));
                }
                (None, None) => {}
            }
        }
        if let Err(error) = superblock.check_extension(&device, Use::Read) {
            cli::complain("wbdump", format_args!("warning: {error}"));
        }
        let torn = if superblock.has_torn_copy() { ", torn by a power cut" } else { "" };
        for fault in superblock.pages.iter().filter_map(|page| page.as_ref().err()) {
            if superblock.extension().is_some() {
                let which = format_args!("{}: one copy of two{torn}", path.display());
                cli::complain("wbdump", format_args!("warning: {which}: {fault}"));
            }
        }
        Ok(Log { io, device, superblock })
    }

    fn geometry(&self) -> Geometry {
        self.superblock.geometry
    }

    /// Reads every slot.
    fn scan(&self, mut visit: impl FnMut(Slot, &SlotContent)) -> (Vec<SlotState>, Recovery) {
        let mut progress = Progress::new("reading", self.geometry().lap(), SEGMENT_BYTES);
        let slots = self.io.block_on(scan(&self.device, self.geometry(), |slot, content| {
            progress.set(u64::from(slot.0));
            visit(slot, content);
        }));
        let superblock = self.superblock.or_no_record();
        // A slot is to show as recovery takes it.
        let slots = explained(&superblock, &slots).into_owned();
        let recovery = recover(&superblock, &slots);
        (slots, recovery)
    }

    /// Reads one slot whole, and the others as attaching reads them: what it holds, and the verdict
    /// on it among them.
    fn examine(&self, slot: Slot) -> (SlotContent, SlotState, Recovery) {
        let mut progress = Progress::new("reading", self.geometry().lap(), SEGMENT_BYTES);
        let visit = |slot: Slot, _: &SlotContent| progress.set(u64::from(slot.0));
        let superblock = self.superblock.or_no_record();
        let mut slots = self.io.block_on(scan_trusting(&self.device, &superblock, visit));
        let content = self.io.block_on(read_slot(&self.device, self.geometry(), slot));
        let place = to_usize(u64::from(slot.0));
        slots[place] = content.state.clone();
        let recovery = recover(&superblock, &slots);
        (content, explained(&superblock, &slots)[place].clone(), recovery)
    }

    /// Says where a log that is corrupt stops.
    fn warn_of(&self, recovery: &Recovery) {
        for corruption in &recovery.corruption {
            let point = recovery.point;
            cli::complain(
                "wbdump",
                format_args!(
                    "warning: {corruption}; the log is shown up to segment {point}, see wbcheck"
                ),
            );
        }
    }
}
