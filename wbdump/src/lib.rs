//! `wbdump`: shows the log on a cache device, however damaged it is.

mod block;
mod blocks;
mod identity;
mod log;
mod map;
mod segment;
mod segments;
mod superblock;
mod version;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};
use libwb::cli::{self, Exit, Output};
use libwb::format::{BlockNo, SegmentId};
use log::Log;
use std::path::PathBuf;
use std::process::ExitCode;

/// Show the log on a cache device. Changes nothing, and works on damaged devices.
///
/// Reads even a device that is in use, with a warning: the output may then mix several states.
#[derive(Parser)]
#[command(name = "wbdump", version, after_help = cli::EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Show the superblock and the totals of the log. Reads the whole device
    Super(Target),
    /// Show the identity of the cache, as variables for udev and scripts. Reads only the superblock
    Identity {
        /// The cache device: a block device or a file
        #[arg(value_name = "CACHE")]
        cache: PathBuf,
    },
    /// List the segments in log order, oldest first. Reads the whole device
    ///
    /// The output counts slots that were never written; with --json, each has a line of its own,
    /// after the others.
    Segments {
        #[command(flatten)]
        target: Target,
        /// Show only segments that attaching would apply
        #[arg(long)]
        live: bool,
        /// Show only damaged slots
        #[arg(long, conflicts_with = "live")]
        bad: bool,
    },
    /// Show one segment: its header and its metablocks. Reads the others as attaching reads them
    Segment {
        #[command(flatten)]
        target: Target,
        /// The segment's id, a number from 1
        #[arg(
            value_name = "ID",
            value_parser = clap::value_parser!(u64).range(1..=SegmentId::MAX.0)
        )]
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
        /// Write to standard output only the 4096 bytes of the newest version that attaching would
        /// not drop. Only its dirty sectors are newer than the backing device
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
    /// The drawing starts with the oldest segment. If a character or square stands for several
    /// segments, it shows the worst of them. The recovery point is the last segment that attaching
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
