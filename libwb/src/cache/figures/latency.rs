//! How long requests take: histograms whose buckets double in width.

use crate::cache::head::{Figure, Figures};
use std::time::Duration;

/// The number of buckets of a histogram. The last one counts everything over 2^24 µs, about 17
/// seconds.
const BUCKETS: usize = 26;

/// A kind of request whose time is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
}

impl Timed {
    /// All kinds.
    pub const ALL: [Timed; 3] = [Timed::Read, Timed::Write, Timed::Flush];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Timed::Read => "read",
            Timed::Write => "write",
            Timed::Flush => "flush",
        }
    }
}

pub(crate) struct AtomicLatencies(Figures);

impl AtomicLatencies {
    pub(crate) fn of(figures: &Figures) -> AtomicLatencies {
        AtomicLatencies(figures.clone())
    }

    pub(crate) fn add(&self, kind: Timed, time: Duration) {
        self.0.add(figure(kind, bucket(time)), 1);
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.0.add(figure(kind, BUCKETS), nanoseconds);
    }

    pub(crate) fn get(&self) -> Latencies {
        Latencies(Timed::ALL.map(|kind| Histogram {
            buckets: (0..BUCKETS).map(|bucket| self.0.get(figure(kind, bucket))).collect(),
            total: Duration::from_nanos(self.0.get(figure(kind, BUCKETS))),
        }))
    }
}

/// Where a bucket is counted; the one after the last has the sum, in nanoseconds.
fn figure(kind: Timed, bucket: usize) -> Figure {
    Figure(Figure::LATENCIES + kind as usize * (BUCKETS + 1) + bucket)
}

/// The first bucket whose limit is not below the time.
fn bucket(time: Duration) -> usize {
    let microseconds = time.as_nanos().div_ceil(1000).max(1);
    let doublings = u128::BITS - (microseconds - 1).leading_zeros();
    (doublings as usize).min(BUCKETS - 1)
}

/// How many requests took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// How many took up to 1 µs, then up to 2, up to 4, and so on; the last bucket has no limit.
    /// May be empty.
    pub buckets: Vec<u64>,
    /// What all took together.
    pub total: Duration,
}

impl Histogram {
    /// How many requests were measured.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Each bucket: up to how long, and how many. The last has no limit.
    pub fn iter(&self) -> impl Iterator<Item = (Option<Duration>, u64)> {
        let last = self.buckets.len().saturating_sub(1);
        (0..).zip(&self.buckets).map(move |(nth, &count)| {
            let limit = 1u64.checked_shl(nth).filter(|_| (nth as usize) < last);
            (limit.map(Duration::from_micros), count)
        })
    }

    /// The time within which this many requests of a thousand ended: the limit of their bucket. For
    /// the last bucket it is where that begins. `None` if nothing was measured.
    pub fn per_mille(&self, share: u64) -> Option<Duration> {
        let count = u128::from(self.count());
        let wanted = (count * u128::from(share)).div_ceil(1000).max(1);
        let mut seen = 0;
        let mut longest = Duration::from_micros(1);
        for (limit, count) in self.iter() {
            longest = limit.unwrap_or(longest);
            seen += u128::from(count);
            if seen >= wanted {
                return Some(longest);
            }
        }
        None
    }

    /// What was measured since an earlier look.
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let before = earlier.buckets.iter().chain(std::iter::repeat(&0));
        Histogram {
            buckets: self
                .buckets
                .iter()
                .zip(before)
                .map(|(now, before)| now.saturating_sub(*before))
                .collect(),
            total: self.total.saturating_sub(earlier.total),
        }
    }
}

/// The times of each kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latencies([Histogram; 3]);

impl Latencies {
    /// The times of one kind.
    pub fn of(&self, kind: Timed) -> &Histogram {
        &self.0[kind as usize]
    }

    pub(crate) fn since(&self, earlier: &Latencies) -> Latencies {
        Latencies(Timed::ALL.map(|kind| self.of(kind).since(earlier.of(kind))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn a_bucket_takes_times_up_to_its_limit() {
        let head = crate::cache::Head::create().unwrap();
        let all = AtomicLatencies::of(&Figures::of(head));
        let times = [
            Duration::ZERO,
            US,
            US + Duration::from_nanos(1),
            2 * US,
            3 * US,
            4 * US,
            Duration::from_secs(3600),
        ];
        for time in times {
            all.add(Timed::Write, time);
        }
        let latencies = all.get();
        let write = latencies.of(Timed::Write);
        assert_eq!(write.buckets[..4], [2, 2, 2, 0]);
        assert_eq!((write.count(), write.buckets.last()), (7, Some(&1)));
        assert_eq!(write.total, times.iter().sum::<Duration>());
        assert_eq!(latencies.of(Timed::Read).count(), 0);
        let limits: Vec<_> = write.iter().map(|(limit, _)| limit).collect();
        assert_eq!((limits[2], limits[BUCKETS - 1]), (Some(4 * US), None));
    }

    #[test]
    fn percentiles_are_the_limits_of_their_buckets() {
        let mut buckets = vec![0; BUCKETS];
        assert_eq!(
            Histogram { buckets: buckets.clone(), ..Histogram::default() }.per_mille(500),
            None
        );
        (buckets[3], buckets[10], buckets[BUCKETS - 1]) = (98, 1, 1);
        let histogram = Histogram { buckets, ..Histogram::default() };
        let found = [500, 980, 981, 990, 999].map(|share| histogram.per_mille(share).unwrap() / 8);
        assert_eq!(found, [US, US, 128 * US, 128 * US, (1 << 21) * US]);
        assert_eq!(histogram.since(&histogram).count(), 0);
    }
}
