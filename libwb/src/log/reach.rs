//! How far a log has come. This distinguishes an older copy of a cache from the cache.

use crate::format::SegmentId;
use std::fmt;
use uuid::Uuid;

/// How far a log has come. A power cut does not undo this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Every segment up to this one is durable.
    pub durable: SegmentId,
    /// Every segment up to this one is written back, and the superblock record says that.
    pub written_back: SegmentId,
}

/// The identity of a cache, and how far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its identity.
    pub uuid: Uuid,
    /// The generation of the newest durable page of its superblock extension.
    pub generation: u64,
    /// How far its log has come.
    pub reach: Reach,
}

impl Reach {
    /// What still holds after a salvage, which may give segments up.
    #[must_use]
    pub fn shortened(self) -> Reach {
        Reach { durable: SegmentId::NONE, ..self }
    }

    /// Whether a log with this reach is at least as new as one with the reach `known`.
    pub(super) fn covers(self, known: Reach) -> bool {
        self.durable >= known.durable && self.written_back >= known.written_back
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
