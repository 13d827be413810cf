//! The verdicts on neighbouring slots, of all or of some.

use super::verdict::SlotState;
use crate::format::{Geometry, SegmentId, Slot, to_usize};

/// The verdicts on all slots of a device, or on as many as were read: neighbours, in the order of
/// the log, which goes on with the first slot after the last one. Slots that were not read count as
/// empty.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    geometry: Geometry,
    first: Slot,
    states: &'a [SlotState],
}

impl<'a> Part<'a> {
    /// The verdicts on all slots, in the order of the device.
    pub(super) fn all(geometry: Geometry, states: &'a [SlotState]) -> Part<'a> {
        assert_eq!(states.len(), geometry.all_slots().len());
        Part { geometry, first: Slot(0), states }
    }

    /// The verdicts on the slots of segment `first` and of those after it.
    pub(super) fn from(geometry: Geometry, first: SegmentId, states: &'a [SlotState]) -> Part<'a> {
        assert!(states.len() <= geometry.all_slots().len());
        Part { geometry, first: geometry.slot_of(first), states }
    }

    /// The same slots with other verdicts.
    pub(super) fn with<'b>(&self, states: &'b [SlotState]) -> Part<'b> {
        assert_eq!(states.len(), self.states.len());
        Part { geometry: self.geometry, first: self.first, states }
    }

    /// The verdicts, in the order of the log.
    pub(super) fn states(&self) -> &'a [SlotState] {
        self.states
    }

    /// What the slot of a segment holds.
    pub(super) fn at(&self, id: SegmentId) -> &'a SlotState {
        let (slot, first) = (self.geometry.slot_of(id), self.first);
        let after = match slot.0.checked_sub(first.0) {
            Some(after) => after,
            None => slot.0 + (self.geometry.slots() - first.0),
        };
        self.states.get(to_usize(after.into())).unwrap_or(&SlotState::Empty)
    }

    /// The slots and the verdicts on them, in the order of the log.
    pub(super) fn slots(&self) -> impl Iterator<Item = (Slot, &'a SlotState)> + use<'a> {
        let (first, slots) = (u64::from(self.first.0) + 1, self.geometry);
        (first..).map(move |id| slots.slot_of(SegmentId(id))).zip(self.states)
    }
}
