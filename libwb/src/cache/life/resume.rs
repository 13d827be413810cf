//! What an earlier process has left in the log's head, and whether it fits the cache.

use crate::cache::error::CacheError;
use crate::cache::head::{Entry, Frames, Head, HeadSegment, Owner};
use crate::cache::state::segment_log::{OnDevice, Resumed};
use crate::device::Device;
use crate::format::{Commit, Geometry, SegmentHeader, SegmentId};
use crate::log::bounds::first_outside;
use crate::log::recovery::Recovery;
use crate::log::scan::{SlotState, read_slot};
use crate::rules::{Rule, Rules};

/// The head of a log that is being opened.
pub(super) struct Opening<'a> {
    pub(super) cache: &'a Device,
    pub(super) geometry: Geometry,
    pub(super) recovery: &'a Recovery,
    /// Everything up to this segment is clean.
    pub(super) written_back: SegmentId,
    /// Of the backing device.
    pub(super) sectors: u64,
    pub(super) rules: Rules,
}

/// Takes a head for a cache. What is in it must agree with the log on the device.
pub(super) async fn take(
    head: &Head,
    owner: Owner,
    opening: Opening<'_>,
) -> Result<Resumed, CacheError> {
    let refuse = |why: String| CacheError::Head(why);
    let mut frames = Frames::of(head.clone(), opening.rules)
        .ok_or_else(|| refuse("another cache of this process has it".into()))?;
    if head.is_blank() || !opening.rules.keep(Rule::HeadResumed) {
        return Ok(Resumed { frames, segments: Vec::new(), on_device: None });
    }
    head.check(owner).map_err(refuse)?;
    let segments = frames.read().map_err(refuse)?;
    opening.check_reach(&segments).map_err(refuse)?;
    opening.check_blocks(&segments).map_err(refuse)?;
    let (segments, on_device) = opening.after_the_device(segments).await.map_err(refuse)?;
    Ok(Resumed { frames, segments, on_device })
}

impl Opening<'_> {
    /// Refuses segments that the log cannot go on with: it would overwrite what is dirty, or it
    /// ends later on the device, or in an open segment that is not among them.
    fn check_reach(&self, segments: &[HeadSegment]) -> Result<(), String> {
        let point = self.recovery.point;
        if let Some(newest) = segments.last().map(|segment| segment.id) {
            if newest < point {
                return Err(format!(
                    "it ends with segment {newest}, and the log on the device with segment {point}"
                ));
            }
            if newest > self.written_back && newest.since(self.written_back) > self.geometry.lap() {
                return Err(format!(
                    "it ends with segment {newest}, whose slot holds data that is not written back"
                ));
            }
        }
        match self.recovery.open_end() {
            Some(open) if segments.iter().all(|segment| segment.id != open) => {
                Err(format!("segment {open} is open on the device, and the head lacks it"))
            }
            _ => Ok(()),
        }
    }

    fn check_blocks(&self, segments: &[HeadSegment]) -> Result<(), String> {
        for HeadSegment { id, entries, .. } in segments {
            let outside = |entry: &&Entry| {
                entry.block.sector().0 >= self.sectors
                    || first_outside(entry.block, entry.dirty, self.sectors).is_some()
            };
            if let Some(entry) = entries.iter().find(outside) {
                return Err(format!(
                    "segment {id} has block {}, which lies outside the volume",
                    entry.block.0
                ));
            }
        }
        Ok(())
    }

    /// The segments that the device does not hold, or not wholly, and what it holds of the first.
    async fn after_the_device(
        &self,
        mut segments: Vec<HeadSegment>,
    ) -> Result<(Vec<HeadSegment>, Option<OnDevice>), String> {
        let point = self.recovery.point;
        let keeps = |segment: &mut HeadSegment| {
            // What the device holds wholly was to leave the head.
            let keeps = segment.id >= point;
            if !keeps {
                segment.frame.clear();
            }
            keeps
        };
        segments.retain_mut(keeps);
        let Some(first) = segments.first() else { return Ok((segments, None)) };
        if first.id > point.next() {
            return Err(format!(
                "it begins with segment {}, and the log on the device ends with segment {point}",
                first.id
            ));
        }
        if first.id != point {
            return Ok((segments, None));
        }
        let on_device = self.read(first).await?;
        if on_device.is_none() {
            segments.remove(0).frame.clear();
        }
        Ok((segments, on_device))
    }

    /// What the device holds of a segment; `None` if that is all of it.
    async fn read(&self, segment: &HeadSegment) -> Result<Option<OnDevice>, String> {
        let id = segment.id;
        let content = read_slot(self.cache, self.geometry, self.geometry.slot_of(id)).await;
        let (Some(header), SlotState::Valid { id: found, cut_short, .. }) =
            (content.header, content.state)
        else {
            return Err(format!("segment {id} on the device has changed while it was read"));
        };
        if found != id || !is_front_of(&header, segment) {
            return Err(format!("segment {id} holds other blocks on the device"));
        }
        let is_closed = !header.is_open() && !cut_short;
        if !is_closed {
            if header.metablocks.iter().any(|metablock| metablock.crc.is_none()) {
                return Err(format!("segment {id} is open on the device, and lacks checksums"));
            }
            let commit = Commit { length: header.length(), checksum: header.checksum };
            return Ok(Some(OnDevice { commit, metablocks: header.metablocks }));
        }
        if header.length() != segment.length() || segment.reason.is_none() {
            return Err(format!("segment {id} is closed on the device"));
        }
        Ok(None)
    }
}

/// Whether the entries that the device has of a segment are its first ones.
fn is_front_of(header: &SegmentHeader, segment: &HeadSegment) -> bool {
    header.metablocks.len() <= segment.entries.len()
        && header.metablocks.iter().zip(&segment.entries).all(|(on_device, entry)| {
            (on_device.block, on_device.dirty) == (entry.block, entry.dirty)
        })
}

/// The end of the log on the device that is to be closed: the last segment, if only a commit of it
/// is there, and it does not go on.
pub(super) fn end_to_close(
    recovery: &Recovery,
    begun: Option<SegmentId>,
    rules: Rules,
) -> Option<SegmentId> {
    let goes_on = begun.filter(|_| rules.keep(Rule::HeadEndStaysOpen));
    recovery.open_end().filter(|id| rules.keep(Rule::OpenEndClosed) && Some(*id) != goes_on)
}
