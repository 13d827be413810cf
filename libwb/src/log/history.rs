//! All versions of one block that the log still holds.

use super::LogError;
use super::scan::SlotContent;
use crate::device::{Device, IoBuf};
use crate::format::{BLOCK_BYTES, BlockNo, DirtyBits, Geometry, Place, SegmentId, Slot};

/// One version of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The segment that its header names.
    pub id: SegmentId,
    /// The place of its data.
    pub place: Place,
    /// Its dirty sectors; none for a version from read caching.
    pub dirty: DirtyBits,
    /// Whether the segment is valid. If it is not, neither this version nor its data can be
    /// trusted.
    pub valid: bool,
}

/// Collects the versions of a block during a scan.
#[derive(Debug)]
pub struct History {
    block: BlockNo,
    versions: Vec<Version>,
}

impl History {
    /// A history of this block, still empty.
    pub fn of(block: BlockNo) -> History {
        History { block, versions: Vec::new() }
    }

    /// Adds the versions in a slot. The order of the slots does not matter.
    pub fn visit(&mut self, slot: Slot, content: &SlotContent) {
        let Some(header) = &content.header else { return };
        let valid = content.state.valid_id().is_some();
        for (index, entry) in (0u8..).zip(&header.metablocks) {
            if entry.block == self.block {
                let place = Place { slot, index };
                self.versions.push(Version { id: header.id, place, dirty: entry.dirty, valid });
            }
        }
    }

    /// The versions found, oldest first.
    pub fn into_versions(mut self) -> Vec<Version> {
        self.versions.sort_by_key(|v| (v.id, v.place));
        self.versions
    }
}

/// Reads the data block of a version. Only its dirty sectors are newer than the backing device.
///
/// # Errors
/// When the device fails.
pub async fn read_version(
    device: &Device,
    geometry: Geometry,
    version: &Version,
) -> Result<IoBuf, LogError> {
    Ok(device.read(geometry.place_offset(version.place), IoBuf::zeroed(BLOCK_BYTES)).await?)
}
