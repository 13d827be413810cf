//! What the server has acknowledged and may still lose: everything since the last flush.
//!
//! Newer data takes the place of older data. So no two pieces overlap, and they may be written
//! again in any order.

use super::super::SharedBuf;
use crate::format::{to_u64, to_usize};
use std::collections::BTreeMap;
use std::ops::Range;

/// What a piece holds.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Data(SharedBuf),
    Zeros { keep_space: bool },
}

impl Content {
    /// What it counts for, in bytes. Zeros take up some memory, too.
    fn weight(&self) -> u64 {
        const ZEROS: u64 = 512;
        match self {
            Content::Data(data) => to_u64(data.len()),
            Content::Zeros { .. } => ZEROS,
        }
    }

    fn part(&self, range: Range<u64>) -> Content {
        match self {
            Content::Data(data) => {
                // Else a few bytes could keep a large buffer that no one counts.
                Content::Data(data.part(to_usize(range.start)..to_usize(range.end)).to_keep())
            }
            zeros @ Content::Zeros { .. } => zeros.clone(),
        }
    }
}

struct Piece {
    end: u64,
    content: Content,
    /// When it was acknowledged.
    at: Mark,
}

/// A moment in the course of acknowledgements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark(u64);

/// All pieces, by their offset.
#[derive(Default)]
pub(super) struct Remembered {
    pieces: BTreeMap<u64, Piece>,
    weight: u64,
    now: Mark,
}

impl Remembered {
    /// How many bytes are kept.
    pub(super) fn weight(&self) -> u64 {
        self.weight
    }

    /// This moment: everything that is there has been acknowledged.
    pub(super) fn mark(&self) -> Mark {
        self.now
    }

    /// Remembers what a write has put at `range`, instead of anything older there.
    pub(super) fn add(&mut self, range: Range<u64>, content: Content) {
        self.forget(&range);
        self.now.0 += 1;
        self.insert(range.start, Piece { end: range.end, content, at: self.now });
    }

    /// Forgets what lies in a range.
    pub(super) fn forget(&mut self, range: &Range<u64>) {
        let before = self.pieces.range(..range.start).next_back().map(|(&start, _)| start);
        let within = self.pieces.range(range.clone()).map(|(&start, _)| start);
        let starts: Vec<u64> = before.into_iter().chain(within).collect();
        for start in starts {
            let Some(piece) = self.remove(start) else { continue };
            for rest in [start..piece.end.min(range.start), start.max(range.end)..piece.end] {
                if rest.start < rest.end {
                    let content = piece.content.part(rest.start - start..rest.end - start);
                    self.insert(rest.start, Piece { end: rest.end, content, at: piece.at });
                }
            }
        }
    }

    /// Forgets what was acknowledged up to a moment: it is durable.
    pub(super) fn forget_until(&mut self, mark: Mark) {
        let durable = self.pieces.iter().filter(|(_, piece)| piece.at <= mark);
        for start in durable.map(|(&start, _)| start).collect::<Vec<_>>() {
            self.remove(start);
        }
    }

    /// Everything, by its offset.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (Range<u64>, &Content)> {
        self.pieces.iter().map(|(&start, piece)| (start..piece.end, &piece.content))
    }

    fn insert(&mut self, start: u64, piece: Piece) {
        self.weight += piece.content.weight();
        self.pieces.insert(start, piece);
    }

    fn remove(&mut self, start: u64) -> Option<Piece> {
        let piece = self.pieces.remove(&start)?;
        self.weight -= piece.content.weight();
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::IoBuf;
    use super::*;
    use proptest::prelude::*;

    const SIZE: usize = 32;

    #[derive(Clone, Debug)]
    enum Step {
        Write(Range<usize>),
        Zero(Range<usize>),
        WriteDurably(Range<usize>),
        BeginFlush,
        EndFlush,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let range = || (0..SIZE, 1..=8_usize).prop_map(|(at, length)| at..(at + length).min(SIZE));
        let step = prop_oneof![
            4 => range().prop_map(Step::Write),
            1 => range().prop_map(Step::Zero),
            1 => range().prop_map(Step::WriteDurably),
            1 => Just(Step::BeginFlush),
            1 => Just(Step::EndFlush),
        ];
        proptest::collection::vec(step, 0..40)
    }

    fn unit(range: &Range<usize>) -> Range<u64> {
        to_u64(range.start)..to_u64(range.end)
    }

    /// What is remembered, byte by byte.
    fn shown(remembered: &Remembered) -> Vec<Option<u8>> {
        let mut shown = vec![None; SIZE];
        for (range, content) in remembered.pieces() {
            for at in range.clone() {
                let byte = match content {
                    Content::Data(data) => data[to_usize(at - range.start)],
                    Content::Zeros { .. } => 0,
                };
                assert_eq!(shown[to_usize(at)].replace(byte), None, "pieces overlap");
            }
        }
        shown
    }

    proptest! {
        #[test]
        fn it_holds_the_newest_of_what_is_not_durable(steps in steps()) {
            let mut remembered = Remembered::default();
            // What each byte should be remembered as, and since which step.
            let mut expected = [None; SIZE];
            let mut flush = None;
            for (number, step) in steps.into_iter().enumerate() {
                let with = u8::try_from(number).unwrap() + 1;
                match step {
                    Step::Write(range) => {
                        let data = IoBuf::copy_of(&vec![with; range.len()]).into();
                        remembered.add(unit(&range), Content::Data(data));
                        expected[range].fill(Some((number, with)));
                    }
                    Step::Zero(range) => {
                        remembered.add(unit(&range), Content::Zeros { keep_space: false });
                        expected[range].fill(Some((number, 0)));
                    }
                    Step::WriteDurably(range) => {
                        remembered.forget(&unit(&range));
                        expected[range].fill(None);
                    }
                    Step::BeginFlush => flush = Some((number, remembered.mark())),
                    Step::EndFlush => {
                        let Some((began, mark)) = flush.take() else { continue };
                        remembered.forget_until(mark);
                        expected.iter_mut().for_each(|byte| {
                            *byte = byte.filter(|&(since, _)| since > began);
                        });
                    }
                }
                let bytes = expected.map(|byte| byte.map(|(_, with)| with));
                prop_assert_eq!(shown(&remembered), bytes.to_vec());
                let weight: u64 = remembered.pieces().map(|(_, content)| content.weight()).sum();
                prop_assert_eq!(weight, remembered.weight());
            }
        }
    }
}
