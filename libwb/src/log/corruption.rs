//! Damage to the log that a power cut does not explain.

use crate::format::{SegmentId, Slot};

/// Damage to the log that a power cut does not explain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corruption {
    /// Valid segments lie too far beyond the last one that can be applied.
    #[error(
        "segment {missing} is missing or damaged, though valid segments reach up to {highest}; a \
         power cut loses at most the last {window}"
    )]
    Gap {
        /// The first segment that is not there.
        missing: SegmentId,
        /// The largest valid id.
        highest: SegmentId,
        /// How many a power cut may lose.
        window: u64,
    },
    /// A segment is gone that was known to be durable.
    #[error(
        "segment {missing} is missing or damaged, though everything up to segment {durable} was \
         durable"
    )]
    DurableMissing {
        /// The first segment that is not there.
        missing: SegmentId,
        /// What a later header says was durable.
        durable: SegmentId,
    },
    /// The superblock record names a segment that the log has not reached.
    #[error(
        "the superblock record says that segment {record} is written back, but the newest segment \
         is {highest}"
    )]
    RecordBeyondLog {
        /// The record.
        record: SegmentId,
        /// The largest valid id.
        highest: SegmentId,
    },
    /// A sound segment stands where it cannot have been written on a device of this size.
    #[error(
        "slot {slot} holds segment {id}, which belongs elsewhere; has the device been truncated \
         or resized?"
    )]
    WrongSlot {
        /// Where.
        slot: Slot,
        /// The segment.
        id: SegmentId,
    },
    /// A slot that may hold live data cannot be read.
    #[error(
        "slot {slot} cannot be read, and what it holds may not be written back; the device is \
         failing, or was not ready"
    )]
    Unreadable {
        /// Where.
        slot: Slot,
    },
    /// The kernel module has gone on with a log of wb that had a hole from a power cut.
    #[error(
        "segment {missing} was lost in a power cut, and the kernel module has written after it, \
         up to segment {highest}"
    )]
    WrittenPastHole {
        /// The segment that is not there.
        missing: SegmentId,
        /// The largest valid id.
        highest: SegmentId,
    },
    /// The log has nearly run out of ids, which no real one does.
    #[error("the log goes on at segment {id}, which none reaches")]
    GarbageId {
        /// The recovery point.
        id: SegmentId,
    },
    /// Segments of wb, or a record, but no superblock extension.
    #[error(
        "both copies of the superblock extension are gone or damaged, so that it cannot be told \
         to which backing device the log belongs"
    )]
    PairingLost,
    /// A slot holds garbage that no write under way explains.
    #[error("slot {slot} holds no valid segment, and no power cut explains that")]
    Unexplained {
        /// Where.
        slot: Slot,
    },
}
