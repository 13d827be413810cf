//! The throughput of write-back in the last minute. Only time in which a batch was active counts.

use std::collections::VecDeque;
use std::time::Duration;

/// How many seconds count.
const SECONDS: u64 = 60;

/// What was written back, second by second.
#[derive(Default)]
pub(crate) struct Rate {
    /// Newest last, none older than [`SECONDS`] when the newest was added.
    seconds: VecDeque<Second>,
    /// A batch is under way, and its time is counted up to this moment.
    since: Option<Duration>,
}

/// What was done in a second, or in the time before that was not counted yet.
struct Second {
    number: u64,
    bytes: u64,
    blocks: u64,
    busy: Duration,
}

/// How fast write-back is while it works.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Bytes written to the backing device in a second.
    pub bytes_per_second: f64,
    /// How long a block takes, however few of its sectors are dirty.
    pub per_block: Duration,
}

impl Rate {
    /// A batch begins.
    pub(crate) fn begin(&mut self, now: Duration) {
        self.since = Some(now);
    }

    /// So much of it has been written.
    pub(crate) fn wrote(&mut self, bytes: u64, blocks: u64, now: Duration) {
        self.work(now);
        let second = self.second(now);
        second.bytes += bytes;
        second.blocks += blocks;
    }

    /// It has ended, well or not.
    pub(crate) fn end(&mut self, now: Duration) {
        self.work(now);
        self.since = None;
    }

    /// Whether a batch is under way.
    pub(crate) fn is_working(&self) -> bool {
        self.since.is_some()
    }

    /// How fast that was; `None` where nothing was written in the last minute.
    pub(crate) fn pace(&self, now: Duration) -> Option<Pace> {
        let counted = self.seconds.iter().filter(|second| second.number + SECONDS > now.as_secs());
        let (mut bytes, mut blocks) = (0, 0);
        let mut busy = self.since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        for second in counted {
            bytes += second.bytes;
            blocks += second.blocks;
            busy += second.busy;
        }
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        let is_known = bytes > 0 && blocks > 0 && !busy.is_zero();
        is_known.then(|| Pace {
            bytes_per_second: bytes as f64 / busy.as_secs_f64(),
            per_block: busy / blocks,
        })
    }

    /// Counts the time since the last count, if a batch is under way.
    fn work(&mut self, now: Duration) {
        if let Some(since) = self.since.replace(now) {
            self.second(now).busy += now.saturating_sub(since);
        } else {
            self.since = None;
        }
    }

    fn second(&mut self, now: Duration) -> &mut Second {
        let number = now.as_secs();
        while self.seconds.front().is_some_and(|oldest| oldest.number + SECONDS <= number) {
            self.seconds.pop_front();
        }
        if self.seconds.back().is_none_or(|newest| newest.number < number) {
            self.seconds.push_back(Second { number, bytes: 0, blocks: 0, busy: Duration::ZERO });
        }
        let newest = self.seconds.len() - 1;
        &mut self.seconds[newest]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_rate_is_of_the_last_minute_and_of_the_time_at_work() {
        let mut rate = Rate::default();
        assert_eq!(rate.pace(SECOND), None);
        // A slow batch, long ago.
        rate.begin(SECOND);
        rate.wrote(1000, 1, SECOND * 10);
        rate.end(SECOND * 11);
        assert_eq!(rate.pace(SECOND * 11).map(|pace| pace.bytes_per_second), Some(100.0));
        assert_eq!(rate.pace(SECOND * 100), None);
        // Half a minute of work, and as much of rest.
        for n in 0..30 {
            let at = SECOND * (100 + 2 * n);
            rate.begin(at);
            assert!(rate.is_working());
            rate.wrote(4096 + 512, 2, at + SECOND / 2);
            rate.end(at + SECOND);
            assert!(!rate.is_working());
        }
        let pace = rate.pace(SECOND * 160).expect("there was work");
        assert!((pace.bytes_per_second - 4608.0).abs() < 100.0, "{pace:?}");
        assert!(pace.per_block.abs_diff(SECOND / 2) < SECOND / 50, "{pace:?}");
        assert!(rate.seconds.len() <= 61, "{}", rate.seconds.len());
    }

    #[test]
    fn a_batch_that_does_not_get_on_makes_the_rate_fall() {
        let mut rate = Rate::default();
        rate.begin(SECOND);
        rate.wrote(1000, 1, SECOND * 2);
        let now = |at| rate.pace(SECOND * at).map(|pace| pace.bytes_per_second);
        assert_eq!((now(2), now(21)), (Some(1000.0), Some(50.0)));
    }
}
