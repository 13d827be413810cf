//! How a cache is opened: what for, and what it is refused for.

use crate::cache::head::Head;
use crate::cache::tunables::Tunables;
use crate::format::SegmentId;
use crate::log::Use;
use crate::log::reach::Reach;
use crate::rules::Rules;

/// How much of a log recovery reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// As [`Reading::Headers`], of the tail of the log, if that decides. The other slots are looked
    /// at once the volume is served.
    Tail,
    /// Of segments that were durable, the headers alone. Damaged data shows when it is read.
    Headers,
    /// Everything.
    Whole,
}

/// How a cache is opened: what for, and what it is refused for.
#[derive(Clone, Debug)]
pub struct OpenOptions {
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
    /// Where the log's head lies; `None`: in memory of this process alone.
    pub(super) head: Option<Head>,
    pub(super) tunables: Tunables,
    pub(super) rules: Rules,
}

impl OpenOptions {
    fn of(reading: Reading) -> OpenOptions {
        OpenOptions {
            reading,
            until: None,
            read_only: false,
            wanted: Use::Write,
            known: None,
            mixes: false,
            head: None,
            tunables: Tunables::default(),
            rules: Rules::default(),
        }
    }

    /// To serve requests. Of segments that are written back, recovery reads nothing before the
    /// cache is open; of others that were durable, the headers alone.
    pub fn serve() -> OpenOptions {
        OpenOptions::of(Reading::Tail)
    }

    /// Reads the headers of all segments before the cache is open.
    #[must_use]
    pub fn reading_all_headers(self) -> OpenOptions {
        OpenOptions { reading: Reading::Headers, ..self }
    }

    /// To serve reads alone: neither device is written to. What recovery would write lies in
    /// memory. No other operation may be called. Tunables have no effect.
    pub fn read_only() -> OpenOptions {
        let options = OpenOptions::of(Reading::Headers);
        OpenOptions { read_only: true, wanted: Use::Read, ..options }
    }

    /// To write it back: recovery looks at all data of the log first.
    pub fn replay() -> OpenOptions {
        OpenOptions::of(Reading::Whole)
    }

    /// As [`OpenOptions::replay`], of the log as it was when a segment was the newest. Nothing is
    /// written to the cache device, so that the log is still there afterwards, to its end. The
    /// segment must be in the part of the log that is not written back.
    pub fn replay_until(segment: SegmentId) -> OpenOptions {
        OpenOptions { until: Some(segment), ..OpenOptions::replay() }
    }

    /// With these tunables, instead of the defaults.
    #[must_use]
    pub fn tunables(self, tunables: Tunables) -> OpenOptions {
        OpenOptions { tunables, ..self }
    }

    /// With the log's head in this memory. If another process has left it, what is in it is
    /// recovered, too, to the last acknowledged write.
    #[must_use]
    pub fn head(self, head: Head) -> OpenOptions {
        OpenOptions { head: Some(head), ..self }
    }

    /// Refuses a log that has not come as far as it is known to have.
    #[must_use]
    pub fn knowing(self, known: Option<Reach>) -> OpenOptions {
        OpenOptions { known, ..self }
    }

    /// Does not refuse a backing device that already holds what comes after the segment of
    /// [`OpenOptions::replay_until`], though the two make a mixture.
    #[must_use]
    pub fn mixing(self, mixes: bool) -> OpenOptions {
        OpenOptions { mixes, ..self }
    }

    /// With these rules. A test may break one of them.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn rules(self, rules: Rules) -> OpenOptions {
        OpenOptions { rules, ..self }
    }
}
