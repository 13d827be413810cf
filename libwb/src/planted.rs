//! Known bugs that the simulator's tests plant, to prove that it finds each of them.
//!
//! Where a bug can be planted, the code asks [`Planted::has`]. Without the feature `sim` the answer
//! is a constant, and nothing of this is left.

#![cfg_attr(
    not(feature = "sim"),
    allow(unreachable_pub, reason = "exported with the feature alone")
)]

/// A bug that can be planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A flush is acknowledged as soon as the segments are written, before the device flush.
    FlushAcknowledgedEarly,
    /// The superblock record is not flushed before the slots that it frees are reused.
    RecordNotDurable,
    /// The backing device is not flushed before the record says that segments are written back.
    BackingNotFlushed,
    /// Recovery applies what lies above a gap.
    GapSkipped,
    /// A write to part of a block drops the dirty sectors of the version before it.
    MergeDropsOldSectors,
    /// A slot is overwritten while a read of what it held is under way.
    PinsIgnored,
    /// Segments are written back that are not durable yet.
    VolatileWrittenBack,
    /// Write-back leaves out versions of which a newer one exists, in the same batch or not.
    SupersededLeftOut,
    /// Write-back leaves out versions of which a newer one is durable, though that is not in the
    /// same batch.
    DurableSupersedes,
    /// Segments that recovery dropped stay on the device.
    DroppedNotErased,
    /// The appender runs ahead of the last flush without bound.
    LossWindowIgnored,
    /// The header of a segment is written anew before its last commit is durable.
    CommitOverUndurable,
    /// A block that belongs to a commit is overwritten in place.
    CommittedOverwritten,
    /// What was written by the end of a flush of the device counts as durable, not what was by its
    /// beginning.
    CommitCountedLate,
    /// A segment of which only a commit was found stays as it is when the log goes on.
    OpenEndLeft,
    /// Recovery applies what lies above a segment that is cut short.
    CutShortIgnored,
    /// Recovery trusts segments that nothing says were durable.
    UnclaimedTrusted,
    /// A segment counts as written although one before it is not.
    WrittenOverGap,
    /// A failed flush of the cache device is tried again, as if nothing had been lost by it.
    FailedFlushForgiven,
    /// Data from the cache device is served whatever its CRC says.
    RotServed,
    /// A header says that all before it was durable.
    DurableClaimedEarly,
    /// The backing device is not flushed before a discard is acknowledged.
    DiscardNotFlushed,
    /// A discard leaves dirty data in the log.
    DiscardLeavesDirty,
    /// A place that has held the zeros of a discard still counts as that when its slot is used
    /// again.
    DiscardOutlivesSlot,
    /// A discard takes effect before earlier writes are durable.
    DiscardAheadOfLog,
    /// A segment that is to be emptied and cannot be read is left as it is, and counts as emptied.
    UnreadableLeft,
    /// A segment that reads as empty counts as emptied, though the write or the flush of that
    /// failed.
    HalfEmptiedTrusted,
    /// Strict order takes more than one epoch at a time.
    EpochsMixed,
    /// Writes do not wait for a discard of the same range.
    FenceIgnored,
    /// A write goes around the log though that holds an older version of its block.
    DirectOverLogged,
    /// A write that went around the log is acknowledged before the backing device is flushed.
    DirectNotFlushed,
    /// A write goes around the log before earlier writes are durable there.
    DirectAheadOfLog,
    /// A write around the log leaves the older version that is cached.
    DirectLeavesCached,
    /// A write around the log leaves the cell of its block as it is.
    CellOutlivesDirect,
    /// A write leaves the cell of its block as it is, so that older data is staged.
    CellOutlivesWrite,
    /// A discard leaves the cells of its blocks as they are.
    CellOutlivesDiscard,
    /// A block that could not be written back counts as moved before that is durable.
    MovedNotDurable,
    /// A block that could not be written back is left behind.
    StuckLeftBehind,
    /// A block that is lost is moved as if its data were right.
    LostTrusted,
    /// Recovery takes rot for the work of a power cut. The engine knows nothing of it; the check of
    /// flipped bits does.
    RotForgiven,
}

/// The bug that an open cache has, if any.
#[derive(Clone, Copy, Debug, Default)]
pub struct Planted {
    #[cfg(feature = "sim")]
    bug: Option<Bug>,
}

impl Planted {
    /// Plants a bug.
    #[cfg(feature = "sim")]
    pub fn new(bug: Bug) -> Planted {
        Planted { bug: Some(bug) }
    }

    /// Whether this is the bug.
    pub(crate) fn has(self, bug: Bug) -> bool {
        #[cfg(feature = "sim")]
        return self.bug == Some(bug);
        #[cfg(not(feature = "sim"))]
        {
            let _ = bug;
            false
        }
    }
}
