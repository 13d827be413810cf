//! What callers want of the device, one request at a time.

use super::super::{IoBuf, SharedBuf};
use super::remembered::Content;
use crate::format::to_u64;
use crate::nbd::{Command, CommandFlags};
use crate::pending::InFlight;
use futures_channel::oneshot;
use nix::errno::Errno;
use std::ops::Range;

/// How an operation ended, with the buffer of a read. That of any other is empty.
pub(super) type Outcome = Result<IoBuf, Errno>;

pub(super) enum Kind {
    /// Fill the buffer. It may be empty until data comes. While a reply is received, the connection
    /// has it, and an empty one is here.
    Read(IoBuf),
    /// Write the parts back to back. With `durably`, they are durable once that is done.
    Write { parts: Vec<SharedBuf>, durably: bool },
    /// Make the range read as zeros.
    Zero { keep_space: bool },
    /// Make durable what was acknowledged.
    Flush,
    /// The same, but no caller has asked for it.
    OwnFlush,
}

pub(super) struct Operation {
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) kind: Kind,
    pub(super) done: oneshot::Sender<Outcome>,
    pub(super) in_flight: Option<InFlight>,
}

impl Operation {
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.length)
    }

    /// Whether it changes data.
    pub(super) fn changes(&self) -> bool {
        matches!(self.kind, Kind::Write { .. } | Kind::Zero { .. })
    }

    /// Whether a caller relies on it that data is durable once it is done.
    pub(super) fn is_flush_of_caller(&self) -> bool {
        matches!(self.kind, Kind::Flush | Kind::Write { durably: true, .. })
    }

    /// How much is to be remembered once it is done, in bytes.
    pub(super) fn weight(&self) -> u64 {
        match self.kind {
            Kind::Write { durably: false, .. } => self.length.into(),
            _ => 0,
        }
    }

    pub(super) fn command(&self) -> Command {
        match self.kind {
            Kind::Read(_) => Command::Read,
            Kind::Write { .. } => Command::Write,
            Kind::Zero { .. } => Command::WriteZeroes,
            Kind::Flush | Kind::OwnFlush => Command::Flush,
        }
    }

    pub(super) fn flags(&self) -> CommandFlags {
        let mut flags = CommandFlags::empty();
        let durably = matches!(self.kind, Kind::Write { durably: true, .. });
        flags.set(CommandFlags::FUA, durably);
        flags.set(CommandFlags::NO_HOLE, matches!(self.kind, Kind::Zero { keep_space: true }));
        flags
    }

    /// What it has put where.
    pub(super) fn contents(&self) -> Vec<(Range<u64>, Content)> {
        match &self.kind {
            Kind::Write { parts, .. } => {
                let mut at = self.offset;
                let content = |part: &SharedBuf| {
                    let range = at..at + to_u64(part.len());
                    at = range.end;
                    (range, Content::Data(part.to_keep()))
                };
                parts.iter().map(content).collect()
            }
            Kind::Zero { keep_space } => {
                vec![(self.range(), Content::Zeros { keep_space: *keep_space })]
            }
            Kind::Read(_) | Kind::Flush | Kind::OwnFlush => Vec::new(),
        }
    }

    /// Tells the caller how it ended.
    pub(super) fn end(self, outcome: Result<(), Errno>) {
        if let (Ok(()), Some(in_flight)) = (&outcome, &self.in_flight) {
            in_flight.succeeded();
        }
        drop(self.in_flight);
        let buf = match self.kind {
            Kind::Read(buf) => buf,
            _ => IoBuf::zeroed(0),
        };
        // The caller may have gone.
        let _ = self.done.send(outcome.map(|()| buf));
    }
}
