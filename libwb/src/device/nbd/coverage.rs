//! Which parts of a read have come.

use std::collections::BTreeMap;
use std::ops::Range;

/// How many separate parts a read may consist of meanwhile.
const MOST_PARTS: usize = 1024;

/// Ranges that do not overlap. Those that touch are one.
#[derive(Default)]
pub(super) struct Coverage(BTreeMap<usize, usize>);

impl Coverage {
    /// Adds a range. Returns false if it overlaps what is there, or if there are too many parts.
    pub(super) fn add(&mut self, range: Range<usize>) -> bool {
        let Range { mut start, mut end } = range;
        let before = self.0.range(..=start).next_back().map(|(&start, &end)| (start, end));
        let after = self.0.range(start..).next().map(|(&start, _)| start);
        if before.is_some_and(|(_, its_end)| its_end > start) || after.is_some_and(|at| at < end) {
            return false;
        }
        if let Some((its_start, _)) = before.filter(|&(_, its_end)| its_end == start) {
            start = its_start;
        }
        if let Some(its_end) = self.0.remove(&end) {
            end = its_end;
        }
        self.0.insert(start, end);
        self.0.len() <= MOST_PARTS
    }

    /// Whether everything up to `length` is there.
    pub(super) fn is_whole(&self, length: usize) -> bool {
        self.0.len() == 1 && self.0.get(&0) == Some(&length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_in_any_order_become_the_whole() {
        let mut coverage = Coverage::default();
        for part in [8..12, 0..4, 4..8] {
            assert!(!coverage.is_whole(12));
            assert!(coverage.add(part));
        }
        assert!(coverage.is_whole(12));
        assert!(!coverage.is_whole(13));
    }

    #[test]
    fn what_came_already_may_not_come_again() {
        for again in [4..8, 3..5, 7..9, 5..6, 0..12, 0..5] {
            let mut coverage = Coverage::default();
            assert!(coverage.add(4..8));
            assert!(!coverage.add(again.clone()), "{again:?}");
        }
    }

    #[test]
    fn there_are_not_too_many_parts() {
        let mut coverage = Coverage::default();
        assert!((0..MOST_PARTS).all(|n| coverage.add(2 * n..2 * n + 1)));
        assert!(!coverage.add(2 * MOST_PARTS..2 * MOST_PARTS + 1));
    }
}
