//! What else a device holds: filesystems, partition tables, LVM, RAID and the like, as libblkid
//! knows them. It does not know cache devices.

use crate::format::printable;
use blkid::prober::{ProbeState, Prober};
use blkid::{BlkIdError, SuperblocksFlags};
use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A device could not be searched for signatures.
#[derive(Debug, thiserror::Error)]
#[error("{path}: cannot tell what the device holds: {cause}")]
pub struct SignatureError {
    /// The device.
    pub path: PathBuf,
    /// What libblkid said.
    pub cause: BlkIdError,
}

/// The signature of other software on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signature {
    /// One thing that libblkid knows.
    Known {
        /// What it is, such as "ext4 filesystem" or "gpt partition table".
        what: String,
        /// Its label, where it has one.
        label: Option<String>,
    },
    /// Several things at once.
    Ambivalent,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Signature::Known { what, label: None } => write!(f, "{what}"),
            Signature::Known { what, label: Some(label) } => {
                write!(f, "{what} labelled \"{}\"", printable(label))
            }
            Signature::Ambivalent => {
                f.write_str("signatures of several filesystems or partition tables")
            }
        }
    }
}

/// Looks for signatures of other software on a device.
///
/// # Errors
/// When the device cannot be opened or read.
pub fn find(path: &Path) -> Result<Option<Signature>, SignatureError> {
    probe(path).map_err(|cause| SignatureError { path: path.into(), cause })
}

fn probe(path: &Path) -> Result<Option<Signature>, BlkIdError> {
    // No direct I/O: libblkid reads into its own, unaligned buffers.
    let file = File::open(path)?;
    let mut prober = Prober::new()?;
    prober.set_device(file.as_raw_fd(), 0, None)?;
    prober.enable_superblocks(true)?;
    prober.set_superblocks_flags(SuperblocksFlags::DEFAULT | SuperblocksFlags::USAGE)?;
    prober.enable_partitions(true)?;
    match prober.do_safe_probe()? {
        ProbeState::NothingDetected => return Ok(None),
        ProbeState::Ambivalent => return Ok(Some(Signature::Ambivalent)),
        ProbeState::Success | ProbeState::Done => {}
    }
    let value = |name: &str| prober.lookup_value(name).ok();
    let what = match (value("TYPE"), value("PTTYPE")) {
        (Some(kind), _) => format!("{} {}", kind, usage_in_words(value("USAGE").as_deref())),
        (None, Some(table)) => format!("{table} partition table"),
        // Success without a type concerns only the device's entry in a partition table, not its
        // content.
        (None, None) => return Ok(None),
    };
    Ok(Some(Signature::Known { what, label: value("LABEL").filter(|label| !label.is_empty()) }))
}

fn usage_in_words(usage: Option<&str>) -> &'static str {
    match usage {
        Some("filesystem") => "filesystem",
        Some("raid") => "RAID or volume group member",
        Some("crypto") => "encrypted volume",
        _ => "signature",
    }
}
