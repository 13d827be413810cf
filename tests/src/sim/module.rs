//! What the kernel module would show of a volume if it took over the devices now. It recovers as
//! wb(5) describes.

use super::devices::record_of;
use futures_lite::future::block_on;
use libwb::device::{Device, MemDevice};
use libwb::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, Place, SECTOR_BYTES, SegmentHeader, SegmentId,
    to_u64, to_usize,
};
use libwb::log::salvage::Scanned;
use libwb::log::{LogError, Use};
use std::collections::HashMap;
use std::sync::Arc;

/// A version of a block that the module's recovery finds.
struct Version {
    id: SegmentId,
    dirty: DirtyBits,
    /// Where its data lies on the cache device.
    at: usize,
}

impl Version {
    fn is_partial(&self) -> bool {
        !self.dirty.is_clean() && !self.dirty.is_all()
    }

    fn copy(&self, cache: &[u8], block: BlockNo, sectors: DirtyBits, to: &mut [u8]) {
        for (first, count) in sectors.runs() {
            let from = self.at + first * SECTOR_BYTES;
            let start = to_usize(block.bytes()) + first * SECTOR_BYTES;
            // A volume may end within its last block.
            let length = (count * SECTOR_BYTES).min(to.len().saturating_sub(start));
            to[start..][..length].copy_from_slice(&cache[from..][..length]);
        }
    }
}

/// Repairs a cache device as `wbcheck --repair` does.
///
/// # Errors
/// When it is corrupt, or fails.
pub async fn repair(cache: &Device) -> Result<(), LogError> {
    if let Some(plan) = Scanned::read(cache, Use::Write, |_| ()).await?.repair(cache).await? {
        plan.apply(cache).await?;
    }
    Ok(())
}

/// The whole volume as the module shows it after a repair. A second repair must find nothing to do.
///
/// # Errors
/// When the log is corrupt, or as [`volume`].
pub fn volume_after_repair(cache: Vec<u8>, backing: Vec<u8>) -> Result<Vec<u8>, String> {
    let memory = Arc::new(MemDevice::with_content("cache", cache));
    let device: Device = memory.clone();
    let repaired = block_on(async {
        repair(&device).await?;
        Scanned::read(&device, Use::Write, |_| ()).await?.repair(&device).await
    });
    match repaired.map_err(|e| e.to_string())? {
        None => volume(&memory.content(), backing),
        Some(plan) => Err(format!("after a repair, there is this to repair: {:?}", plan.changes())),
    }
}

/// The whole volume as the module shows it.
///
/// # Errors
/// When the module would reject the log or some of it.
pub fn volume(cache: &[u8], mut backing: Vec<u8>) -> Result<Vec<u8>, String> {
    let geometry = Geometry::of_device(to_u64(cache.len())).map_err(|e| e.to_string())?;
    let header_at =
        |offset: usize| -> &[u8; BLOCK_BYTES] { cache[offset..].first_chunk().expect("a block") };
    let offsets = geometry.all_slots().map(|slot| (slot, to_usize(geometry.slot_offset(slot))));
    let mut segments = Vec::new();
    for (slot, offset) in offsets {
        let header =
            SegmentHeader::decode(header_at(offset)).map_err(|e| format!("slot {slot}: {e}"))?;
        let data = &cache[offset + BLOCK_BYTES..][..header.data_bytes()];
        if header.id != SegmentId::NONE && !header.verify(header_at(offset), data) {
            return Err(format!("the kernel module gives up the log at slot {slot}"));
        }
        segments.push((slot, header));
    }
    // The module begins after the newest segment. On a device that wb closed, the oldest segments
    // follow it.
    segments.sort_by_key(|(_, header)| header.id);
    let mut newest: HashMap<BlockNo, Version> = HashMap::new();
    for (slot, header) in &segments {
        for (index, entry) in (0..).zip(&header.metablocks) {
            let at = to_usize(geometry.place_offset(Place { slot: *slot, index }));
            let version = Version { id: header.id, dirty: entry.dirty, at };
            // The module writes this back whatever the record says.
            if let Some(old) = newest.get(&entry.block).filter(|_| version.is_partial()) {
                old.copy(cache, entry.block, old.dirty, &mut backing);
            }
            newest.insert(entry.block, version);
        }
    }
    let highest = segments.last().map_or(SegmentId::NONE, |(_, header)| header.id);
    let written_back = record_of(cache).max(highest.minus(geometry.lap()));
    let mut volume = backing;
    for (block, version) in newest {
        if !version.is_partial() {
            version.copy(cache, block, DirtyBits::ALL, &mut volume);
        } else if version.id > written_back {
            version.copy(cache, block, version.dirty, &mut volume);
        }
    }
    Ok(volume)
}
