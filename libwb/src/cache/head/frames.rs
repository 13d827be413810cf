//! Writing a head: a frame for each segment that is not on the cache device yet.

use super::{DATA_BYTES, Entry, FRAMES, Head, at, entry_at};
use crate::device::DeviceError;
#[cfg(feature = "sim")]
use crate::format::SECTOR_BYTES;
use crate::format::{BLOCK_BYTES, Reason, SegmentId};
use crate::rules::{Rule, Rules};
use crate::sys::{Region, SharedMemory};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The frames of a head, and its undo block. One cache at a time has them.
pub(crate) struct Frames {
    head: Head,
    undo: Region,
    rules: Rules,
}

impl Frames {
    /// `None` while another cache of this process has them.
    pub(crate) fn of(head: Head, rules: Rules) -> Option<Frames> {
        let undo = head.memory.lend(at::UNDO_DATA, BLOCK_BYTES)?;
        Some(Frames { head, undo, rules })
    }

    /// A frame for a new segment. `None` if all are in use.
    pub(crate) fn begin(&self, id: SegmentId) -> Option<Frame> {
        let frame = (0..FRAMES).find_map(|number| Frame::take(&self.head, number))?;
        frame.store(at::STATE, 0);
        frame.store(at::ID, id.0);
        Some(frame)
    }

    /// Lets `fill` change a block of a frame, so that the old one counts until the new one is
    /// complete.
    #[inline]
    pub(crate) fn overwrite(
        &mut self,
        frame: &mut Frame,
        index: u8,
        entry: Entry,
        fill: impl FnOnce(&mut [u8; BLOCK_BYTES]),
    ) {
        let undone = self.rules.keep(Rule::HeadOverwriteUndone);
        if undone {
            self.undo.copy_from_slice(frame.block(index));
            self.store(at::UNDO_ENTRY, frame.load(entry_at(index)));
            let place = (frame.number as u64 + 1) << 8 | u64::from(index);
            self.store(at::UNDO_PLACE, place);
        }
        frame.fill(index, fill);
        frame.store(entry_at(index), entry.encode());
        if undone {
            self.store(at::UNDO_PLACE, 0);
        }
    }

    pub(crate) fn note_failure(&self, error: &DeviceError) {
        if self.rules.keep(Rule::HeadKeepsFailure) {
            self.head.note_failure(error);
        }
    }

    pub(super) fn store(&self, at: usize, word: u64) {
        self.head.memory.store(at, word);
    }

    pub(super) fn head(&self) -> &Head {
        &self.head
    }

    /// What was there before an overwrite.
    pub(super) fn undo(&self) -> &[u8] {
        &self.undo
    }

    pub(super) fn keeps(&self, rule: Rule) -> bool {
        self.rules.keep(rule)
    }
}

/// The place in shared memory of a segment that is open, or on its way to the device.
pub(crate) struct Frame {
    memory: Arc<SharedMemory>,
    number: usize,
    data: Region,
}

impl Frame {
    /// `None` while it is in use.
    pub(super) fn take(head: &Head, number: usize) -> Option<Frame> {
        let data = head.memory.lend(Head::frame_at(number) + at::DATA, DATA_BYTES)?;
        Some(Frame { memory: head.memory.clone(), number, data })
    }

    /// A block of the segment.
    #[inline]
    pub(crate) fn block(&self, index: u8) -> &[u8; BLOCK_BYTES] {
        let at = usize::from(index) * BLOCK_BYTES;
        self.data[at..].first_chunk().expect("a place of the segment")
    }

    /// A block that no one relies on yet.
    #[inline]
    pub(crate) fn block_mut(&mut self, index: u8) -> &mut [u8; BLOCK_BYTES] {
        let at = usize::from(index) * BLOCK_BYTES;
        self.data[at..].first_chunk_mut().expect("a place of the segment")
    }

    #[cfg(not(feature = "sim"))]
    #[inline]
    fn fill(&mut self, index: u8, fill: impl FnOnce(&mut [u8; BLOCK_BYTES])) {
        fill(self.block_mut(index));
    }

    /// Changes a block in steps: a simulated process may die within a sector.
    #[cfg(feature = "sim")]
    fn fill(&mut self, index: u8, fill: impl FnOnce(&mut [u8; BLOCK_BYTES])) {
        let mut new = *self.block(index);
        fill(&mut new);
        for at in (0..BLOCK_BYTES).step_by(SECTOR_BYTES / 2) {
            let part = at..at + SECTOR_BYTES / 2;
            if self.block(index)[part.clone()] != new[part.clone()] {
                self.block_mut(index)[part.clone()].copy_from_slice(&new[part]);
                self.memory.is_seen();
            }
        }
    }

    /// Makes a block belong to the segment, as its last one. Its data must be there.
    #[inline]
    pub(crate) fn publish(&self, index: u8, entry: Entry) {
        self.store(entry_at(index), entry.encode());
        self.store(at::STATE, u64::from(index) + 1);
    }

    /// Changes the entry of a block whose data stays.
    pub(crate) fn update(&self, index: u8, entry: Entry) {
        self.store(entry_at(index), entry.encode());
    }

    /// No block is added or changed any more.
    pub(crate) fn seal(&self, length: u8, reason: Reason) {
        self.store(at::STATE, u64::from(reason.code()) << 8 | u64::from(length));
    }

    /// The segment is on the device.
    pub(crate) fn clear(&self) {
        self.store(at::STATE, 0);
        self.store(at::ID, 0);
    }

    pub(super) fn load(&self, at: usize) -> u64 {
        self.memory.word(Head::frame_at(self.number) + at).load(Ordering::Acquire)
    }

    pub(super) fn store(&self, at: usize, word: u64) {
        self.memory.store(Head::frame_at(self.number) + at, word);
    }
}

impl AsRef<[u8]> for Frame {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}
