//! What headers claim about other segments, and what that proves.

use super::superblock::Superblock;
use super::verdict::{SlotState, Valid, proved, valid};
use crate::format::{Geometry, SegmentId};

/// What headers say beyond the base format, those of valid segments and torn ones: a first sector
/// that proves itself is as it was written. And what the clean mark says. Facts that were true
/// then, and stay true.
#[derive(Default)]
pub(super) struct Claims {
    /// Every segment up to this one was durable.
    pub(super) durable: SegmentId,
    /// Every segment up to this one was written back.
    pub(super) written_back: SegmentId,
}

impl Claims {
    pub(super) fn of(superblock: &Superblock, slots: &[SlotState]) -> Claims {
        let clean = superblock.extension.as_ref().and_then(|extension| extension.clean);
        // Closing in order makes everything durable as well, and that stays true whoever has
        // written since.
        let mut claims = Claims { durable: clean.unwrap_or_default(), ..Claims::default() };
        for (id, extension) in slots.iter().filter_map(|state| proved(state, superblock)) {
            // A header can only speak of segments before its own.
            let before = |claim: SegmentId| if claim < id { claim } else { SegmentId::NONE };
            claims.durable = claims.durable.max(before(extension.durable));
            claims.written_back = claims.written_back.max(before(extension.written_back));
        }
        claims
    }
}

/// What headers alone tell of the segments that need not be read whole.
pub(super) struct Proof {
    durable: SegmentId,
    written_back: SegmentId,
    highest: SegmentId,
    geometry: Geometry,
}

impl Proof {
    /// Nothing on a device that the kernel module has written since: it overwrites what it has not
    /// recorded as written back.
    pub(super) fn by_headers(superblock: &Superblock, slots: &[SlotState]) -> Option<Proof> {
        let geometry = superblock.geometry;
        let segments: Vec<Valid> =
            slots.iter().filter_map(|state| valid(state, superblock)).collect();
        let (highest, newest) = segments.iter().copied().max_by_key(|&(id, _)| id)?;
        newest?;
        let Claims { durable, written_back } = Claims::of(superblock, slots);
        let written_back = written_back.max(superblock.record).max(highest.minus(geometry.lap()));
        Some(Proof { durable, written_back, highest, geometry })
    }

    /// Whether a segment with a sound header is whole, but for rot: it was durable, and was not
    /// being overwritten.
    pub(super) fn covers(&self, id: SegmentId) -> bool {
        let Proof { durable, written_back, highest, geometry } = *self;
        let next = id.plus(geometry.lap());
        id <= durable && (id > written_back || next > highest.plus(geometry.write_window()))
    }
}
