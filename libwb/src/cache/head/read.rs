//! Reading a head that another process has left. It is trusted no more than a device.

use super::{Entry, FRAMES, Frame, Frames, Head, at, entry_at, small};
use crate::format::{PLACES, Reason, SegmentId};
use crate::rules::Rule;
use std::sync::atomic::Ordering;

/// Segments that a head can hold: all frames but those that are being given back.
const MOST: usize = 9;

/// A segment that another process has left in a head.
pub(crate) struct HeadSegment {
    pub(crate) id: SegmentId,
    /// `None`: it is open.
    pub(crate) reason: Option<Reason>,
    /// At least one.
    pub(crate) entries: Vec<Entry>,
    pub(crate) frame: Frame,
}

impl HeadSegment {
    #[allow(clippy::cast_possible_truncation)] // at most PLACES
    pub(crate) fn length(&self) -> u8 {
        self.entries.len() as u8
    }
}

impl Frames {
    /// The segments in the frames: neighbouring ids, oldest first. Completes what the other process
    /// had not completed.
    ///
    /// # Errors
    /// Says what makes no sense.
    pub(crate) fn read(&mut self) -> Result<Vec<HeadSegment>, String> {
        self.take_back()?;
        let mut segments = Vec::new();
        for number in 0..FRAMES {
            segments.extend(read_frame(self.head(), number)?);
        }
        segments.sort_by_key(|segment| segment.id);
        if segments.len() > MOST {
            return Err(format!("it holds {} segments, and at most {MOST} fit", segments.len()));
        }
        for pair in segments.windows(2) {
            let (one, next) = (&pair[0], &pair[1]);
            if next.id != one.id.next() {
                return Err(format!("segment {} comes after segment {}", next.id, one.id));
            }
            if one.reason.is_none() {
                return Err(format!("segment {} is open, and not the newest", one.id));
            }
        }
        Ok(segments)
    }

    /// Undoes an overwrite that was not completed.
    fn take_back(&mut self) -> Result<(), String> {
        let memory = &self.head().memory;
        let place = memory.word(at::UNDO_PLACE).load(Ordering::Acquire);
        if place == 0 || !self.keeps(Rule::HeadOverwriteUndone) {
            return Ok(());
        }
        let wrong = || format!("what is being overwritten has the number {place:#x}");
        let number = small(place >> 8).checked_sub(1).filter(|number| *number < FRAMES);
        let index = u8::try_from(place & 0xff).ok().filter(|index| *index < PLACES);
        let (Some(number), Some(index)) = (number, index) else { return Err(wrong()) };
        let before = memory.word(at::UNDO_ENTRY).load(Ordering::Acquire);
        let mut frame = Frame::take(self.head(), number).ok_or_else(wrong)?;
        frame.block_mut(index).copy_from_slice(self.undo());
        frame.store(entry_at(index), before);
        self.store(at::UNDO_PLACE, 0);
        Ok(())
    }
}

/// The segment in a frame; `None` if no block was acknowledged in it.
fn read_frame(head: &Head, number: usize) -> Result<Option<HeadSegment>, String> {
    let Some(frame) = Frame::take(head, number) else {
        return Err(format!("frame {number} is in use"));
    };
    let (id, state) = (SegmentId(frame.load(at::ID)), frame.load(at::STATE));
    let [length, reason, rest @ ..] = state.to_le_bytes();
    if id == SegmentId::NONE || state == 0 {
        return Ok(None);
    }
    let reason = (reason != 0).then(|| Reason::from_code(reason));
    let is_right = id <= SegmentId::MAX && (1..=PLACES).contains(&length) && rest == [0; 6];
    if !is_right || reason == Some(Reason::Open) {
        return Err(format!("frame {number} has the id {id} and the state {state:#x}"));
    }
    let entry = |index| {
        let word = frame.load(entry_at(index));
        Entry::decode(word).ok_or_else(|| format!("entry {index} of segment {id} is {word:#x}"))
    };
    let entries = (0..length).map(entry).collect::<Result<_, _>>()?;
    Ok(Some(HeadSegment { id, reason, entries, frame }))
}
