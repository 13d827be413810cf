//! The log on its way to the device: what is to be written next, and what has arrived.

use super::SegmentLog;
use super::segments::{Commits, LostPlaces};
use crate::cache::state::position::Position;
use crate::device::{IoBuf, SharedBuf};
use crate::format::{BLOCK_BYTES, Commit, Metablock, Place, Reason, SegmentId, Slot};
use crate::rules::Rule;
use std::ops::Range;

/// When this many written segments are not durable, the log asks for a flush, even if no request
/// waits for one. Recovery must read such segments whole, so there should be few.
const MAX_UNDURABLE: u64 = 64;

/// Something to be written to the device: a commit, or the rest of a sealed segment.
pub(crate) struct Job {
    pub(crate) id: SegmentId,
    /// [`Reason::Open`] for a commit.
    pub(crate) reason: Reason,
    /// The entries of all its blocks. Those that were written before have their CRCs.
    pub(crate) metablocks: Vec<Metablock>,
    /// How many were written before.
    pub(crate) first: u8,
    /// The data of the others.
    pub(crate) data: SharedBuf,
    /// The last commit. It is durable.
    pub(crate) before: Option<Commit>,
    /// It is a commit, and everything before its blocks is durable. So a durable write of it does
    /// for a write and a flush.
    pub(crate) may_be_durable: bool,
}

/// A job that is done.
pub(crate) struct Appended {
    pub(crate) id: SegmentId,
    pub(crate) first: u8,
    pub(crate) crcs: Vec<u32>,
    /// The commit, if it was one.
    pub(crate) commit: Option<Commit>,
    /// It was written durably.
    pub(crate) is_durable: bool,
}

impl SegmentLog {
    /// The end of the newest block.
    pub(crate) fn newest_position(&self) -> Position {
        match &self.open {
            Some(open) => Position::within(open.id, open.length),
            None => Position::end_of(self.newest),
        }
    }

    /// What is on the device without a gap, perhaps in its volatile cache.
    pub(crate) fn written_position(&self) -> Position {
        let id = self.written.next();
        let commit = self.commits(id).and_then(Commits::written);
        commit.map_or(Position::end_of(self.written), |Commit { length, .. }| {
            Position::within(id, length)
        })
    }

    fn commits(&self, id: SegmentId) -> Option<&Commits> {
        let open = self.open.as_ref().filter(|open| open.id == id).map(|open| &open.commits);
        open.or_else(|| {
            self.sealed.iter().find(|sealed| sealed.id == id).map(|sealed| &sealed.commits)
        })
    }

    fn commits_mut(&mut self, id: SegmentId) -> Option<&mut Commits> {
        let open = self.open.as_mut().filter(|open| open.id == id).map(|open| &mut open.commits);
        open.or_else(|| {
            self.sealed.iter_mut().find(|sealed| sealed.id == id).map(|sealed| &mut sealed.commits)
        })
    }

    /// Asks for everything up to a position to be made durable.
    pub(crate) fn want(&mut self, position: Position) {
        if position > self.durable_to && self.flush_wanted.insert(position) {
            self.events.wanted += 1;
        }
    }

    /// Whether a flush of the device would serve a request.
    pub(crate) fn is_flush_due(&self) -> bool {
        self.flush_wanted.first().is_some_and(|&wanted| wanted <= self.written_position())
    }

    /// Whether a request waits for blocks of the open segment that no commit holds.
    fn wants_commit(&self) -> bool {
        let Some(&wanted) = self.flush_wanted.last() else { return false };
        self.open.as_ref().is_some_and(|open| {
            wanted.id() == open.id && wanted > Position::within(open.id, open.commits.frozen())
        })
    }

    /// What is to be written next, if it may be: the rest of the oldest sealed segment, or a
    /// commit. While the write must wait for a flush of the device, that flush is asked for.
    pub(crate) fn start_next_job(&mut self) -> Option<Job> {
        let id = self.next_to_append()?;
        // A power cut may lose any of the segments that are not durable. Recovery takes a gap that
        // is longer than this window for corruption.
        let window = self.geometry.write_window();
        if id.since(self.durable()) > window && self.rules.keep(Rule::LossWindowKept) {
            self.want(Position::end_of(id.minus(window)));
            return None;
        }
        // A read of what the slot held may be under way. Its end wakes the appender.
        if self.is_pinned(self.geometry.slot_of(id)) && self.rules.keep(Rule::PinsRespected) {
            return None;
        }
        self.start_job(id)
    }

    /// The oldest segment with something to write, as far as its commits allow it.
    fn next_to_append(&mut self) -> Option<SegmentId> {
        let waits = self.rules.keep(Rule::CommitReplacedOnlyWhenDurable);
        let sealed = self.sealed.iter().filter(|sealed| !sealed.started);
        let sealed = sealed.map(|sealed| (sealed.id, &sealed.commits));
        let open = self.open.as_ref().filter(|_| self.wants_commit());
        let open = open.map(|open| (open.id, &open.commits));
        let mut waits_for = None;
        let found = sealed.chain(open).find(|(id, commits)| {
            if let (Some(commit), true) = (commits.undurable(), waits) {
                waits_for.get_or_insert(Position::within(*id, commit.length));
            }
            commits.may_be_replaced() || !waits && !commits.is_under_way()
        });
        let found = found.map(|(id, _)| id);
        waits_for.into_iter().for_each(|position| self.want(position));
        found
    }

    fn start_job(&mut self, id: SegmentId) -> Option<Job> {
        if self.open.as_ref().is_some_and(|open| open.id == id) {
            return self.start_commit();
        }
        let sealed = self.sealed.iter_mut().find(|sealed| sealed.id == id)?;
        sealed.started = true;
        if !self.rules.keep(Rule::HeadKeptUntilWritten) {
            sealed.frame.clear();
        }
        let (reason, first, length) = (sealed.reason, sealed.commits.frozen(), sealed.length);
        let data = SharedBuf::part_of(sealed.frame.clone(), blocks(first, length));
        let (before, lost) = (sealed.commits.written(), sealed.lost);
        let metablocks = self.metablocks(self.geometry.slot_of(id), length, lost);
        Some(Job { id, reason, metablocks, first, data, before, may_be_durable: false })
    }

    fn start_commit(&mut self) -> Option<Job> {
        let durable = self.durable();
        let open = self.open.as_mut()?;
        let (id, length, lost) = (open.id, open.length, open.lost);
        let before = open.commits.written();
        let first = open.commits.begin(length);
        // The segment goes on changing after these blocks.
        let data = IoBuf::copy_of(&open.frame.as_ref()[blocks(first, length)]).into();
        let metablocks = self.metablocks(self.geometry.slot_of(id), length, lost);
        // Of this segment, the last commit is durable: otherwise no other would begin.
        let may_be_durable = id == durable.next() || !self.rules.keep(Rule::DurableWithoutGap);
        Some(Job { id, reason: Reason::Open, metablocks, first, data, before, may_be_durable })
    }

    /// The entries of the first blocks of a segment in RAM, with a CRC where it is known.
    fn metablocks(&self, slot: Slot, length: u8, lost: LostPlaces) -> Vec<Metablock> {
        let entry = |index| {
            let place = Place { slot, index };
            let (block, dirty) = self.index.at(place).expect("every place up to length is taken");
            Metablock { block, dirty, crc: self.index.crc(place), lost: lost.has(index) }
        };
        (0..length).map(entry).collect()
    }

    /// A job has reached the device.
    pub(crate) fn appended(&mut self, job: &Appended) {
        let Appended { id, first, crcs, commit, is_durable } = job;
        let slot = self.geometry.slot_of(*id);
        for (index, &crc) in (*first..).zip(crcs) {
            self.index.set_crc(Place { slot, index }, crc);
        }
        match (commit, self.commits_mut(*id)) {
            (Some(commit), Some(commits)) => commits.wrote(*commit),
            (Some(_), None) => {}
            (None, _) => self.segment_written(*id),
        }
        if let (Some(commit), true) = (commit, is_durable) {
            self.made_durable(Position::within(*id, commit.length));
        }
        self.events.appended += 1;
        if self.written.since(self.durable()) >= MAX_UNDURABLE {
            self.want(Position::end_of(self.written));
        }
    }

    /// All of a sealed segment has reached the device. Frees the RAM of all segments that lie there
    /// without a gap.
    pub(super) fn segment_written(&mut self, id: SegmentId) {
        if let Some(segment) = self.sealed.iter_mut().find(|segment| segment.id == id) {
            segment.written = true;
        }
        if !self.rules.keep(Rule::WrittenWithoutGap) {
            self.written = self.written.max(id);
        }
        while let Some(segment) = self.sealed.pop_front_if(|segment| segment.written) {
            self.written = segment.id;
            segment.frame.clear();
        }
    }

    /// Everything up to a position survives a power cut.
    pub(crate) fn made_durable(&mut self, position: Position) {
        self.durable_to = self.durable_to.max(position);
        self.flush_wanted = self.flush_wanted.split_off(&self.durable_to);
        self.flush_wanted.remove(&self.durable_to);
        let id = position.id();
        if let Some(commits) = self.commits_mut(id) {
            commits.made_durable(|commit| Position::within(id, commit.length) <= position);
        }
    }
}

/// Where the blocks from `first` up to `length` lie in the data of a segment.
fn blocks(first: u8, length: u8) -> Range<usize> {
    BLOCK_BYTES * usize::from(first)..BLOCK_BYTES * usize::from(length)
}
