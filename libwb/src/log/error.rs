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

    /// Whether a [`salvage`](super::salvage) may help.
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
    /// A cache device cannot have this size.
    #[error("{fault}")]
    Geometry {
        /// What is wrong with the size.
        fault: GeometryError,
    },
    /// The log cannot be replayed until this point.
    #[error(
        "the log cannot be replayed until segment {until}; give a segment from {first} (all up \
         to it is written back) to {last} (the newest)"
    )]
    NoSuchPoint {
        /// The point requested.
        until: SegmentId,
        /// The earliest possible point.
        first: SegmentId,
        /// The latest possible point.
        last: SegmentId,
    },
    /// The log is older than it was when wb saw it last.
    #[error("is older than it was: {found}; it was {known}")]
    Older {
        /// How far the log has come.
        found: Reach,
        /// How far it had come before.
        known: Reach,
    },
    /// The backing device, which is the device of this error, already holds writes from after the
    /// point of the replay.
    #[error(
        "already holds what segment {segment} wrote, which comes after segment {until}: an earlier \
         replay went further, or more was written back than the record says. A replay undoes \
         nothing, so the result would be a mixture of both"
    )]
    Ahead {
        /// The point.
        until: SegmentId,
        /// The first segment after it whose writes the backing device holds.
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
        "was written by a newer version of wb, with features (flags {flags:#x}) that this one \
         does not know"
    )]
    UnknownFeatures {
        /// The flags that are not known.
        flags: u32,
    },
    /// The superblock extension has features that a program must know to write to the device.
    #[error(
        "was written by a newer version of wb, with features (flags {flags:#x}) that this one \
         does not know. This one can read the device, but not write to it: use the newer version"
    )]
    ReadOnlyFeatures {
        /// The flags that are not known.
        flags: u32,
    },
    /// The superblock extension has another version.
    #[error(
        "carries version {version} of wb's extension, and this program knows only version 1: use \
         a newer one"
    )]
    UnknownVersion {
        /// The version.
        version: u32,
    },
    /// The cache device was resized after it was formatted.
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
        /// The backing device given.
        backing: String,
        /// What shows it.
        difference: String,
    },
    /// No power cut explains the damage to the log.
    #[error("the log is corrupt: {}", list(corruption))]
    Corrupt {
        /// What was found, at least one.
        corruption: Vec<Corruption>,
    },
    /// Most segments lie where wb cannot have written them.
    #[error(
        "the log is corrupt: most of its segments are sound but belong elsewhere, so \
         the device was truncated or resized. Give it its old size back"
    )]
    Misplaced,
    /// No salvage makes a log that recovery accepts.
    #[error(
        "the log is damaged in a way that --salvage cannot handle. Copy the device, and see with \
         wbdump what can still be read"
    )]
    Unsalvageable,
    /// The device carries the extension already.
    #[error("carries wb's extension already; there is nothing to upgrade")]
    Extended,
    /// An entry of the log lies beyond the end of the backing device.
    #[error(
        "{}; is it the right backing device? If it was made smaller, give it its old size \
         back",
        beyond.text(format_args!("the backing device {backing}"), *sectors)
    )]
    BeyondBacking {
        /// The entry.
        beyond: Beyond,
        /// The backing device.
        backing: String,
        /// Its size in sectors.
        sectors: u64,
    },
    /// A segment has changed since the scan found it valid.
    #[error(
        "segment {id} has changed since it was read: another program writes to the device, or the \
         device is failing"
    )]
    Changed {
        /// The segment.
        id: SegmentId,
    },
}

/// Refuses a log that is older than `known`.
///
/// # Errors
/// [`LogErrorKind::Older`].
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
