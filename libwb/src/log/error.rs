//! Why a log cannot be read or trusted.

use super::bounds::Beyond;
use super::corruption::Corruption;
use super::reach::Reach;
use crate::device::{Device, DeviceError};
use crate::format::{GeometryError, SegmentId, SuperblockFault};
use std::fmt;

/// Why a log cannot be read or trusted.
#[derive(Clone, Debug)]
pub struct LogError {
    /// The device at fault: the cache device, unless the kind says otherwise.
    pub device: String,
    /// What is wrong.
    pub kind: LogErrorKind,
}

impl LogError {
    /// An error of a device.
    pub fn new(device: &Device, kind: LogErrorKind) -> LogError {
        LogError { device: device.name().to_string(), kind }
    }

    /// Whether [`salvage`](super::salvage) may go on where this stopped.
    pub fn is_corruption(&self) -> bool {
        match &self.kind {
            LogErrorKind::Corrupt { .. } => true,
            LogErrorKind::Superblock { fault } => fault.record().is_some(),
            _ => false,
        }
    }
}

impl fmt::Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            // It names the device itself.
            LogErrorKind::Device(error) => error.fmt(f),
            kind => write!(f, "{}: {kind}", self.device),
        }
    }
}

impl std::error::Error for LogError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

impl From<DeviceError> for LogError {
    fn from(error: DeviceError) -> LogError {
        LogError { device: error.device.to_string(), kind: LogErrorKind::Device(error) }
    }
}

/// What is wrong with a log.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogErrorKind {
    /// The device failed.
    #[error(transparent)]
    Device(DeviceError),
    /// The device's size cannot be a cache device's.
    #[error("{fault}")]
    Geometry {
        /// What is wrong with the size.
        fault: GeometryError,
    },
    /// The log cannot be replayed as far as that alone.
    #[error(
        "segment {until} is no point that the log can be replayed until; give one from \
         {first}, up to which all is written back, to {last}, the newest"
    )]
    NoSuchPoint {
        /// What was asked for.
        until: SegmentId,
        /// The earliest.
        first: SegmentId,
        /// The latest.
        last: SegmentId,
    },
    /// The log has not come as far as it is known to have.
    #[error("is older than it was: {found}; it was {known}")]
    Older {
        /// How far it has come.
        found: Reach,
        /// How far it is known to have come.
        known: Reach,
    },
    /// The backing device holds what comes after the point until which the log is to be replayed.
    #[error(
        "holds what segment {segment} wrote already, which comes after {until}: an \
         earlier replay went further, or more was written back than is recorded. A replay undoes \
         nothing, so this would make a mixture of both"
    )]
    Ahead {
        /// The point.
        until: SegmentId,
        /// The first segment after it that wrote anything.
        segment: SegmentId,
    },
    /// The superblock or its record is wrong.
    #[error("{fault}")]
    Superblock {
        /// What is wrong with it.
        fault: SuperblockFault,
    },
    /// The superblock extension has features that this version does not know.
    #[error(
        "was written by a newer version of wb, with features (flags {flags:#x}) that \
         this one does not know"
    )]
    UnknownFeatures {
        /// The flags that are not known.
        flags: u32,
    },
    /// The superblock extension has features without which the device must not be written.
    #[error(
        "was written by a newer version of wb, with features (flags {flags:#x}) that \
         this one does not know. It can be read, but not written: use the newer version"
    )]
    ReadOnlyFeatures {
        /// The flags that are not known.
        flags: u32,
    },
    /// The superblock extension has another version.
    #[error(
        "carries version {version} of wb's extension, and this program knows version 1 \
         alone: use a newer one"
    )]
    UnknownVersion {
        /// The version.
        version: u32,
    },
    /// The cache device had another size when it was formatted.
    #[error(
        "was formatted with {formatted} bytes, but has {found}: it was truncated or \
         resized. Give it its old size back"
    )]
    Resized {
        /// Its size then, in bytes.
        formatted: u64,
        /// Its size now, in bytes.
        found: u64,
    },
    /// The cache belongs to another backing device.
    #[error("belongs to another backing device than {backing}: {difference}")]
    WrongBacking {
        /// The backing device that was given.
        backing: String,
        /// How it can be told.
        difference: String,
    },
    /// The log is damaged in a way that a power cut does not explain.
    #[error("the log is corrupt: {}", list(corruption))]
    Corrupt {
        /// What was found, at least one.
        corruption: Vec<Corruption>,
    },
    /// Most of the log lies where it cannot have been written.
    #[error(
        "the log is corrupt: most of its segments are sound but belong elsewhere, so \
         the device was truncated or resized. Give it its old size back"
    )]
    Misplaced,
    /// There is no way on with a corrupt log that recovery would accept.
    #[error(
        "the log is damaged in a way that --salvage does not know. Copy the device, and \
         see with wbdump what can still be read"
    )]
    Unsalvageable,
    /// The device carries the extension already.
    #[error("carries wb's extension already; there is nothing to upgrade")]
    Extended,
    /// An entry of the log lies outside the backing device.
    #[error(
        "{}; is it the right backing device? If it was made smaller, give it its old size back",
        beyond.in_words(format_args!("the backing device {backing}"), *sectors)
    )]
    BeyondBacking {
        /// The entry.
        beyond: Beyond,
        /// The backing device.
        backing: String,
        /// How many sectors it has.
        sectors: u64,
    },
    /// A segment that the scan found valid has changed since.
    #[error(
        "segment {id} cannot be read again as it was found: another program writes to \
         the device, or it is failing"
    )]
    Changed {
        /// The segment.
        id: SegmentId,
    },
}

/// Refuses a log that has not come as far as it is known to have.
///
/// # Errors
/// [`LogErrorKind::Older`], in the name of the device that the log lies on.
pub(crate) fn refuse_older(device: &Device, found: Reach, known: Reach) -> Result<(), LogError> {
    if found.covers(known) {
        return Ok(());
    }
    Err(LogError::new(device, LogErrorKind::Older { found, known }))
}

fn list(corruption: &[Corruption]) -> String {
    const SHOWN: usize = 3;
    let mut text: Vec<String> = corruption.iter().take(SHOWN).map(ToString::to_string).collect();
    if corruption.len() > SHOWN {
        text.push(format!("and {} more", corruption.len() - SHOWN));
    }
    text.join("; ")
}
