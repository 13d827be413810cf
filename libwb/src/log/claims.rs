//! What headers claim about earlier segments, and what that proves.

use super::superblock::Superblock;
use super::verdict::{SlotState, Valid, proved, valid};
use crate::format::{Geometry, SegmentId};

/// What headers and the clean mark say about the whole log.
///
/// A header counts if the CRC of its first sector is correct, even if its segment is torn. A claim
/// was true when it was written, and stays true.
#[derive(Default)]
pub(super) struct Claims {
    /// Every segment up to this one is durable.
    pub(super) durable: SegmentId,
    /// Every segment up to this one is written back.
    pub(super) written_back: SegmentId,
}

impl Claims {
    pub(super) fn of(superblock: &Superblock, slots: &[SlotState]) -> Claims {
        let clean = superblock.extension.as_ref().and_then(|extension| extension.clean);
        // A clean shutdown makes every segment durable. Later writes do not change that.
        let mut claims = Claims { durable: clean.unwrap_or_default(), ..Claims::default() };
        for (id, extension) in slots.iter().filter_map(|state| proved(state, superblock)) {
            // A header can only make claims about earlier segments.
            let before = |claim: SegmentId| if claim < id { claim } else { SegmentId::NONE };
            claims.durable = claims.durable.max(before(extension.durable));
            claims.written_back = claims.written_back.max(before(extension.written_back));
        }
        claims
    }
}

/// Which segments a scan need not read whole, because headers prove them.
pub(super) struct Proof {
    durable: SegmentId,
    written_back: SegmentId,
    highest: SegmentId,
    geometry: Geometry,
}

impl Proof {
    /// `None` if the kernel module wrote last: it overwrites segments without recording first that
    /// they are written back.
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

    /// Whether a segment with a sound header is whole, bit rot aside: it was durable, and was not
    /// being overwritten.
    pub(super) fn covers(&self, id: SegmentId) -> bool {
        let Proof { durable, written_back, highest, geometry } = *self;
        let next = id.plus(geometry.lap());
        id <= durable && (id > written_back || next > highest.plus(geometry.write_window()))
    }
}
