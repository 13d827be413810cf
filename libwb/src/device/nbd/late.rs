//! Writes that a lost connection had under way. The server may still carry them out, late.

use std::ops::Range;
use std::time::Duration;

/// For this long after new connections have answered a flush, a server may still carry out what it
/// got over older ones.
pub(super) const LATEST: Duration = Duration::from_secs(5);

/// Which writes may still come late.
#[derive(Default)]
pub(super) struct LateWrites {
    writes: Vec<LateWrite>,
}

struct LateWrite {
    range: Range<u64>,
    operation: Option<u64>,
    /// When it can come no more; none while no new connection stands.
    until: Option<Duration>,
}

impl LateWrites {
    /// A write under way has lost its connection. `operation` is none if it wrote remembered data
    /// again.
    pub(super) fn add(&mut self, range: Range<u64>, operation: Option<u64>) {
        self.writes.retain(|late| late.range != range || late.operation != operation);
        self.writes.push(LateWrite { range, operation, until: None });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Whether an operation may write to a range: no other operation can still write late
    /// there. A late write of the same operation writes the same data.
    pub(super) fn allow(&self, range: &Range<u64>, operation: u64) -> bool {
        self.writes.iter().all(|late| {
            late.operation == Some(operation)
                || late.range.end <= range.start
                || range.end <= late.range.start
        })
    }

    /// A new connection stands.
    pub(super) fn reconnected(&mut self, now: Duration) {
        self.writes.iter_mut().for_each(|late| {
            late.until.get_or_insert(now + LATEST);
        });
    }

    /// Forgets those that can come no more.
    pub(super) fn pass(&mut self, now: Duration) {
        self.writes.retain(|late| late.until.is_none_or(|until| until > now));
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
        // The new one is lost as well. That does not keep the older ones.
        late.add(30..31, Some(3));
        late.add(16..24, None);
        late.pass(Duration::from_secs(1005));
        assert!(late.allow(&(0..1), 2) && !late.allow(&(16..17), 2) && !late.allow(&(30..31), 2));
        late.reconnected(Duration::from_secs(1010));
        late.pass(Duration::from_secs(1015));
        assert!(late.is_empty() && late.allow(&(0..100), 2));
    }
}
