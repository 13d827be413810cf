//! What a cache has counted since its counters started anew.

use super::accesses::Accesses;
use super::counters::Counters;
use super::latency::Latencies;
use parking_lot::Mutex;
use std::time::Duration;

/// All that was counted in a time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// How long was counted.
    pub time: Duration,
    /// What has happened.
    pub counters: Counters,
    /// What requests found in the cache.
    pub accesses: Accesses,
    /// How long requests took.
    pub latencies: Latencies,
}

impl Statistics {
    fn since(&self, earlier: &Statistics) -> Statistics {
        Statistics {
            time: self.time - earlier.time,
            counters: self.counters.since(&earlier.counters),
            accesses: self.accesses.since(&earlier.accesses),
            latencies: self.latencies.since(&earlier.latencies),
        }
    }
}

/// The values of the counters at the last reset. A reset does not change the counters themselves,
/// because the engine relies on some of them.
pub(crate) struct Baseline(Mutex<Statistics>);

impl Baseline {
    /// Counters start at this time.
    pub(crate) fn at(time: Duration) -> Baseline {
        Baseline(Mutex::new(Statistics { time, ..Statistics::default() }))
    }
}

impl Baseline {
    /// Lets the counters start anew, from what was counted by now.
    pub(crate) fn set(&self, counted: impl FnOnce() -> Statistics) {
        let mut baseline = self.0.lock();
        *baseline = counted();
    }

    /// What was counted since.
    pub(crate) fn since(&self, counted: impl FnOnce() -> Statistics) -> Statistics {
        // The baseline first: what is counted meanwhile is no less.
        let baseline = self.0.lock();
        counted().since(&baseline)
    }
}
