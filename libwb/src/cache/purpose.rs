//! What a cache is opened for.

use crate::format::SegmentId;
use crate::log::Use;
use crate::log::reach::Reach;
use crate::planted::Planted;

/// How much of a log recovery reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// Of segments that were durable, the headers alone. Damaged data shows when it is read.
    Headers,
    /// Everything.
    Whole,
}

/// What a cache is opened for, and what it is refused for.
#[derive(Clone, Copy, Debug)]
pub struct Purpose {
    pub(super) reading: Reading,
    /// The segment that counts as the newest, where that is not the newest that recovery finds.
    pub(super) until: Option<SegmentId>,
    /// Reads alone: no background task is started.
    pub(super) read_only: bool,
    /// What the cache device is wanted for.
    pub(super) wanted: Use,
    /// How far the log is known to have come.
    pub(super) known: Option<Reach>,
    /// The backing device may hold what comes after `until`.
    pub(super) mixes: bool,
    pub(super) planted: Planted,
}

impl Purpose {
    fn of(reading: Reading) -> Purpose {
        let planted = Planted::default();
        Purpose {
            reading,
            until: None,
            read_only: false,
            wanted: Use::Write,
            known: None,
            mixes: false,
            planted,
        }
    }

    /// To serve requests. Of segments that were durable, recovery reads the headers alone.
    pub fn serve() -> Purpose {
        Purpose::of(Reading::Headers)
    }

    /// To serve reads alone: neither device is written to. What recovery would write lies in
    /// memory. Of the other operations, none may be called.
    pub fn read_only() -> Purpose {
        Purpose { read_only: true, wanted: Use::Read, ..Purpose::serve() }
    }

    /// To write it back: recovery looks at all data of the log first.
    pub fn replay() -> Purpose {
        Purpose::of(Reading::Whole)
    }

    /// As [`Purpose::replay`], of the log as it was when a segment was the newest. Nothing is
    /// written to the cache device, so that the log is still there afterwards, to its end. The
    /// segment must be in the part of the log that is not written back.
    pub fn replay_until(segment: SegmentId) -> Purpose {
        Purpose { until: Some(segment), ..Purpose::replay() }
    }

    /// A log that has not come as far as it is known to have is refused.
    #[must_use]
    pub fn knowing(self, known: Option<Reach>) -> Purpose {
        Purpose { known, ..self }
    }

    /// A backing device that already holds what comes after the segment of
    /// [`Purpose::replay_until`] is not refused, though the two make a mixture.
    #[must_use]
    pub fn mixing(self, mixes: bool) -> Purpose {
        Purpose { mixes, ..self }
    }

    #[cfg(feature = "sim")]
    pub(super) fn with(self, planted: Planted) -> Purpose {
        Purpose { planted, ..self }
    }
}
