//! Why a log cannot be read or trusted.

use super::bounds::Beyond;
use super::corruption::Corruption;
use super::reach::Reach;
use crate::device::{Device, DeviceError};
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
        "{device}: segment {until} is no point that the log can be replayed until; give one from \
         {first}, up to which all is written back, to {last}, the newest"
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
    /// The log has not come as far as it is known to have.
    #[error("{device}: is older than it was: {found}; it was {known}")]
    Older {
        /// The cache device.
        device: String,
        /// How far it has come.
        found: Reach,
        /// How far it is known to have come.
        known: Reach,
    },
    /// The backing device holds what comes after the point until which the log is to be replayed.
    #[error(
        "{backing}: holds what segment {segment} wrote already, which comes after {until}: an \
         earlier replay went further, or more was written back than is recorded. A replay undoes \
         nothing, so this would make a mixture of both"
    )]
    Ahead {
        /// The backing device.
        backing: String,
        /// The point.
        until: SegmentId,
        /// The first segment after it that wrote anything.
        segment: SegmentId,
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
        "{device}: was written by a newer version of wb, with features (flags {flags:#x}) that \
         this one does not know"
    )]
    UnknownFeatures {
        /// The cache device.
        device: String,
        /// The flags that are not known.
        flags: u32,
    },
    /// The superblock extension has features without which the device must not be written.
    #[error(
        "{device}: was written by a newer version of wb, with features (flags {flags:#x}) that \
         this one does not know. It can be read, but not written: use the newer version"
    )]
    ReadOnlyFeatures {
        /// The cache device.
        device: String,
        /// The flags that are not known.
        flags: u32,
    },
    /// The superblock extension has another version.
    #[error(
        "{device}: carries version {version} of wb's extension, and this program knows version 1 \
         alone: use a newer one"
    )]
    UnknownVersion {
        /// The cache device.
        device: String,
        /// The version.
        version: u32,
    },
    /// The cache device had another size when it was formatted.
    #[error(
        "{device}: was formatted with {formatted} bytes, but has {found}: it was truncated or \
         resized. Give it its old size back"
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
        corruption: Vec<Corruption>,
    },
    /// Most of the log lies where it cannot have been written.
    #[error(
        "{device}: the log is corrupt: most of its segments are sound but belong elsewhere, so \
         the device was truncated or resized. Give it its old size back"
    )]
    Misplaced {
        /// The cache device.
        device: String,
    },
    /// There is no way on with a corrupt log that recovery would accept.
    #[error(
        "{device}: the log is damaged in a way that --salvage does not know. Copy the device, and \
         see with wbdump what can still be read"
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
    /// An entry of the log lies outside the backing device.
    #[error(
        "{device}: {}; is it the right backing device? If it was made smaller, give it its old size back",
        beyond.in_words(format_args!("the backing device {backing}"), *sectors)
    )]
    BeyondBacking {
        /// The cache device.
        device: String,
        /// The entry.
        beyond: Beyond,
        /// The backing device.
        backing: String,
        /// How many sectors it has.
        sectors: u64,
    },
    /// A segment that the scan found valid has changed since.
    #[error(
        "{device}: segment {id} cannot be read again as it was found: another program writes to \
         the device, or it is failing"
    )]
    Changed {
        /// The cache device.
        device: String,
        /// The segment.
        id: SegmentId,
    },
}

impl LogError {
    /// Whether [`salvage`](super::salvage) may go on where this stopped.
    pub fn is_corruption(&self) -> bool {
        match self {
            LogError::Corrupt { .. } => true,
            LogError::Superblock { fault, .. } => fault.record().is_some(),
            _ => false,
        }
    }
}

/// Refuses a log that has not come as far as it is known to have.
///
/// # Errors
/// [`LogError::Older`], in the name of the device that the log lies on.
pub(crate) fn refuse_older(device: &Device, found: Reach, known: Reach) -> Result<(), LogError> {
    if found.covers(known) {
        return Ok(());
    }
    Err(LogError::Older { device: device.name().to_string(), found, known })
}

fn list(corruption: &[Corruption]) -> String {
    const SHOWN: usize = 3;
    let mut text: Vec<String> = corruption.iter().take(SHOWN).map(ToString::to_string).collect();
    if corruption.len() > SHOWN {
        text.push(format!("and {} more", corruption.len() - SHOWN));
    }
    text.join("; ")
}
