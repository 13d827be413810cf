//! Writes that a lost connection had under way. The server may still carry them out, late.

use std::ops::Range;
use std::time::Duration;

/// How long after a new connection stands a server may still carry out what it got over an older
/// one.
pub(super) const LATEST: Duration = Duration::from_secs(5);

/// Which writes may still come late.
#[derive(Default)]
pub(super) struct LateWrites {
    /// Where, and of which operation.
    writes: Vec<(Range<u64>, Option<u64>)>,
    until: Option<Duration>,
}

impl LateWrites {
    /// A write under way has lost its connection. `operation` is none if it wrote remembered data
    /// again.
    pub(super) fn add(&mut self, range: Range<u64>, operation: Option<u64>) {
        self.until = None;
        let write = (range, operation);
        if !self.writes.contains(&write) {
            self.writes.push(write);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Whether an operation may write to a range: no other write can come late there. One that
    /// itself comes late writes the same data.
    pub(super) fn allow(&self, range: &Range<u64>, operation: u64) -> bool {
        self.writes.iter().all(|(late, of)| {
            *of == Some(operation) || late.end <= range.start || range.end <= late.start
        })
    }

    /// A new connection stands.
    pub(super) fn reconnected(&mut self, now: Duration) {
        self.until = Some(now + LATEST);
    }

    /// Forgets those that can come no more.
    pub(super) fn pass(&mut self, now: Duration) {
        if self.until.is_some_and(|until| until <= now) {
            self.writes.clear();
            self.until = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_wait_until_a_late_write_can_come_no_more() {
        let mut late = LateWrites::default();
        late.add(0..8, Some(1));
        late.add(16..24, None);
        late.pass(Duration::from_secs(1000));
        assert!(!late.allow(&(7..9), 2), "no new connection stands yet");
        late.reconnected(Duration::from_secs(1000));
        late.pass(Duration::from_secs(1004));
        assert!(late.allow(&(0..8), 1) && late.allow(&(8..16), 2));
        assert!(!late.allow(&(0..1), 2) && !late.allow(&(0..20), 1) && !late.allow(&(20..30), 1));
        // The new one is lost as well.
        late.add(30..31, Some(3));
        late.pass(Duration::from_secs(1005));
        assert!(!late.allow(&(0..1), 2));
        late.reconnected(Duration::from_secs(1010));
        late.pass(Duration::from_secs(1015));
        assert!(late.is_empty() && late.allow(&(0..100), 2));
    }
}
