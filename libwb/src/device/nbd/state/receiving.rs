//! What an answer of the server means. An error says how the server breaks the protocol, or that
//! it ends.

use super::super::super::IoBuf;
use super::super::operation::Kind;
use super::super::remembered::Mark;
use super::{MOST_EMPTY_PARTS, PATIENCE, Sent, State, What};
use crate::format::to_usize;
use crate::nbd::{Command, CommandFlags};
use crate::rules::Rule;
use nix::errno::Errno;
use std::ops::Range;
use std::time::Duration;

impl State {
    fn asked(&mut self, on: usize, cookie: u64) -> Result<&mut Sent, String> {
        let sent = self.sent.get_mut(&cookie).filter(|sent| sent.on == on);
        sent.ok_or_else(|| "the server answers a request that was not sent".to_string())
    }

    pub(in super::super) fn is_structured(&self) -> bool {
        self.agreed.structured
    }

    /// Bytes went over a connection.
    pub(in super::super) fn progress(&mut self, on: usize, now: Duration) {
        if let Some(connection) = self.connections.get_mut(on) {
            connection.silent_since = (connection.under_way > 0).then_some(now);
        }
    }

    /// The range of a read, whose data follows unless the server answers with an error; `None` for
    /// other requests.
    pub(in super::super) fn is_read(
        &mut self,
        on: usize,
        cookie: u64,
    ) -> Result<Option<Range<u64>>, String> {
        let sent = self.asked(on, cookie)?;
        Ok((sent.command == Command::Read).then(|| sent.range.clone()))
    }

    /// Data of a read comes. Returns the buffer and the range in it.
    pub(in super::super) fn data_begins(
        &mut self,
        on: usize,
        cookie: u64,
        offset: u64,
        length: u32,
    ) -> Result<(IoBuf, Range<usize>), String> {
        let sent = self.asked(on, cookie)?;
        let What::Operation(id) = sent.what else {
            return Err("the server answers a write with data".into());
        };
        let whole = sent.range.clone();
        let end = offset.checked_add(length.into()).filter(|&end| end <= whole.end);
        let Some(end) = end.filter(|_| sent.command == Command::Read && offset >= whole.start)
        else {
            return Err("the server sends data that was not asked for".into());
        };
        let within = to_usize(offset - whole.start)..to_usize(end - whole.start);
        if !sent.coverage.add(within.clone()) {
            return Err("the server sends data twice, or in too many parts".into());
        }
        let length = to_usize(whole.end - whole.start);
        let buf = match self.operations.get_mut(&id).map(|operation| &mut operation.kind) {
            Some(Kind::Read(buf)) => std::mem::replace(buf, IoBuf::zeroed(0)),
            _ => IoBuf::zeroed(0),
        };
        // No data has come before, or a lost connection has taken the buffer along.
        let buf = if buf.len() == length { buf } else { IoBuf::zeroed(length) };
        Ok((buf, within))
    }

    /// The data has come.
    pub(in super::super) fn data_ends(
        &mut self,
        on: usize,
        cookie: u64,
        filled: IoBuf,
    ) -> Result<(), String> {
        let What::Operation(id) = self.asked(on, cookie)?.what else { return Ok(()) };
        if let Some(Kind::Read(buf)) = self.operations.get_mut(&id).map(|one| &mut one.kind) {
            *buf = filled;
        }
        Ok(())
    }

    /// A part of a reply says that the request failed. Returns whether it is the first one.
    pub(in super::super) fn error(
        &mut self,
        on: usize,
        cookie: u64,
        errno: Errno,
    ) -> Result<bool, String> {
        let sent = self.asked(on, cookie)?;
        let is_first = sent.error.is_none();
        sent.error.get_or_insert(errno);
        self.nothing(on, cookie).map(|()| is_first)
    }

    /// A part of a reply brings no data.
    pub(in super::super) fn nothing(&mut self, on: usize, cookie: u64) -> Result<(), String> {
        let sent = self.asked(on, cookie)?;
        sent.empty_parts += 1;
        match sent.empty_parts > MOST_EMPTY_PARTS {
            true => Err("the server sends parts without data and without end".into()),
            false => Ok(()),
        }
    }

    /// The reply is complete.
    pub(in super::super) fn answered(&mut self, on: usize, cookie: u64) -> Result<(), String> {
        let sent = self.asked(on, cookie)?;
        if sent.error == Some(Errno::ESHUTDOWN) {
            return Err("the server ends".into());
        }
        let length = to_usize(sent.range.end - sent.range.start);
        if sent.command == Command::Read && sent.error.is_none() && !sent.coverage.is_whole(length)
        {
            return Err("the server has not sent all data of a read".into());
        }
        let Some(sent) = self.sent.remove(&cookie) else { return Ok(()) };
        self.connections[on].under_way -= 1;
        if self.connections[on].under_way == 0 {
            self.connections[on].silent_since = None;
        }
        self.has_answered();
        let outcome = sent.error.map_or(Ok(()), Err);
        match sent.what {
            What::Operation(id) => self.operation_answered(id, sent.mark, outcome),
            What::Again => self.restored(outcome),
            What::First => {
                self.owes_flush = false;
                self.restored(outcome);
            }
        }
        Ok(())
    }

    /// A part of what comes before all requests has ended.
    fn restored(&mut self, outcome: Result<(), Errno>) {
        if let Err(errno) = outcome {
            self.failed_flush = Some(errno);
        }
        self.try_to_be_up();
    }

    fn operation_answered(&mut self, id: u64, mark: Mark, mut outcome: Result<(), Errno>) {
        let Some(operation) = self.operations.get(&id) else { return };
        match operation.kind {
            Kind::Read(_) => {}
            Kind::Write { .. } | Kind::Zero { .. } if outcome.is_ok() => self.changed(id),
            Kind::Write { .. } | Kind::Zero { .. } => {}
            Kind::Flush | Kind::OwnFlush => {
                let is_own = matches!(operation.kind, Kind::OwnFlush);
                outcome = self.flushed(is_own, mark, outcome);
            }
        }
        self.end(id, outcome);
    }

    /// A change was acknowledged.
    fn changed(&mut self, id: u64) {
        let operation = &self.operations[&id];
        let is_durable = operation.flags().contains(CommandFlags::FUA);
        if is_durable {
            if self.rules.keep(Rule::LinkNewestRemembered) {
                self.remembered.forget(&operation.range());
            }
            return;
        }
        for (range, content) in operation.contents() {
            self.remembered.add(range, content);
        }
    }

    /// Returns what the caller of the flush is told.
    fn flushed(
        &mut self,
        is_own: bool,
        mark: Mark,
        outcome: Result<(), Errno>,
    ) -> Result<(), Errno> {
        match outcome {
            Ok(()) => {
                let as_of_sending = self.rules.keep(Rule::LinkFlushAsOfSending);
                let mark = if as_of_sending { mark } else { self.remembered.mark() };
                self.remembered.forget_until(mark);
                self.patience = PATIENCE;
                if is_own { Ok(()) } else { self.failed_flush.take().map_or(Ok(()), Err) }
            }
            Err(errno) if is_own => {
                self.failed_flush = Some(errno);
                // These changes may wait for room, and only a flush makes room.
                let writes = self.queue.iter().filter(|id| self.operations[id].changes());
                for id in writes.copied().collect::<Vec<_>>() {
                    self.queue.remove(&id);
                    self.end(id, Err(errno));
                }
                Ok(())
            }
            Err(errno) => {
                self.failed_flush = None;
                Err(errno)
            }
        }
    }
}
