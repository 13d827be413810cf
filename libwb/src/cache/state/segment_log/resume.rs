//! Going on with the segments that an earlier process has left in the log's head.

use super::SegmentLog;
use super::resumed::OnDevice;
use super::segments::{Commits, OpenSegment};
use crate::cache::head::HeadSegment;
use crate::cache::state::position::Position;
use crate::format::Place;
use crate::rules::Rule;

impl SegmentLog {
    /// Adds segments that are not, or not wholly, on the device. All that is on the device is
    /// durable by the first request.
    pub(super) fn resume(&mut self, segments: Vec<HeadSegment>, on_device: Option<OnDevice>) {
        let Some(first) = segments.first().map(|segment| segment.id) else { return };
        self.written = first.minus(1);
        let knows = self.rules.keep(Rule::HeadKnowsCommit);
        let mut on_device = on_device.filter(|_| knows);
        self.durable_to = on_device
            .as_ref()
            .map_or(Position::end_of(self.written), |it| Position::within(first, it.commit.length));
        for segment in segments {
            self.resume_segment(segment, on_device.take());
        }
        self.dirty_blocks = crate::format::to_u64(self.index.len());
    }

    fn resume_segment(&mut self, segment: HeadSegment, on_device: Option<OnDevice>) {
        let length = segment.length();
        let HeadSegment { id, reason, entries, frame } = segment;
        self.newest = id;
        let slot = self.geometry.slot_of(id);
        let commits = Commits::resumed(on_device.as_ref().map(|it| it.commit));
        // Recovery has taken in what the device holds of it, except clean entries.
        let crcs: Vec<_> = on_device.into_iter().flat_map(|it| it.metablocks).collect();
        if commits.frozen() == 0 {
            self.index.forget(slot);
        }
        let mut open = OpenSegment { commits, length, ..OpenSegment::new(id, frame) };
        for (index, entry) in (0..).zip(entries) {
            let place = Place { slot, index };
            if entry.lost {
                open.lost.add(index);
            }
            let is_taken_in = open.commits.has(place) && !entry.dirty.is_clean();
            if !is_taken_in {
                self.index.hold(entry.block, entry.dirty, place);
            }
            if let Some(crc) = crcs.get(usize::from(index)).and_then(|it| it.crc) {
                self.index.set_crc(place, crc);
            }
            // As in recovery, a clean entry is not trusted.
            if !is_taken_in && !entry.dirty.is_clean() {
                self.index.link(entry.block, place);
            }
            if entry.discarded {
                self.index.set_discarded(place);
            }
        }
        if !self.rules.keep(Rule::HeadKeptWhenResumed) {
            open.frame.clear();
        }
        match reason {
            Some(reason) => self.sealed.push_back(open.sealed(reason)),
            None => self.open = Some(open),
        }
    }
}
