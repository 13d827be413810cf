//! What waits, what is under way, and what is remembered: the one state of a device.
//!
//! Code that changes it holds the lock, and does not wait while it does. The rules are in the
//! documentation of [the module above](super).

mod receiving;
mod sending;
#[cfg(test)]
mod tests;

use super::super::{LinkStatus, SharedBuf};
use super::coverage::Coverage;
use super::handshake::Agreed;
use super::late::LateWrites;
use super::operation::{Kind, Operation};
use super::remembered::{Content, Mark, Remembered};
use crate::nbd::{Command, Request, TransmissionFlags};
use crate::rules::{Rule, Rules};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

/// How long a connection with requests under way may be silent.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// The limit doubles each time it runs out, up to this: a flush may take long.
const MOST_PATIENCE: Duration = Duration::from_secs(240);
/// How many parts of the reply to one request may bring no data, but errors or nothing.
const MOST_EMPTY_PARTS: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is no connection.
    Down,
    /// What the server may have lost is written again. All else waits.
    Restoring,
    /// Requests go out.
    Up,
    /// Nothing is taken any more.
    Ended,
}

/// One of the connections that stand.
#[derive(Default)]
struct Connection {
    under_way: usize,
    /// Since when it has been silent, while requests are under way.
    silent_since: Option<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Operation(u64),
    /// Remembered data, written again.
    Again,
    /// A flush before anything else, for what a process that has died has written.
    First,
}

/// A request under way.
struct Sent {
    on: usize,
    what: What,
    command: Command,
    range: Range<u64>,
    /// What was acknowledged when it was sent.
    mark: Mark,
    /// What has come of a read.
    coverage: Coverage,
    error: Option<Errno>,
    /// How many parts without data have come.
    empty_parts: u32,
}

/// A request to be sent, with its data.
pub(super) struct Outgoing {
    pub(super) request: Request,
    pub(super) parts: Vec<SharedBuf>,
}

/// What a connection does next.
pub(super) enum Next {
    Send(Outgoing),
    Wait,
    /// All is done, and no more will come.
    Close,
}

pub(super) struct State {
    rules: Rules,
    agreed: Agreed,
    timeout: Option<Duration>,
    most_remembered: u64,
    phase: Phase,
    connections: Vec<Connection>,
    operations: BTreeMap<u64, Operation>,
    /// The operations that are to be sent.
    queue: BTreeSet<u64>,
    /// By cookie. No cookie is used twice.
    sent: BTreeMap<u64, Sent>,
    /// Numbers operations and cookies.
    numbers: u64,
    again: VecDeque<(Range<u64>, Vec<Content>)>,
    remembered: Remembered,
    late: LateWrites,
    /// Nothing goes out before a flush has.
    owes_flush: bool,
    /// The next flush fails with this: a flush that no caller asked for has failed, or data could
    /// not be written again.
    failed_flush: Option<Errno>,
    down_since: Option<Duration>,
    /// Why requests fail instead of waiting for the link.
    fails_with: Option<Errno>,
    patience: Duration,
    /// Why the connections count as lost.
    verdict: Option<String>,
    reconnects: u64,
    problem: Option<String>,
    is_closing: bool,
}

impl State {
    /// `most_remembered` is in bytes.
    pub(super) fn new(
        agreed: Agreed,
        timeout: Option<Duration>,
        most_remembered: u64,
        rules: Rules,
    ) -> State {
        State {
            rules,
            agreed,
            timeout,
            most_remembered,
            phase: Phase::Down,
            connections: Vec::new(),
            operations: BTreeMap::new(),
            queue: BTreeSet::new(),
            sent: BTreeMap::new(),
            numbers: 0,
            again: VecDeque::new(),
            remembered: Remembered::default(),
            late: LateWrites::default(),
            owes_flush: false,
            failed_flush: None,
            down_since: None,
            fails_with: None,
            patience: PATIENCE,
            verdict: None,
            reconnects: 0,
            problem: None,
            is_closing: false,
        }
    }

    pub(super) fn agreed(&self) -> Agreed {
        self.agreed
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Takes an operation, or fails it at once.
    pub(super) fn begin(&mut self, operation: Operation) {
        if let Some(errno) = self.fails_with {
            return operation.end(Err(errno));
        }
        let id = self.number();
        self.queue.insert(id);
        self.operations.insert(id, operation);
    }

    /// Accepts a new connection if it offers what the old one did.
    ///
    /// # Errors
    /// What has changed.
    pub(super) fn agree_again(&mut self, now: Agreed) -> Result<(), String> {
        let was = &self.agreed;
        let needed = TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_WRITE_ZEROES;
        let (before, after) = (was.flags, now.flags);
        let read_only = TransmissionFlags::READ_ONLY;
        if now.size != was.size {
            return Err(format!("it had {} bytes and has {} now", was.size, now.size));
        }
        if before.contains(read_only) != after.contains(read_only) {
            let what = if after.contains(read_only) { "it is" } else { "it was" };
            return Err(format!("{what} read-only"));
        }
        if !after.contains(before & needed) {
            return Err("the server no longer offers flushes, durable writes or zeroing".into());
        }
        if now.block_size > was.block_size || now.most < was.most {
            return Err("the server no longer takes requests of the same sizes".into());
        }
        self.agreed.structured = now.structured;
        Ok(())
    }

    /// The connections stand.
    pub(super) fn connected(&mut self, connections: usize) {
        self.reconnects += u64::from(self.down_since.is_some());
        self.connections.clear();
        self.connections.resize_with(connections, Connection::default);
        // A server whose disk stands still takes connections, too. It answers a flush after that.
        self.owes_flush |= !self.late.is_empty() && self.rules.keep(Rule::LinkFlushesForTheDead);
        if self.fails_with == Some(Errno::ESTALE) {
            self.fails_with = None;
        }
        self.again = match self.rules.keep(Rule::LinkWritesAgain) {
            true => self.to_write_again(),
            false => VecDeque::new(),
        };
        self.phase = Phase::Restoring;
        self.try_to_be_up();
        if self.phase == Phase::Up && self.queue.is_empty() {
            self.has_answered();
        }
    }

    /// Lets requests out if nothing must come before them.
    fn try_to_be_up(&mut self) {
        if self.again.is_empty() && self.sent.is_empty() && !self.owes_flush {
            self.phase = Phase::Up;
        }
    }

    /// All that is remembered, in requests that are as large as possible.
    fn to_write_again(&self) -> VecDeque<(Range<u64>, Vec<Content>)> {
        let mut requests: VecDeque<(Range<u64>, Vec<Content>)> = VecDeque::new();
        let is_data = |content: &Content| matches!(content, Content::Data(_));
        for (range, content) in self.remembered.pieces() {
            match requests.back_mut() {
                Some((before, parts))
                    if before.end == range.start
                        && range.end - before.start <= u64::from(self.agreed.most)
                        && is_data(content)
                        && parts.iter().all(is_data) =>
                {
                    before.end = range.end;
                    parts.push(content.clone());
                }
                _ => requests.push_back((range, vec![content.clone()])),
            }
        }
        requests
    }

    /// The link works.
    fn has_answered(&mut self) {
        self.down_since = None;
        self.fails_with = None;
        self.problem = None;
    }

    /// The connections are gone. All that was under way is to be sent again.
    pub(super) fn lost(&mut self, why: String, now: Duration) {
        if self.phase == Phase::Ended {
            return;
        }
        self.phase = Phase::Down;
        self.problem = Some(why);
        self.down_since.get_or_insert(now);
        self.connections.clear();
        self.again.clear();
        self.verdict = None;
        for sent in std::mem::take(&mut self.sent).into_values() {
            let operation = match sent.what {
                What::Operation(id) => Some(id),
                What::Again | What::First => None,
            };
            if matches!(sent.command, Command::Write | Command::WriteZeroes) {
                self.late.add(sent.range, operation);
            }
            let Some(id) = operation else { continue };
            if sent.command == Command::Flush && !self.rules.keep(Rule::LinkFlushSentAgain) {
                self.end(id, Ok(()));
                continue;
            }
            self.queue.insert(id);
        }
        if let Some(errno) = self.fails_with {
            self.fail_queue(errno);
        }
    }

    /// There is no connection yet.
    pub(super) fn begin_down(&mut self, now: Duration) {
        self.down_since = Some(now);
    }

    /// Another process may have used the export before, and have died. What it had under way may
    /// come late. What it had written is made durable before anyone reads it.
    pub(super) fn begin_after_another(&mut self) {
        self.owes_flush = self.rules.keep(Rule::LinkFlushesForTheDead);
        if self.rules.keep(Rule::LinkWaitsForTheDead) {
            self.late.add(0..self.agreed.size, None);
        }
    }

    /// The link cannot be made.
    pub(super) fn failed(&mut self, why: String, has_changed: bool) {
        self.problem = Some(why);
        if has_changed {
            self.fails_with = Some(Errno::ESTALE);
            self.fail_queue(Errno::ESTALE);
        }
    }

    fn fail_queue(&mut self, errno: Errno) {
        for id in std::mem::take(&mut self.queue) {
            self.end(id, Err(errno));
        }
    }

    fn end(&mut self, id: u64, outcome: Result<(), Errno>) {
        if let Some(operation) = self.operations.remove(&id) {
            operation.end(outcome);
        }
    }

    /// Nothing is taken any more, and nothing goes on.
    pub(super) fn stop(&mut self) {
        self.phase = Phase::Ended;
        self.fails_with = Some(Errno::ECANCELED);
        self.queue.clear();
        self.sent.clear();
        for operation in std::mem::take(&mut self.operations).into_values() {
            operation.end(Err(Errno::ECANCELED));
        }
    }

    /// No more operations will come. The link ends once all are done.
    pub(super) fn close(&mut self) {
        self.is_closing = true;
    }

    /// Whether the device is closing and no caller waits for an operation any more.
    pub(super) fn is_over(&self) -> bool {
        self.is_closing && self.operations.values().all(|operation| operation.done.is_canceled())
    }

    pub(super) fn status(&self, now: Duration) -> LinkStatus {
        let operations = self.operations.values();
        LinkStatus {
            connections: self.connections.len(),
            down_for: self.down_since.map(|since| now.saturating_sub(since)),
            has_given_up: self.fails_with.is_some(),
            waiting: operations.filter(|one| !matches!(one.kind, Kind::OwnFlush)).count(),
            reconnects: self.reconnects,
            unflushed: self.remembered.weight(),
            problem: self.problem.clone(),
        }
    }
}

fn elapsed(since: Option<Duration>, now: Duration, limit: Duration) -> bool {
    since.is_some_and(|since| now.saturating_sub(since) >= limit)
}

/// Time.
impl State {
    /// Whether nothing depends on time.
    pub(super) fn is_quiet(&self) -> bool {
        let is_idle = self.phase == Phase::Up && self.operations.is_empty();
        is_idle && self.late.is_empty() || self.phase == Phase::Ended
    }

    /// Sets how long requests wait for the link: those that wait now, and all that come. What has
    /// failed stays so.
    pub(super) fn set_timeout(&mut self, timeout: Option<Duration>, now: Duration) {
        self.timeout = timeout;
        if self.fails_with == Some(Errno::ETIMEDOUT) && !self.is_out_of_time(now) {
            self.fails_with = None;
        }
    }

    fn is_out_of_time(&self, now: Duration) -> bool {
        self.timeout.is_some_and(|timeout| elapsed(self.down_since, now, timeout))
    }

    /// Lets time pass. Returns whether that has changed anything.
    pub(super) fn pass(&mut self, now: Duration) -> bool {
        let were_late = !self.late.is_empty();
        if self.phase == Phase::Up {
            self.late.reconnected(now);
        }
        self.late.pass(now);
        // Those that wait for late writes do not wait for the link.
        let is_held_back = self.phase == Phase::Up && self.sent.is_empty();
        let fails_now = self.is_out_of_time(now) && !is_held_back && self.fails_with.is_none();
        if fails_now {
            self.fails_with = Some(Errno::ETIMEDOUT);
            self.fail_queue(Errno::ETIMEDOUT);
        }
        if self.verdict.is_none()
            && self.connections.iter().any(|one| elapsed(one.silent_since, now, self.patience))
        {
            let seconds = self.patience.as_secs();
            self.patience = (self.patience * 2).min(MOST_PATIENCE);
            self.verdict = Some(format!("the server has not answered for {seconds} s"));
        }
        // Nothing is told when a caller goes away.
        let is_over = self.is_over();
        were_late && self.late.is_empty() || fails_now || self.verdict.is_some() || is_over
    }

    /// Why the connections count as lost, if they do.
    pub(super) fn take_verdict(&mut self) -> Option<String> {
        self.verdict.take()
    }
}
