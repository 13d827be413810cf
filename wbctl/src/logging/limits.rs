//! Limits how often the same message is logged.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// The time that the limits apply to.
const WINDOW: Duration = Duration::from_secs(1);
/// How often the same line is logged in that time.
const SAME: u32 = 3;
/// How many lines one place in the code logs in that time. Its lines may differ, for example by an
/// address.
const ALIKE: u32 = 20;

/// Counts the lines of each place in the code. Of the lines beyond the limit, it keeps the last
/// one, and logs it with their number.
pub(super) struct Limits<P>(HashMap<P, Said>);

/// The lines of one place in the time since `since`.
struct Said {
    since: Instant,
    lines: u32,
    /// The last line, and how often it came in a row.
    last: Vec<u8>,
    in_a_row: u32,
    /// How many lines were held back, and whether all of them are the last line.
    held_back: u64,
    all_the_same: bool,
}

impl<P> Default for Limits<P> {
    fn default() -> Limits<P> {
        Limits(HashMap::new())
    }
}

impl<P: Eq + Hash> Limits<P> {
    /// Takes a line of a place, and returns the lines to write now.
    pub(super) fn admit(&mut self, place: P, line: Vec<u8>, now: Instant) -> Vec<Vec<u8>> {
        let said = self.0.entry(place).or_insert_with(|| Said::nothing(now));
        let mut to_say: Vec<Vec<u8>> = said.summary(now, false).into_iter().collect();
        said.in_a_row = if said.last == line { said.in_a_row.saturating_add(1) } else { 1 };
        if said.in_a_row > SAME || said.lines >= ALIKE {
            said.all_the_same = said.last == line && (said.held_back == 0 || said.all_the_same);
            said.held_back += 1;
            said.last = line;
        } else {
            said.lines += 1;
            said.last.clone_from(&line);
            to_say.push(line);
        }
        to_say
    }

    /// Whether lines are held back, or the next ones may be. If not, a line that is written comes
    /// before any that is held back.
    pub(super) fn may_hold_back(&self) -> bool {
        self.0.values().any(|said| said.lines > 0 || said.held_back > 0)
    }

    /// The summaries that are due: those of past windows, and at the `end` all.
    pub(super) fn due(&mut self, now: Instant, end: bool) -> Vec<Vec<u8>> {
        self.0.values_mut().filter_map(|said| said.summary(now, end)).collect()
    }
}

impl Said {
    fn nothing(now: Instant) -> Said {
        Said {
            since: now,
            lines: 0,
            last: Vec::new(),
            in_a_row: 0,
            held_back: 0,
            all_the_same: false,
        }
    }

    /// Begins a new window when the old one is over, and returns a summary of the lines held back
    /// in it.
    fn summary(&mut self, now: Instant, end: bool) -> Option<Vec<u8>> {
        if now.saturating_duration_since(self.since) < WINDOW && !end {
            return None;
        }
        let held_back = self.held_back;
        let line = self.last.trim_ascii_end();
        let summary = match self.all_the_same {
            true => [line, format!(" (repeated {held_back} times)\n").as_bytes()].concat(),
            false => {
                [line, format!(" (the last of {held_back} more like it)\n").as_bytes()].concat()
            }
        };
        // The last line stays: said once more, it is still the same.
        *self = Said { last: std::mem::take(&mut self.last), ..Said::nothing(now) };
        (held_back > 0).then_some(summary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(lines: Vec<Vec<u8>>) -> String {
        String::from_utf8(lines.concat()).expect("UTF-8")
    }

    #[test]
    fn the_same_line_is_said_a_few_times_a_second_and_then_how_often_it_came() {
        let (mut limits, start) = (Limits::default(), Instant::now());
        let storm = |limits: &mut Limits<u8>, from: Instant| -> String {
            let at = |n: u32| from + WINDOW / 10_000 * n;
            (0..5000).map(|n| text(limits.admit(1, b"it failed\n".to_vec(), at(n)))).collect()
        };
        assert_eq!(storm(&mut limits, start), "it failed\n".repeat(3));
        assert_eq!(text(limits.due(start + WINDOW / 2, false)), "", "the time is not over");
        assert_eq!(text(limits.due(start + WINDOW, false)), "it failed (repeated 4997 times)\n");
        assert_eq!(text(limits.due(start + 2 * WINDOW, false)), "", "it was said");
        // The time begins anew, and is said to be over by the next line as well.
        assert_eq!(storm(&mut limits, start + 2 * WINDOW), "it failed\n".repeat(3));
        let next = text(limits.admit(1, b"something else\n".to_vec(), start + 3 * WINDOW));
        assert_eq!(next, "it failed (repeated 4997 times)\nsomething else\n");
    }

    #[test]
    fn lines_of_one_place_that_differ_are_limited_too_and_the_last_is_said() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        let said: String = (0..1000)
            .map(|n| text(limits.admit(1, format!("block {n}\n").into_bytes(), now)))
            .collect();
        assert_eq!(said, (0..20).map(|n| format!("block {n}\n")).collect::<String>());
        assert_eq!(text(limits.admit(2, b"elsewhere\n".to_vec(), now)), "elsewhere\n");
        assert_eq!(text(limits.due(now, true)), "block 999 (the last of 980 more like it)\n");
    }

    #[test]
    fn what_is_said_seldom_is_never_held_back() {
        let (mut limits, start) = (Limits::default(), Instant::now());
        for n in 0..100 {
            let now = start + WINDOW / 2 * n;
            assert_eq!(text(limits.admit(1, b"paused\n".to_vec(), now)), "paused\n");
            assert_eq!(text(limits.due(now, false)), "");
        }
        assert!(limits.may_hold_back());
        assert_eq!(text(limits.due(start + WINDOW * 100, false)), "");
        assert!(!limits.may_hold_back(), "nothing was said for long");
    }
}
