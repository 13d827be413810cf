//! Which request goes out next.

use super::super::coverage::Coverage;
use super::super::operation::{Kind, Operation};
use super::super::remembered::Content;
use super::{Next, Outgoing, Phase, Sent, State, What};
use crate::nbd::{Command, CommandFlags, Request};
use crate::rules::Rule;
use futures_channel::oneshot;
use std::ops::Range;
use std::time::Duration;

/// How many requests a connection has under way at most.
const DEPTH: usize = 32;

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl State {
    /// What goes out on a connection next.
    pub(in super::super) fn next(&mut self, on: usize, now: Duration) -> Next {
        let Some(connection) = self.connections.get(on) else { return Next::Wait };
        if connection.under_way >= DEPTH {
            return Next::Wait;
        }
        if let Some((range, contents)) = self.again.pop_front() {
            return Next::Send(self.send_again(on, range, contents, now));
        }
        if self.phase == Phase::Restoring && self.owes_flush && self.sent.is_empty() {
            let (flush, none) = (Command::Flush, CommandFlags::empty());
            let request = self.sending(on, What::First, flush, none, 0..0, now);
            return Next::Send(Outgoing { request, parts: Vec::new() });
        }
        if self.phase != Phase::Up {
            return Next::Wait;
        }
        if let Some(id) = self.choose() {
            self.queue.remove(&id);
            return Next::Send(self.send(on, id, now));
        }
        let is_done = self.is_closing && self.queue.is_empty() && self.sent.is_empty();
        if is_done { Next::Close } else { Next::Wait }
    }

    /// The first operation that may go out.
    fn choose(&mut self) -> Option<u64> {
        let mut lacks_room = false;
        // Of two at the same time, the server might tell one alone that data was lost: the one that
        // no caller has asked for.
        let flushes_itself = self.operations.values().any(|one| matches!(one.kind, Kind::OwnFlush));
        for &id in &self.queue {
            let operation = &self.operations[&id];
            if flushes_itself && operation.is_flush_of_caller() {
                continue;
            }
            if !operation.changes() {
                return Some(id);
            }
            let range = operation.range();
            let is_late =
                self.rules.keep(Rule::LinkLateWritesAwaited) && !self.late.allow(&range, id);
            if is_late || self.is_changing(&range) {
                continue;
            }
            if self.has_room(operation.weight()) {
                return Some(id);
            }
            lacks_room = true;
        }
        let waits = |one: &Operation| matches!(one.kind, Kind::Flush);
        let is_flushing = || {
            let is_under_way = |sent: &Sent| match sent.what {
                What::Operation(id) => {
                    self.operations.get(&id).is_some_and(Operation::is_flush_of_caller)
                }
                What::Again | What::First => false,
            };
            self.operations.values().any(waits) || self.sent.values().any(is_under_way)
        };
        if !lacks_room || self.remembered.weight() == 0 || flushes_itself || is_flushing() {
            return None;
        }
        let id = self.number();
        let (kind, done) = (Kind::OwnFlush, oneshot::channel().0);
        let flush = Operation { offset: 0, length: 0, kind, done, in_flight: None };
        self.operations.insert(id, flush);
        Some(id)
    }

    /// Whether a request under way changes a part of this range. If so, a new write must wait: what
    /// is acknowledged last must be what the server has carried out last.
    fn is_changing(&self, range: &Range<u64>) -> bool {
        self.sent.values().any(|sent| {
            matches!(sent.command, Command::Write | Command::WriteZeroes)
                && overlap(&sent.range, range)
        })
    }

    fn has_room(&self, weight: u64) -> bool {
        let under_way: u64 = self
            .sent
            .values()
            .filter_map(|sent| match sent.what {
                What::Operation(id) => self.operations.get(&id).map(Operation::weight),
                What::Again | What::First => None,
            })
            .sum();
        let have = self.remembered.weight() + under_way;
        have == 0 || have + weight <= self.most_remembered
    }

    fn send(&mut self, on: usize, id: u64, now: Duration) -> Outgoing {
        let operation = &self.operations[&id];
        let (range, command) = (operation.range(), operation.command());
        let flags = operation.flags();
        let parts = match &operation.kind {
            Kind::Write { parts, .. } => parts.clone(),
            _ => Vec::new(),
        };
        let request = self.sending(on, What::Operation(id), command, flags, range, now);
        Outgoing { request, parts }
    }

    fn send_again(
        &mut self,
        on: usize,
        range: Range<u64>,
        contents: Vec<Content>,
        now: Duration,
    ) -> Outgoing {
        let (mut flags, mut parts) = (CommandFlags::empty(), Vec::new());
        let mut command = Command::Write;
        for content in contents {
            match content {
                Content::Data(data) => parts.push(data),
                Content::Zeros { keep_space } => {
                    command = Command::WriteZeroes;
                    flags.set(CommandFlags::NO_HOLE, keep_space);
                }
            }
        }
        Outgoing { request: self.sending(on, What::Again, command, flags, range, now), parts }
    }

    fn sending(
        &mut self,
        on: usize,
        what: What,
        command: Command,
        flags: CommandFlags,
        range: Range<u64>,
        now: Duration,
    ) -> Request {
        let cookie = self.number();
        let connection = &mut self.connections[on];
        connection.under_way += 1;
        connection.silent_since.get_or_insert(now);
        let offset = range.start;
        // Nothing is longer than the length of an operation, or than the largest request.
        let length = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
        let (mark, coverage) = (self.remembered.mark(), Coverage::default());
        let sent = Sent { on, what, command, range, mark, coverage, error: None, empty_parts: 0 };
        self.sent.insert(cookie, sent);
        Request { flags, command, cookie, offset, length }
    }
}
