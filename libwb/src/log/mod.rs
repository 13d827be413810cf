//! The log as it lies on a cache device: making an empty one, reading what is there, and putting right what is damaged.

pub mod create;
pub(crate) mod handover;
pub mod history;
pub mod live;
pub mod recovery;
#[cfg(test)]
mod rig;
pub mod salvage;
pub mod scan;
pub mod upgrade;

use crate::device::DeviceError;
use crate::format::{GeometryError, SegmentId, SuperblockFault};

/// Why a log cannot be read or trusted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LogError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device's size cannot be a cache device's.
    #[error("{device}: {fault}")]
    Geometry {
        /// The cache device.
        device: String,
        /// What is wrong with the size.
        fault: GeometryError,
    },
    /// The log cannot be replayed as far as that alone.
    #[error(
        "{device}: segment {until} is no point that the log can be replayed until; give one from {first}, up to which \
         all is written back, to {last}, the newest"
    )]
    NoSuchPoint {
        /// The cache device.
        device: String,
        /// What was asked for.
        until: SegmentId,
        /// The earliest.
        first: SegmentId,
        /// The latest.
        last: SegmentId,
    },
    /// The superblock or its record is wrong.
    #[error("{device}: {fault}")]
    Superblock {
        /// The cache device.
        device: String,
        /// What is wrong with it.
        fault: SuperblockFault,
    },
    /// The superblock extension has features that this version does not know.
    #[error(
        "{device}: was written by a newer version of wb, with features (flags {flags:#x}) that this one does not know"
    )]
    UnknownFeatures {
        /// The cache device.
        device: String,
        /// The flags that are not known.
        flags: u32,
    },
    /// No copy of the superblock extension is sound.
    #[error(
        "{device}: both copies of the superblock extension are damaged, so that it cannot be told to which cache and backing device its segments belong. Nothing can go on safely: copy the device, and see with wbdump what it holds"
    )]
    ExtensionDamaged {
        /// The cache device.
        device: String,
    },
    /// The cache device had another size when it was formatted.
    #[error(
        "{device}: was formatted with {formatted} bytes, but has {found}: it was truncated or resized. Give it its old size back"
    )]
    Resized {
        /// The cache device.
        device: String,
        /// Its size then, in bytes.
        formatted: u64,
        /// Its size now, in bytes.
        found: u64,
    },
    /// The cache belongs to another backing device.
    #[error("{device}: belongs to another backing device than {backing}: {difference}")]
    WrongBacking {
        /// The cache device.
        device: String,
        /// The backing device that was given.
        backing: String,
        /// How it can be told.
        difference: String,
    },
    /// The log is damaged in a way that a power cut does not explain.
    #[error("{device}: the log is corrupt: {}", list(corruption))]
    Corrupt {
        /// The cache device.
        device: String,
        /// What was found, at least one.
        corruption: Vec<recovery::Corruption>,
    },
    /// Most of the log lies where it cannot have been written.
    #[error(
        "{device}: the log is corrupt: most of its segments are sound but belong elsewhere, so the device was truncated or resized. Give it its old size back"
    )]
    Misplaced {
        /// The cache device.
        device: String,
    },
    /// There is no way on with a corrupt log that recovery would accept.
    #[error(
        "{device}: the log is damaged in a way that --salvage does not know. Copy the device, and see with wbdump what can still be read"
    )]
    Unsalvageable {
        /// The cache device.
        device: String,
    },
    /// The device carries the extension already.
    #[error("{device}: carries wb's extension already; there is nothing to upgrade")]
    Extended {
        /// The cache device.
        device: String,
    },
    /// The superblock extension is gone, but segments with the extension are there.
    #[error(
        "{device}: segment {id} was written by wb, so the device had the extension and lost it. Write the cache back with wbctl replay, then format it"
    )]
    ExtensionLost {
        /// The cache device.
        device: String,
        /// Such a segment.
        id: SegmentId,
    },
    /// An entry of the log lies outside the backing device.
    #[error(
        "{device}: segment {id} holds data for sector {sector}, but the backing device {backing} has only {sectors} sectors; is it the right backing device? If it was made smaller, give it its old size back"
    )]
    BeyondBacking {
        /// The cache device.
        device: String,
        /// The segment.
        id: SegmentId,
        /// A dirty sector of it that lies outside.
        sector: crate::format::Sector,
        /// The backing device.
        backing: String,
        /// How many sectors it has.
        sectors: u64,
    },
    /// A segment that the scan found valid has changed since.
    #[error(
        "{device}: segment {id} cannot be read again as it was found: another program writes to the device, or it is failing"
    )]
    Changed {
        /// The cache device.
        device: String,
        /// The segment.
        id: SegmentId,
    },
}

impl LogError {
    /// Whether [`salvage`] may go on where this stopped.
    pub fn is_corruption(&self) -> bool {
        match self {
            LogError::Corrupt { .. } => true,
            LogError::Superblock { fault, .. } => matches!(fault, SuperblockFault::GarbageRecord { .. }),
            _ => false,
        }
    }
}

fn list(corruption: &[recovery::Corruption]) -> String {
    const SHOWN: usize = 3;
    let mut text: Vec<String> = corruption.iter().take(SHOWN).map(ToString::to_string).collect();
    if corruption.len() > SHOWN {
        text.push(format!("and {} more", corruption.len() - SHOWN));
    }
    text.join("; ")
}
