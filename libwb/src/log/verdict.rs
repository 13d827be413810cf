//! What one slot holds, and what that proves.

use super::superblock::Superblock;
use crate::device::DeviceError;
use crate::format::{HeaderFault, SegmentExtension, SegmentId, Slot};

/// Why a slot holds no valid segment.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotFault {
    /// A field of the header has an invalid value.
    #[error(transparent)]
    Header(#[from] HeaderFault),
    /// The segment's id belongs to another slot.
    #[error("segment {id} does not belong in this slot")]
    WrongSlot {
        /// The id found.
        id: SegmentId,
        /// Whether the checksum is correct.
        sound: bool,
    },
    /// The checksum does not match.
    #[error("segment {id} has a wrong checksum")]
    Checksum {
        /// The id found.
        id: SegmentId,
    },
    /// Only its first blocks verify, and no power cut explains that.
    #[error("segment {id} has a wrong checksum; only its first {length} blocks can be proved")]
    CutShort {
        /// The id found.
        id: SegmentId,
        /// The number of blocks in its last commit that verifies.
        length: u8,
    },
    /// Even the commit before the newest one fails, though it was durable when the header was
    /// written.
    #[error(
        "segment {id} has a wrong checksum, even up to the flush before its last, after {length} \
         blocks"
    )]
    Commit {
        /// The id found.
        id: SegmentId,
        /// The number of blocks in that commit.
        length: u8,
    },
    /// The device failed to read the slot.
    #[error(transparent)]
    Unreadable(#[from] DeviceError),
}

/// What a slot holds.
#[derive(Clone, Debug)]
pub enum SlotState {
    /// Never written.
    Empty,
    /// A segment whose id belongs in this slot and whose checksum is correct.
    Valid {
        /// Its id.
        id: SegmentId,
        /// Its number of data blocks.
        length: u8,
        /// What its header says beyond the base format.
        extension: Option<SegmentExtension>,
        /// Only a commit of it verifies. The blocks after that commit are torn.
        cut_short: bool,
        /// The padding of the first sector holds neither the kernel module's zeros nor wb's marker.
        is_stray: bool,
    },
    /// Anything else.
    Invalid {
        /// What is wrong.
        fault: SlotFault,
        /// The segment in the header's first sector, if its CRC is correct and the segment belongs
        /// in this slot.
        proved: Option<(SegmentId, SegmentExtension)>,
        /// The id in the header, if the padding of the first sector holds neither the kernel
        /// module's zeros nor wb's marker.
        stray: Option<u64>,
    },
}

impl SlotState {
    /// A slot whose fault alone is known.
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

/// A valid segment: its id, and its extension if it has one.
pub(super) type Valid = (SegmentId, Option<SegmentExtension>);

/// A slot's segment, if it is valid and belongs to this cache, not to an earlier one.
pub(super) fn valid(state: &SlotState, superblock: &Superblock) -> Option<Valid> {
    let SlotState::Valid { id, extension, .. } = state else { return None };
    if stray(state, superblock).is_some() {
        return None;
    }
    let foreign = extension.as_ref().is_some_and(|its| is_foreign(superblock, its));
    (!foreign).then_some((*id, *extension))
}

/// The id in a header that has neither wb's marker nor the kernel module's zeros. On a device with
/// the extension such a header is damaged.
pub(super) fn stray(state: &SlotState, superblock: &Superblock) -> Option<u64> {
    let names = match *state {
        SlotState::Valid { id, is_stray: true, .. } => Some(id.0),
        SlotState::Invalid { stray, .. } => stray,
        SlotState::Valid { .. } | SlotState::Empty => None,
    };
    names.filter(|_| superblock.extension.is_some())
}

/// The segment of this cache whose header in the slot has a correct CRC, whether the segment is
/// valid or not.
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

/// Whether a segment belongs to an earlier cache on the device.
fn is_foreign(superblock: &Superblock, extension: &SegmentExtension) -> bool {
    superblock.extension.as_ref().is_some_and(|ours| ours.digest() != extension.digest)
}

/// The index of a slot in a scan's verdicts.
pub(super) fn slot_index(slot: Slot) -> usize {
    slot.0 as usize
}
