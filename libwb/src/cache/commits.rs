//! Commits: how far the segment that is still open has come on the device. A flush makes one, where
//! the cache device carries the extension: the blocks that were added since the last one, and the
//! header anew.
//!
//! A header that replaces that of a commit is written only when that one is durable, or a power cut
//! might leave neither. So of each segment one commit at a time is on its way, and flushes that
//! come meanwhile share the next.

use super::state::State;
use crate::device::{IoBuf, SharedBuf};
use crate::format::{BLOCK_BYTES, Commit, Metablock, Place, Reason, SegmentId, Slot};
use crate::planted::Bug;
use std::ops::Range;

/// A place in the order of the log: after so many blocks of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) id: SegmentId,
    /// In blocks, or [`Position::CLOSED`].
    length: u8,
}

impl Position {
    /// After all blocks that there will ever be, and the segment is closed.
    const CLOSED: u8 = u8::MAX;

    /// After a whole segment.
    pub(super) const fn end_of(id: SegmentId) -> Position {
        Position { id, length: Position::CLOSED }
    }

    /// The last segment that lies before it as a whole.
    pub(super) fn whole_segments(self) -> SegmentId {
        if self.length == Position::CLOSED { self.id } else { self.id.minus(1) }
    }
}

/// What of a segment has gone to the device, or is on its way, before the segment is closed.
#[derive(Default)]
pub(super) struct Commits {
    /// How many blocks belong to commits. Nothing in them, nor their entries, changes any more.
    frozen: u8,
    durable: Option<Commit>,
    /// The one that is not known to be durable.
    newest: Newest,
}

#[derive(Default)]
enum Newest {
    #[default]
    None,
    UnderWay,
    Written(Commit),
}

impl Commits {
    /// Whether this place belongs to a commit.
    pub(super) fn has(&self, place: Place) -> bool {
        place.index < self.frozen
    }

    fn written(&self) -> Option<Commit> {
        match self.newest {
            Newest::Written(commit) => Some(commit),
            Newest::None | Newest::UnderWay => self.durable,
        }
    }

    /// Whether the header may be written anew.
    fn may_be_replaced(&self) -> bool {
        matches!(self.newest, Newest::None)
    }
}

/// Which places of a segment in RAM hold blocks that are lost: their entries get a CRC that the
/// data does not match.
#[derive(Clone, Copy, Default)]
pub(super) struct Lost(u128);

impl Lost {
    pub(super) fn add(&mut self, index: u8) {
        self.0 |= 1 << index;
    }

    pub(super) fn has(self, index: u8) -> bool {
        self.0 >> index & 1 == 1
    }
}

/// Something to be written to the device: a commit, or the rest of a sealed segment.
pub(super) struct Job {
    pub(super) id: SegmentId,
    /// [`Reason::Open`] for a commit.
    pub(super) reason: Reason,
    /// Of all its blocks. Those that were written before have their CRCs.
    pub(super) metablocks: Vec<Metablock>,
    /// How many those are.
    pub(super) first: u8,
    /// The data of the others.
    pub(super) data: SharedBuf,
    /// The last commit. It is durable.
    pub(super) before: Option<Commit>,
}

impl State {
    /// Where the newest block lies.
    pub(super) fn newest_position(&self) -> Position {
        match &self.open {
            Some(open) => Position { id: open.id, length: open.length },
            None => Position::end_of(self.newest),
        }
    }

    /// What is on the device, perhaps in its volatile cache, without a gap.
    pub(super) fn written_position(&self) -> Position {
        let id = self.written.next();
        let commit = self.commits(id).and_then(Commits::written);
        commit
            .map_or(Position::end_of(self.written), |Commit { length, .. }| Position { id, length })
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

    /// Somebody wants everything up to here to be durable.
    pub(super) fn want(&mut self, position: Position) {
        if position > self.durable_to {
            self.flush_wanted.insert(position);
        }
    }

    /// Whether somebody waits for blocks of the open segment that no commit holds.
    fn wants_commit(&self) -> bool {
        let wanted = self.flush_wanted.last();
        let beyond = |wanted: &Position| {
            self.open
                .as_ref()
                .is_some_and(|open| wanted.id == open.id && wanted.length > open.commits.frozen)
        };
        wanted.is_some_and(beyond)
    }

    /// The oldest segment of which something is to be written, and may be as far as its commits go.
    pub(super) fn next_to_append(&mut self) -> Option<SegmentId> {
        let forgiven = self.planted.has(Bug::CommitOverUndurable);
        let sealed = self
            .sealed
            .iter()
            .filter(|sealed| !sealed.started)
            .map(|sealed| (sealed.id, &sealed.commits));
        let open =
            self.open.as_ref().filter(|_| self.wants_commit()).map(|open| (open.id, &open.commits));
        let mut waits_for = None;
        let found = sealed.chain(open).find(|(id, commits)| {
            if let (Newest::Written(commit), false) = (&commits.newest, forgiven) {
                waits_for.get_or_insert(Position { id: *id, length: commit.length });
            }
            commits.may_be_replaced() || forgiven && !matches!(commits.newest, Newest::UnderWay)
        });
        let found = found.map(|(id, _)| id);
        waits_for.into_iter().for_each(|position| self.want(position));
        found
    }

    /// What is to be written of a segment that [`State::next_to_append`] has named.
    pub(super) fn start_job(&mut self, id: SegmentId) -> Option<Job> {
        if self.open.as_ref().is_some_and(|open| open.id == id) {
            return self.start_commit();
        }
        let sealed = self.sealed.iter_mut().find(|sealed| sealed.id == id)?;
        sealed.started = true;
        let (reason, first, length) = (sealed.reason, sealed.commits.frozen, sealed.length);
        let data = SharedBuf::part_of(sealed.buf.clone(), blocks(first, length));
        let (before, lost) = (sealed.commits.written(), sealed.lost);
        let slot = self.geometry.slot_of(id);
        Some(Job {
            id,
            reason,
            metablocks: self.metablocks(slot, length, lost),
            first,
            data,
            before,
        })
    }

    fn start_commit(&mut self) -> Option<Job> {
        let open = self.open.as_mut()?;
        let (id, length, lost) = (open.id, open.length, open.lost);
        let first = std::mem::replace(&mut open.commits.frozen, length);
        let before = open.commits.written();
        open.commits.newest = Newest::UnderWay;
        // The segment goes on changing after these blocks.
        let data = IoBuf::copy_of(&open.buf[blocks(first, length)]).into();
        let slot = self.geometry.slot_of(id);
        let (reason, metablocks) = (Reason::Open, self.metablocks(slot, length, lost));
        Some(Job { id, reason, metablocks, first, data, before })
    }

    /// The entries of the first blocks of a segment in RAM; with a CRC where that is known.
    fn metablocks(&self, slot: Slot, length: u8, lost: Lost) -> Vec<Metablock> {
        let entry = |index| {
            let place = Place { slot, index };
            let (block, dirty) =
                self.index.at(place).expect("every place up to the length was taken");
            Metablock { block, dirty, crc: self.index.crc(place), lost: lost.has(index) }
        };
        (0..length).map(entry).collect()
    }

    /// A commit has reached the device.
    pub(super) fn commit_written(&mut self, id: SegmentId, commit: Commit) {
        if let Some(commits) = self.commits_mut(id) {
            commits.newest = Newest::Written(commit);
        }
    }

    /// Everything up to here survives a power cut.
    pub(super) fn made_durable(&mut self, position: Position) {
        self.durable_to = self.durable_to.max(position);
        self.durable = self.durable_to.whole_segments();
        self.flush_wanted = self.flush_wanted.split_off(&self.durable_to);
        self.flush_wanted.remove(&self.durable_to);
        if let Some(commits) = self.commits_mut(position.id)
            && let Newest::Written(commit) = commits.newest
            && commit.length <= position.length
        {
            commits.durable = Some(commit);
            commits.newest = Newest::None;
        }
    }
}

/// Where the blocks from the `first` on, up to `length`, lie in the buffer of a segment.
fn blocks(first: u8, length: u8) -> Range<usize> {
    BLOCK_BYTES * (1 + usize::from(first))..BLOCK_BYTES * (1 + usize::from(length))
}
