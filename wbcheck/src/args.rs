//! The command line.

use clap::{ArgGroup, Parser};
use libwb::cli::{SalvageOption, place};
use libwb::device::Place;
use libwb::format::SegmentId;
use std::path::PathBuf;

const EXIT_CODES: &str = "\
Exit codes:
  0  sound, also after a power cut
  1  errors were found, and all repaired (--repair)
  2  the command line makes no sense
  4  errors found, and still there
  8  could not check: for example the device is in use, or is no cache device";

/// Check a cache device. Reads the whole device; changes nothing without --repair
///
/// The first line of the output is the verdict. Damage that a power cut explains is a note, not an
/// error: nothing acknowledged as durable is lost.
#[derive(Parser)]
#[command(name = "wbcheck", version, after_help = EXIT_CODES)]
#[command(group(ArgGroup::new("salvaging").arg("salvage").requires("repair")))]
pub(crate) struct Args {
    /// The cache device: a block device or a file
    #[arg(value_name = "CACHE")]
    pub(crate) cache: PathBuf,

    /// Also check that all dirty data fits on this backing device
    #[arg(long, value_name = "DEV|URI", value_parser = place())]
    pub(crate) backing: Option<Place>,

    /// Use a backing device on another host without TLS. Anybody on the way can read and change
    /// what it answers
    #[arg(long, requires = "backing")]
    pub(crate) insecure: bool,

    /// Check only this segment. Read the others as attaching reads them: mostly their headers
    #[arg(
        long,
        value_name = "ID",
        value_parser = clap::value_parser!(u64).range(1..=SegmentId::MAX.0)
    )]
    pub(crate) segment: Option<u64>,

    /// Read only the headers. Much faster, but does not notice damaged data
    #[arg(long, conflicts_with = "segment")]
    pub(crate) headers_only: bool,

    /// Repair what can be repaired without giving up any data that recovery would use
    ///
    /// This covers: what a power cut has torn; damage to segments that are already written back; a
    /// damaged copy of the superblock extension; damaged first bytes of a device that has such an
    /// extension; with --salvage, also a corrupt log.
    ///
    /// After the repair, as after a detach, the kernel module reads the same volume from the log as
    /// wb. It does not stop at a damaged segment. It does not take old data for new from a segment
    /// that is written back. The device must not be attached.
    #[arg(long, conflicts_with_all = ["segment", "headers_only"])]
    pub(crate) repair: bool,

    #[command(flatten)]
    pub(crate) salvage: SalvageOption,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,

    /// Print nothing when the device is sound, and only the verdict when it is not
    #[arg(long, conflicts_with = "json")]
    pub(crate) quiet: bool,
}
