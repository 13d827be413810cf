//! Operations that are not submitted yet, and which of them comes next.
//!
//! Writes and flushes of the log come first, since a flush of the volume waits for them. The rest
//! cannot starve: the engine has but a few log writes and one flush of the log under way at a time,
//! and starts others only when these are done.
//!
//! A device may serve its operations in any order, so a log write may wait for all reads that were
//! submitted before it. So each device has at most [`DEPTH`] other operations at a time, enough to
//! keep it busy. Around a flush of the log, the cache device has at most [`SHALLOW`]. This also
//! keeps a device that hangs from holding up the operations of another one.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// How many operations that are not urgent a device has at a time.
const DEPTH: usize = 128;
/// The same while a flush of the log is under way, and for some time after, since the next one
/// begins with a write. A write and a flush beside eight readers take 1.8, 2.4 and 4.1 times as
/// long as alone with 4, 8 and 16. The readers get 47, 54 and 63 % of what they get alone.
const SHALLOW: usize = 8;
const SHALLOW_FOR: Duration = Duration::from_millis(20);

/// When an operation may be submitted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// As soon as the ring has room.
    Urgent,
    /// The same. It is a flush of the log, on this device.
    Flush(RawFd),
    /// When this device may have another one.
    InTurn(RawFd),
    /// At once, for it only waits until a file is ready. It does not count as under way: each
    /// client of a server may be silent for ever.
    Wait,
}

/// The operations of one device.
#[derive(Default)]
struct Turns {
    /// Those that are not urgent.
    waiting: VecDeque<usize>,
    in_flight: usize,
    /// Flushes of the log that are not done.
    flushes: usize,
    flushed_at: Option<Instant>,
}

impl Turns {
    fn depth(&self, now: Instant) -> usize {
        let is_recent = |at: Instant| now.saturating_duration_since(at) < SHALLOW_FOR;
        let is_shallow = self.flushes > 0 || self.flushed_at.is_some_and(is_recent);
        if is_shallow { SHALLOW } else { DEPTH }
    }

    fn next(&mut self, now: Instant) -> Option<usize> {
        let is_free = !self.waiting.is_empty() && self.in_flight < self.depth(now);
        let key = if is_free { self.waiting.pop_front() } else { None }?;
        self.in_flight += 1;
        Some(key)
    }
}

/// The keys of operations that wait for their submission.
#[derive(Default)]
pub(super) struct Queue {
    waits: VecDeque<usize>,
    urgent: VecDeque<usize>,
    /// By descriptor. A device that is gone leaves an empty entry to the next one.
    turns: BTreeMap<RawFd, Turns>,
    /// Operations that were taken and are not done yet, without those that only wait.
    in_flight: usize,
}

impl Queue {
    pub(super) fn push(&mut self, key: usize, class: Class) {
        match class {
            Class::Wait => self.waits.push_back(key),
            Class::Urgent => self.urgent.push_back(key),
            Class::Flush(fd) => {
                self.urgent.push_back(key);
                self.turns.entry(fd).or_default().flushes += 1;
            }
            Class::InTurn(fd) => self.turns.entry(fd).or_default().waiting.push_back(key),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waits.is_empty()
            && self.urgent.is_empty()
            && self.turns.values().all(|turns| turns.waiting.is_empty())
    }

    /// Takes the next operation that may be submitted, if fewer than `most` are in flight. If it
    /// returns none although some wait, ask again when one of those in flight ends.
    pub(super) fn pop(&mut self, now: Instant, most: usize) -> Option<usize> {
        if let Some(key) = self.waits.pop_front() {
            return Some(key);
        }
        if self.in_flight >= most {
            return None;
        }
        let mut in_turn = || self.turns.values_mut().find_map(|turns| turns.next(now));
        let key = self.urgent.pop_front().or_else(&mut in_turn)?;
        self.in_flight += 1;
        Some(key)
    }

    /// An operation that was taken is done, or will be pushed again.
    pub(super) fn done(&mut self, class: Class, now: Instant) {
        self.in_flight -= usize::from(class != Class::Wait);
        match class {
            Class::Wait | Class::Urgent => {}
            Class::Flush(fd) => {
                let turns = self.turns.entry(fd).or_default();
                turns.flushes -= 1;
                turns.flushed_at = Some(now);
            }
            Class::InTurn(fd) => self.turns.entry(fd).or_default().in_flight -= 1,
        }
    }

    /// Takes all that wait.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = usize> {
        let mut waiting = std::mem::take(&mut self.waits);
        waiting.append(&mut self.urgent);
        self.turns.values_mut().for_each(|turns| waiting.append(&mut turns.waiting));
        waiting.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CACHE: RawFd = 3;
    const BACKING: RawFd = 4;

    fn popped(queue: &mut Queue, now: Instant) -> Vec<usize> {
        std::iter::from_fn(|| queue.pop(now, usize::MAX)).collect()
    }

    #[test]
    fn what_is_urgent_comes_first_and_one_device_does_not_hold_up_another() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        (0..2 * DEPTH).for_each(|key| queue.push(key, Class::InTurn(CACHE)));
        queue.push(1000, Class::InTurn(BACKING));
        queue.push(1001, Class::Urgent);
        let first = popped(&mut queue, now);
        assert_eq!(first[0], 1001);
        assert_eq!(first[1..=DEPTH], (0..DEPTH).collect::<Vec<_>>());
        assert_eq!(first[DEPTH + 1..], [1000]);
        queue.done(Class::InTurn(CACHE), now);
        queue.push(1002, Class::Urgent);
        assert_eq!(popped(&mut queue, now), [1002, DEPTH]);
        assert_eq!(queue.in_flight, DEPTH + 3);
    }

    #[test]
    fn what_only_waits_finds_room_always_and_takes_none() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        (0..3).for_each(|key| queue.push(key, Class::Urgent));
        (3..6).for_each(|key| queue.push(key, Class::Wait));
        let first: Vec<_> = std::iter::from_fn(|| queue.pop(now, 2)).collect();
        assert_eq!(first, [3, 4, 5, 0, 1]);
        queue.done(Class::Wait, now);
        assert_eq!(queue.pop(now, 2), None);
        queue.done(Class::Urgent, now);
        assert_eq!(queue.pop(now, 2), Some(2));
        assert!(queue.is_empty());
    }

    #[test]
    fn a_device_has_little_else_while_it_is_flushed_and_shortly_after() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.push(1000, Class::Flush(CACHE));
        (0..DEPTH).for_each(|key| queue.push(key, Class::InTurn(CACHE)));
        let few: Vec<_> = std::iter::once(1000).chain(0..SHALLOW).collect();
        assert_eq!(popped(&mut queue, now), few);
        queue.done(Class::Flush(CACHE), now);
        assert!(popped(&mut queue, now).is_empty());
        queue.done(Class::InTurn(CACHE), now);
        assert_eq!(popped(&mut queue, now), [SHALLOW], "the others go on");
        let rest: Vec<_> = (SHALLOW + 1..DEPTH).collect();
        assert_eq!(popped(&mut queue, now + SHALLOW_FOR), rest);
    }
}
