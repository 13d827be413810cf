//! What an earlier process has left of the log, beside what the device holds wholly.

use crate::cache::head::{Frames, HeadSegment};
use crate::format::{Commit, Metablock, SegmentId};

/// What the head adds to the log on the device.
pub(crate) struct Resumed {
    pub(crate) frames: Frames,
    /// Neighbouring ids, oldest first. The first one is the last on the device, if the device holds
    /// only a commit of it, or else the next.
    pub(crate) segments: Vec<HeadSegment>,
    /// What the device holds of the first one.
    pub(crate) on_device: Option<OnDevice>,
}

/// The commit of a segment that is on the device, and its entries.
pub(crate) struct OnDevice {
    pub(crate) commit: Commit,
    pub(crate) metablocks: Vec<Metablock>,
}

impl Resumed {
    #[cfg(test)]
    pub(crate) fn nothing() -> Resumed {
        let head = crate::cache::Head::create().expect("memory");
        let frames = Frames::of(head, Default::default()).expect("no other cache has it");
        Resumed { frames, segments: Vec::new(), on_device: None }
    }

    /// The segment that goes on where the device holds only a commit of it.
    pub(crate) fn begun(&self) -> Option<SegmentId> {
        self.on_device.as_ref().and_then(|_| self.segments.first()).map(|segment| segment.id)
    }

    /// The newest segment that holds a clean entry.
    pub(crate) fn staged(&self) -> SegmentId {
        let holds = |it: &&HeadSegment| it.entries.iter().any(|entry| entry.dirty.is_clean());
        self.segments.iter().filter(holds).map(|it| it.id).max().unwrap_or_default()
    }
}
