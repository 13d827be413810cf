//! Segments in memory: the open one, and the sealed ones on their way to the device.

use crate::cache::head::Frame;
use crate::format::{Commit, Place, Reason, SegmentId};
use std::sync::Arc;

/// The segment that takes new blocks.
pub(super) struct OpenSegment {
    pub(super) id: SegmentId,
    pub(super) length: u8,
    pub(super) frame: Frame,
    pub(super) commits: Commits,
    pub(super) lost: LostPlaces,
}

/// A segment on its way to the device. Nothing in it changes any more.
pub(super) struct SealedSegment {
    pub(super) id: SegmentId,
    pub(super) reason: Reason,
    pub(super) length: u8,
    pub(super) frame: Arc<Frame>,
    pub(super) commits: Commits,
    pub(super) lost: LostPlaces,
    pub(super) started: bool,
    pub(super) written: bool,
}

impl OpenSegment {
    pub(super) fn new(id: SegmentId, frame: Frame) -> OpenSegment {
        let (commits, lost) = Default::default();
        OpenSegment { id, length: 0, frame, commits, lost }
    }

    pub(super) fn seal(self, reason: Reason) -> SealedSegment {
        self.frame.seal(self.length, reason);
        self.sealed(reason)
    }

    /// The same segment, which its frame says is closed.
    pub(super) fn sealed(self, reason: Reason) -> SealedSegment {
        let OpenSegment { id, length, frame, commits, lost } = self;
        let frame = Arc::new(frame);
        SealedSegment { id, reason, length, frame, commits, lost, started: false, written: false }
    }
}

/// What of a segment the appender has written, or is writing, before the segment is closed.
///
/// A *commit* is a header that covers the blocks so far. The header is written anew only when the
/// last commit is durable: otherwise a power cut might leave neither. So each segment has at most
/// one commit under way, and flushes that come meanwhile share the next.
#[derive(Default)]
pub(super) struct Commits {
    /// How many blocks belong to commits. Neither they nor their entries change any more.
    frozen: u8,
    durable: Option<Commit>,
    /// The one that is not known to be durable.
    newest: NewestCommit,
}

#[derive(Default)]
enum NewestCommit {
    #[default]
    None,
    UnderWay,
    Written(Commit),
}

impl Commits {
    /// Of a segment that an earlier process has begun; its last commit is durable.
    pub(super) fn resumed(durable: Option<Commit>) -> Commits {
        let frozen = durable.map_or(0, |commit| commit.length);
        Commits { frozen, durable, newest: NewestCommit::None }
    }

    /// Whether this place belongs to a commit.
    pub(super) fn has(&self, place: Place) -> bool {
        place.index < self.frozen
    }

    /// How many blocks belong to commits.
    pub(super) fn frozen(&self) -> u8 {
        self.frozen
    }

    /// The last commit that is on the device, perhaps in its volatile cache.
    pub(super) fn written(&self) -> Option<Commit> {
        match self.newest {
            NewestCommit::Written(commit) => Some(commit),
            NewestCommit::None | NewestCommit::UnderWay => self.durable,
        }
    }

    /// The last commit, if it is written and not known to be durable.
    pub(super) fn undurable(&self) -> Option<Commit> {
        match self.newest {
            NewestCommit::Written(commit) => Some(commit),
            NewestCommit::None | NewestCommit::UnderWay => None,
        }
    }

    /// Whether the last commit is being written.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.newest, NewestCommit::UnderWay)
    }

    /// Whether the header may be written anew.
    pub(super) fn may_be_replaced(&self) -> bool {
        matches!(self.newest, NewestCommit::None)
    }

    /// Begins a commit of the first `length` blocks. Returns how many blocks earlier ones hold.
    pub(super) fn begin(&mut self, length: u8) -> u8 {
        self.newest = NewestCommit::UnderWay;
        std::mem::replace(&mut self.frozen, length)
    }

    /// The commit under way has reached the device.
    pub(super) fn wrote(&mut self, commit: Commit) {
        self.newest = NewestCommit::Written(commit);
    }

    /// Commits for which `is_covered` survive a power cut.
    pub(super) fn made_durable(&mut self, is_covered: impl Fn(Commit) -> bool) {
        if let NewestCommit::Written(commit) = self.newest
            && is_covered(commit)
        {
            self.durable = Some(commit);
            self.newest = NewestCommit::None;
        }
    }
}

/// Which places of a segment in memory hold lost blocks: their entries get a CRC that the data does
/// not match.
#[derive(Clone, Copy, Default)]
pub(super) struct LostPlaces(u128);

impl LostPlaces {
    pub(super) fn add(&mut self, index: u8) {
        self.0 |= 1 << index;
    }

    pub(super) fn has(self, index: u8) -> bool {
        self.0 >> index & 1 == 1
    }
}
