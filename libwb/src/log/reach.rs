//! How far a log has come, by which an older copy of a cache is told from the cache.

use super::LogError;
use super::recovery::Recovery;
use crate::device::Device;
use crate::format::SegmentId;
use std::fmt;
use uuid::Uuid;

/// How far a log has come for good: a power cut does not take it back behind this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Every segment up to this one survives a power cut.
    pub durable: SegmentId,
    /// Every segment up to this one is written back, and the superblock record says so.
    pub written_back: SegmentId,
}

/// Which cache it is, and how far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its identity.
    pub uuid: Uuid,
    /// The generation of its newest page of the superblock extension that is durable.
    pub generation: u64,
    /// How far its log has come.
    pub reach: Reach,
}

impl Reach {
    /// How far recovery finds that a log has come.
    pub(crate) fn of(recovery: &Recovery) -> Reach {
        let (written_back, durable) = recovery.points().into_inner();
        Reach { durable, written_back }
    }

    /// As far as it is known of a log after a salvage, which may give segments up.
    #[must_use]
    pub fn shortened(self) -> Reach {
        Reach { durable: SegmentId::NONE, ..self }
    }

    /// Refuses a log that has not come as far as this.
    ///
    /// # Errors
    /// [`LogError::Older`], in the name of the device that the log lies on.
    pub(crate) fn refuse_older(self, device: &Device, found: Reach) -> Result<(), LogError> {
        if found.durable >= self.durable && found.written_back >= self.written_back {
            return Ok(());
        }
        Err(LogError::Older { device: device.name().to_string(), found, known: self })
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "durable up to segment {}, written back up to segment {}",
            self.durable, self.written_back
        )
    }
}
