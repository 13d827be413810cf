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
        /// The first missing segment.
        missing: SegmentId,
        /// The largest valid id.
        highest: SegmentId,
        /// How many segments a power cut may lose.
        window: u64,
    },
    /// A segment is missing that was known to be durable.
    #[error(
        "segment {missing} is missing or damaged, though everything up to segment {durable} was \
         durable"
    )]
    DurableMissing {
        /// The first missing segment.
        missing: SegmentId,
        /// The last segment that a header claims as durable.
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
    /// A sound segment lies where wb cannot have written it on a device of this size.
    #[error(
        "slot {slot} holds segment {id}, which belongs elsewhere; has the device been truncated \
         or resized?"
    )]
    WrongSlot {
        /// The slot.
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
        /// The slot.
        slot: Slot,
    },
    /// The kernel module has continued a log of wb after a hole that a power cut left.
    #[error(
        "segment {missing} was lost in a power cut, and the kernel module has written after it, \
         up to segment {highest}"
    )]
    WrittenPastHole {
        /// The missing segment.
        missing: SegmentId,
        /// The largest valid id.
        highest: SegmentId,
    },
    /// The log ends at an id that no real log reaches.
    #[error("the log ends at segment {id}, an id that no real log reaches")]
    GarbageId {
        /// The recovery point.
        id: SegmentId,
    },
    /// Segments or a record of wb exist, but no superblock extension.
    #[error(
        "both copies of the superblock extension are gone or damaged, so nothing tells which \
         backing device the log belongs to"
    )]
    PairingLost,
    /// A slot holds garbage that no interrupted write explains.
    #[error("slot {slot} holds no valid segment, and no power cut explains that")]
    Unexplained {
        /// The slot.
        slot: Slot,
    },
}
