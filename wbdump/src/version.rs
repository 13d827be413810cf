//! Where one version of a block is stored, as the JSON of `block` and `blocks` has it.

use libwb::format::{BlockNo, DirtyBits, Geometry, Place};
use serde::Serialize;

#[derive(Serialize)]
pub(crate) struct StoredVersion {
    block: u64,
    sector: u64,
    id: u64,
    slot: u32,
    index: u8,
    data_offset_bytes: u64,
    dirty_bits: u8,
}

impl StoredVersion {
    /// A version that the segment `id` holds.
    pub(crate) fn new(
        geometry: Geometry,
        block: BlockNo,
        id: u64,
        place: Place,
        dirty: DirtyBits,
    ) -> StoredVersion {
        StoredVersion {
            block: block.0,
            sector: block.sector().0,
            id,
            slot: place.slot.0,
            index: place.index,
            data_offset_bytes: geometry.place_offset(place),
            dirty_bits: dirty.0,
        }
    }
}
