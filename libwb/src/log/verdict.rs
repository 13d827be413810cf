//! What one slot holds, and what that proves.

use super::superblock::Superblock;
use crate::device::DeviceError;
use crate::format::{HeaderFault, SegmentExtension, SegmentId, Slot};

/// Why a slot holds no valid segment.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SlotFault {
    /// A field of the header holds a value that nothing valid can hold.
    #[error(transparent)]
    Header(#[from] HeaderFault),
    /// The segment's id belongs to another slot.
    #[error("segment {id} does not belong in this slot")]
    WrongSlot {
        /// The id found.
        id: SegmentId,
        /// Whether the checksum holds all the same.
        sound: bool,
    },
    /// The checksum does not match.
    #[error("segment {id} has a wrong checksum")]
    Checksum {
        /// The id found.
        id: SegmentId,
    },
    /// Only its first blocks are whole, and no power cut explains that.
    #[error("segment {id} has a wrong checksum; only its first {length} blocks can be proved")]
    CutShort {
        /// The id found.
        id: SegmentId,
        /// How many blocks its last commit covers.
        length: u8,
    },
    /// Not even the commit before the newest one verifies, which was durable when the header was
    /// written.
    #[error(
        "segment {id} has a wrong checksum, even up to the flush before its last, after {length} \
         blocks"
    )]
    Commit {
        /// The id found.
        id: SegmentId,
        /// How many blocks that commit covers.
        length: u8,
    },
    /// The device failed to read it.
    #[error(transparent)]
    Unreadable(#[from] DeviceError),
}

/// What a slot holds.
#[derive(Clone, Debug)]
pub enum SlotState {
    /// Never written.
    Empty,
    /// A segment whose id belongs here and whose checksum holds.
    Valid {
        /// Its id.
        id: SegmentId,
        /// How many data blocks it has.
        length: u8,
        /// What its header says beyond the base format.
        extension: Option<SegmentExtension>,
        /// It stands by a commit. What was written of it after that is torn.
        cut_short: bool,
        /// Where the kernel module leaves zeros in the first sector, there is something that wb has
        /// not written.
        is_stray: bool,
    },
    /// Something else.
    Invalid {
        /// What is wrong.
        fault: SlotFault,
        /// The header's first sector proves itself, and names a segment that belongs here.
        proved: Option<(SegmentId, SegmentExtension)>,
        /// Where the kernel module leaves zeros in the first sector, there is something that wb has
        /// not written: the id that the header names.
        stray: Option<u64>,
    },
}

impl SlotState {
    /// A slot of which nothing is known but what is wrong.
    pub(super) fn invalid(fault: impl Into<SlotFault>) -> SlotState {
        SlotState::Invalid { fault: fault.into(), proved: None, stray: None }
    }

    /// The id of a valid segment.
    pub fn valid_id(&self) -> Option<SegmentId> {
        match self {
            SlotState::Valid { id, .. } => Some(*id),
            _ => None,
        }
    }
}

pub(super) type Valid = (SegmentId, Option<SegmentExtension>);

/// A slot's segment, if it is valid and not one of an earlier cache on the device.
pub(super) fn valid(state: &SlotState, superblock: &Superblock) -> Option<Valid> {
    let SlotState::Valid { id, extension, .. } = state else { return None };
    if stray(state, superblock).is_some() {
        return None;
    }
    let foreign = extension.as_ref().is_some_and(|its| is_foreign(superblock, its));
    (!foreign).then_some((*id, *extension))
}

/// On a device with the extension, a header is damaged that has neither wb's marker nor the kernel
/// module's zeros: what id it names.
pub(super) fn stray(state: &SlotState, superblock: &Superblock) -> Option<u64> {
    let names = match *state {
        SlotState::Valid { id, is_stray: true, .. } => Some(id.0),
        SlotState::Invalid { stray, .. } => stray,
        SlotState::Valid { .. } | SlotState::Empty => None,
    };
    names.filter(|_| superblock.extension.is_some())
}

/// The segment of which a slot holds a header that proves itself, valid or not, if it is not one of
/// an earlier cache.
pub(super) fn proved(
    state: &SlotState,
    superblock: &Superblock,
) -> Option<(SegmentId, SegmentExtension)> {
    let found = match *state {
        SlotState::Valid { id, extension, .. } => extension.map(|extension| (id, extension)),
        SlotState::Invalid { proved, .. } => proved,
        SlotState::Empty => None,
    };
    found.filter(|(_, extension)| !is_foreign(superblock, extension))
}

fn is_foreign(superblock: &Superblock, extension: &SegmentExtension) -> bool {
    superblock.extension.as_ref().is_some_and(|ours| ours.digest() != extension.digest)
}

pub(super) fn slot_index(slot: Slot) -> usize {
    slot.0 as usize
}
