//! Places in the order of the log, finer than a segment.

use crate::format::SegmentId;

/// A place in the order of the log: after a number of blocks of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    id: SegmentId,
    /// In blocks, or [`Position::CLOSED`].
    length: u8,
}

impl Position {
    /// After all blocks that the segment will ever hold, and after it is closed.
    const CLOSED: u8 = u8::MAX;

    /// After a whole segment.
    pub(crate) const fn end_of(id: SegmentId) -> Position {
        Position { id, length: Position::CLOSED }
    }

    /// After the first `length` blocks of a segment.
    pub(crate) const fn within(id: SegmentId, length: u8) -> Position {
        Position { id, length }
    }

    #[inline]
    pub(crate) fn id(self) -> SegmentId {
        self.id
    }

    /// The last segment that lies before this position as a whole.
    #[inline]
    pub(crate) fn whole_segments(self) -> SegmentId {
        if self.length == Position::CLOSED { self.id } else { self.id.minus(1) }
    }
}
