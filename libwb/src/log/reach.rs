//! How far a log has come, by which an older copy of a cache is told from the cache.

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
    /// As far as it is known of a log after a salvage, which may give segments up.
    #[must_use]
    pub fn shortened(self) -> Reach {
        Reach { durable: SegmentId::NONE, ..self }
    }

    /// Whether a log that has come so far is not older than one that has come as far as `known`.
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
