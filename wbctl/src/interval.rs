//! The activity of a volume between two samples of its status.

use libwb::cache::Histogram;
use libwb::control::{AccessCount, LiveStatus, hit_ratio};
use std::time::Duration;

/// Two samples; or one, which covers all time since the counters were reset.
pub(crate) struct Interval<'a> {
    now: &'a LiveStatus,
    before: Option<&'a LiveStatus>,
}

impl<'a> Interval<'a> {
    /// If the counters were reset between the samples, the interval covers the time since the
    /// reset.
    pub(crate) fn between(before: Option<&'a LiveStatus>, now: &'a LiveStatus) -> Interval<'a> {
        Interval { now, before: before.filter(|before| !is_anew(now, before)) }
    }

    /// The rate of a counter per second; `None` for an empty interval.
    pub(crate) fn rate(&self, counter: &str) -> Option<f64> {
        let seconds = self.now.statistics.seconds
            - self.before.map_or(0.0, |before| before.statistics.seconds);
        (seconds > 0.0).then(|| self.counted(counter) as f64 / seconds)
    }

    /// How much a counter has counted.
    pub(crate) fn counted(&self, counter: &str) -> u64 {
        let count = |live: &LiveStatus| live.counters.get(counter).copied().unwrap_or(0);
        count(self.now).saturating_sub(self.before.map_or(0, count))
    }

    /// The latency that `per_mille` of a thousand requests did not exceed.
    pub(crate) fn latency(&self, request: &str, per_mille: u64) -> Option<Duration> {
        let histogram = |live: &LiveStatus| -> Option<Histogram> {
            live.statistics.latencies.get(request).map(|latency| latency.histogram())
        };
        let taken = histogram(self.now).unwrap_or_default();
        taken.since(&self.before.and_then(histogram).unwrap_or_default()).per_mille(per_mille)
    }

    /// The share of the blocks touched by requests of a kind that the cache held.
    pub(crate) fn hits(&self, request: &str) -> Option<f64> {
        let mut met: Vec<AccessCount> = self.now.statistics.accesses.clone();
        if let Some(before) = self.before {
            for (now, before) in met.iter_mut().zip(&before.statistics.accesses) {
                now.blocks = now.blocks.saturating_sub(before.blocks);
            }
        }
        hit_ratio(&met, request)
    }
}

/// The share of the log that is not free, from 0 to 1.
pub(crate) fn log_in_use(live: &LiveStatus) -> Option<f64> {
    (live.log_bytes > 0).then(|| 1.0 - live.free_bytes as f64 / live.log_bytes as f64)
}

/// Whether the counters were reset between two samples.
fn is_anew(now: &LiveStatus, before: &LiveStatus) -> bool {
    let less = now
        .counters
        .iter()
        .any(|(key, value)| before.counters.get(key).is_some_and(|was| value < was));
    less || now.pid != before.pid || now.statistics.seconds < before.statistics.seconds
}
