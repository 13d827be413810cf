//! What a cache has counted since its counters started anew.

use super::accesses::{Accesses, CountedAccesses};
use super::counters::{AtomicCounters, Counters};
use super::latency::{AtomicLatencies, Latencies};
use crate::cache::head::{Figure, Figures};
use crate::runtime::Runtime;
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
            time: self.time.saturating_sub(earlier.time),
            counters: self.counters.since(&earlier.counters),
            accesses: self.accesses.since(&earlier.accesses),
            latencies: self.latencies.since(&earlier.latencies),
        }
    }
}

/// The values of the counters at the last reset. A reset does not change the counters themselves,
/// because the engine relies on some of them.
pub(crate) struct Baseline {
    now: Figures,
    then: Figures,
    /// Held while the values change.
    begun: Mutex<Begun>,
}

/// When the counters started anew.
struct Begun {
    /// By the clock of this process, or when the process began.
    at: Duration,
    /// How long before that, in an earlier process.
    before: Duration,
}

impl Baseline {
    /// That of a cache that is opened now. Where an earlier process has counted, the counters go
    /// on.
    pub(crate) fn of(figures: &Figures, runtime: &dyn Runtime) -> Baseline {
        let (now, then) = (figures.clone(), figures.baseline());
        let time = runtime.wall_clock();
        if then.get(Figure::SINCE) == 0 {
            then.set(Figure::SINCE, milliseconds(time));
        }
        let before = time.saturating_sub(Duration::from_millis(then.get(Figure::SINCE)));
        Baseline { now, then, begun: Mutex::new(Begun { at: runtime.now(), before }) }
    }

    /// Lets the counters start anew.
    pub(crate) fn set(&self, runtime: &dyn Runtime) {
        let mut begun = self.begun.lock();
        *begun = Begun { at: runtime.now(), before: Duration::ZERO };
        let time = runtime.wall_clock();
        for figure in (0..Figures::COUNT).map(Figure) {
            self.then.set(figure, self.now.get(figure));
        }
        self.then.set(Figure::SINCE, milliseconds(time));
    }

    /// What was counted since.
    pub(crate) fn since(&self, counted: impl FnOnce() -> Statistics) -> Statistics {
        // The baseline first: what is counted meanwhile is no less.
        let begun = self.begun.lock();
        let then = Statistics {
            time: begun.at,
            counters: AtomicCounters::of(&self.then).get(),
            accesses: CountedAccesses::of(&self.then).get(),
            latencies: AtomicLatencies::of(&self.then).get(),
        };
        let mut since = counted().since(&then);
        since.time += begun.before;
        since
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
