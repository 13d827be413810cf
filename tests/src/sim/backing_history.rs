//! What the backing device alone may hold if the cache device is lost.
//!
//! In any order of write-back, the backing device holds all data of the segments that the
//! superblock record declares written back. It also holds every write acknowledged before the last
//! acknowledged drain began. It never shows a write that was lost. It may hold any part of later
//! writes. The exact segment of a write is unknown: it is the newest segment at acknowledgement, or
//! an older one.
//!
//! In strict order, the backing device holds what a disk with a volatile cache would: everything up
//! to some flush, and any part of what came between that flush and the next. If it shows a write
//! submitted after a flush was acknowledged, it must hold every write acknowledged before that
//! flush was submitted.

use super::oracle::Moment;
use super::stamp::{self, Content, WriteId};
use libwb::format::{SECTOR_BYTES, Sector, SegmentId, to_u64, to_usize};
use std::ops::Range;

const NEVER: Moment = Moment::MAX;

#[derive(Clone, Copy, Debug)]
struct Past {
    write: WriteId,
    submitted: Moment,
    acknowledged: Moment,
    /// The log holds it in this segment or in one before.
    segment: Option<SegmentId>,
}

impl Past {
    fn new(write: WriteId, submitted: Moment) -> Past {
        Past { write, submitted, acknowledged: NEVER, segment: None }
    }

    /// Whether it lies in a segment that is written back.
    fn is_written_back(&self, written_back: SegmentId) -> bool {
        self.segment.is_some_and(|segment| segment <= written_back)
    }
}

/// Every write that was not lost, and every flush that was acknowledged.
pub struct BackingHistory {
    sectors: Vec<Vec<Past>>,
    /// Sectors on which a discard has begun. All discards look the same, so only strict order,
    /// which has none, judges these sectors.
    discarded: Vec<bool>,
    /// When each flush was submitted, and when it was acknowledged.
    flushes: Vec<(Moment, Moment)>,
    /// When the last drain was submitted that was acknowledged.
    drained: Moment,
    /// Whether the backing device may lack blocks of segments that are written back.
    moved: bool,
}

impl BackingHistory {
    /// The empty history of a volume of `sectors` sectors.
    pub fn new(sectors: u64) -> BackingHistory {
        let first = Past { acknowledged: 0, ..Past::new(WriteId(0), 0) };
        BackingHistory {
            sectors: vec![vec![first]; to_usize(sectors)],
            discarded: vec![false; to_usize(sectors)],
            flushes: Vec::new(),
            drained: 0,
            moved: false,
        }
    }

    /// The engine moved blocks that the backing device refused to the end of the log.
    pub fn blocks_moved(&mut self) {
        self.moved = true;
    }

    /// A write or a discard begins.
    pub fn begins(&mut self, write: WriteId, zeros: bool, sectors: Range<u64>, submitted: Moment) {
        for sector in sectors {
            self.discarded[to_usize(sector)] |= zeros;
            self.sectors[to_usize(sector)].push(Past::new(write, submitted));
        }
    }

    /// A write is acknowledged.
    pub fn ends(&mut self, write: WriteId, sectors: Range<u64>, now: Moment) {
        for sector in sectors {
            let past = self.sectors[to_usize(sector)].iter_mut().rfind(|past| past.write == write);
            if let Some(past) = past {
                past.acknowledged = now;
            }
        }
    }

    /// A write that was acknowledged lies in this segment of the log or in one before.
    pub fn logged(&mut self, write: WriteId, sectors: Range<u64>, segment: SegmentId) {
        for sector in sectors {
            let past = self.sectors[to_usize(sector)].iter_mut().rfind(|past| past.write == write);
            if let Some(past) = past {
                past.segment = Some(segment);
            }
        }
    }

    /// A flush is acknowledged.
    pub fn flushed(&mut self, submitted: Moment, acknowledged: Moment) {
        self.flushes.push((submitted, acknowledged));
    }

    /// A drain is acknowledged.
    pub fn drained(&mut self, submitted: Moment) {
        self.drained = self.drained.max(submitted);
    }

    /// The record is lost. The engine writes the log back again from an older segment, so the
    /// backing device may meanwhile show older data than at the last drain.
    pub fn record_lost(&mut self) {
        self.drained = 0;
    }

    /// Recovery showed this write in a sector; later writes to the sector are lost.
    pub fn recovered(&mut self, sector: u64, write: WriteId, now: Moment) {
        let pasts = &mut self.sectors[to_usize(sector)];
        if let Some(shown) = pasts.iter_mut().find(|past| past.write == write) {
            shown.acknowledged = shown.acknowledged.min(now);
            let until = shown.acknowledged;
            pasts.retain(|past| past.submitted <= until);
        }
    }

    /// Whether the backing device alone may hold `data` once the segments up to `written_back` are
    /// written back, in any order.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, data: &[u8], written_back: SegmentId) -> Result<(), String> {
        let bytes = data.chunks_exact(SECTOR_BYTES);
        let sectors = (0..).zip(self.sectors.iter().zip(&self.discarded)).zip(bytes);
        for ((sector, (pasts, _)), bytes) in sectors.filter(|((_, (_, discarded)), _)| !**discarded)
        {
            let content =
                stamp::decode(bytes, Sector(sector)).map_err(|e| format!("sector {sector} {e}"))?;
            let shows = |past: &&Past| matches!(content, Content::Of(write) if past.write == write);
            let shown = pasts.iter().find(shows).ok_or_else(|| {
                format!("sector {sector} of the backing device shows {content:?}, which was lost")
            })?;
            let must_be_there = |past: &Past| {
                past.acknowledged < self.drained
                    || past.is_written_back(written_back) && !self.moved
            };
            let lacks = |past: &&Past| must_be_there(past) && shown.acknowledged < past.submitted;
            if let Some(Past { write, .. }) = pasts.iter().find(lacks) {
                return Err(format!(
                    "sector {sector} of the backing device shows {content:?} and lacks {write}, \
                     though a drain that was submitted at {} was acknowledged, and all up to \
                     segment {written_back} is written back",
                    self.drained
                ));
            }
        }
        Ok(())
    }

    /// Whether the backing device alone may hold `data` if write-back was always in strict order.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_strict(&self, data: &[u8]) -> Result<(), String> {
        let mut shown = Vec::with_capacity(self.sectors.len());
        for (sector, bytes) in (0..to_u64(self.sectors.len())).zip(data.chunks_exact(SECTOR_BYTES))
        {
            let Content::Of(write) = stamp::decode(bytes, Sector(sector))? else {
                return Err(format!("sector {sector} holds zeros"));
            };
            let past = self.sectors[to_usize(sector)].iter().find(|past| past.write == write);
            shown.push(
                *past.ok_or_else(|| format!("sector {sector} shows {write}, which was lost"))?,
            );
        }
        let newest = shown.iter().map(|past| past.submitted).max().unwrap_or_default();
        let passed = self.flushes.iter().filter(|(_, acknowledged)| *acknowledged < newest);
        let Some(flush) = passed.map(|&(submitted, _)| submitted).max() else { return Ok(()) };
        for ((sector, pasts), shown) in (0..).zip(&self.sectors).zip(shown) {
            let lost =
                |past: &&Past| past.acknowledged < flush && shown.acknowledged < past.submitted;
            if let Some(Past { write, .. }) = pasts.iter().find(lost) {
                return Err(format!(
                    "sector {sector} of the backing device shows {} and lacks {write}, though it \
                     shows a write that was submitted at {newest}, after the flush submitted at \
                     {flush}",
                    shown.write
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shows(writes: [u64; 2]) -> Vec<u8> {
        let mut data = vec![0; 2 * SECTOR_BYTES];
        for (sector, (write, bytes)) in
            (0..).zip(writes.into_iter().zip(data.chunks_mut(SECTOR_BYTES)))
        {
            stamp::fill(bytes, Sector(sector), WriteId(write));
        }
        data
    }

    #[test]
    fn what_came_after_a_flush_needs_what_came_before() {
        let mut backing_history = BackingHistory::new(2);
        for (write, sector, at) in [(1, 0, 10), (2, 1, 20)] {
            backing_history.begins(WriteId(write), false, sector..sector + 1, at);
            backing_history.ends(WriteId(write), sector..sector + 1, at + 1);
        }
        assert_eq!(
            backing_history.check_strict(&shows([0, 2])),
            Ok(()),
            "without a flush, in any order"
        );
        backing_history.flushed(12, 15);
        assert!(
            backing_history.check_strict(&shows([0, 2])).unwrap_err().contains("lacks write 1")
        );
        for right in [[0, 0], [1, 0], [1, 2]] {
            assert_eq!(backing_history.check_strict(&shows(right)), Ok(()));
        }
        backing_history.recovered(1, WriteId(0), 30);
        assert!(backing_history.check_strict(&shows([1, 2])).unwrap_err().contains("lost"));
        assert!(
            backing_history.check(&shows([1, 2]), SegmentId::NONE).unwrap_err().contains("lost")
        );
    }

    #[test]
    fn what_was_drained_is_there_and_of_what_came_later_any_part() {
        let mut backing_history = BackingHistory::new(2);
        for (write, sector, at) in [(1, 0, 10), (2, 1, 20)] {
            backing_history.begins(WriteId(write), false, sector..sector + 1, at);
            backing_history.ends(WriteId(write), sector..sector + 1, at + 1);
        }
        backing_history.drained(15);
        for right in [[1, 0], [1, 2]] {
            assert_eq!(backing_history.check(&shows(right), SegmentId::NONE), Ok(()));
        }
        assert!(
            backing_history
                .check(&shows([0, 2]), SegmentId::NONE)
                .unwrap_err()
                .contains("lacks write 1")
        );
        backing_history.logged(WriteId(2), 1..2, SegmentId(7));
        assert_eq!(backing_history.check(&shows([1, 0]), SegmentId(6)), Ok(()));
        assert!(
            backing_history
                .check(&shows([1, 0]), SegmentId(7))
                .unwrap_err()
                .contains("lacks write 2")
        );
        backing_history.record_lost();
        assert_eq!(
            backing_history.check(&shows([0, 2]), SegmentId(7)),
            Ok(()),
            "it is written back again"
        );
        backing_history.begins(WriteId(3), true, 0..1, 30);
        let mut zeros = shows([1, 2]);
        zeros[..SECTOR_BYTES].fill(0);
        assert_eq!(
            backing_history.check(&zeros, SegmentId::NONE),
            Ok(()),
            "what was discarded is not judged"
        );
        zeros[SECTOR_BYTES..].fill(0);
        assert!(backing_history.check(&zeros, SegmentId::NONE).unwrap_err().contains("lost"));
    }

    #[test]
    fn of_two_discards_that_may_have_been_recovered_either_may_be_what_shows() {
        let mut backing_history = BackingHistory::new(1);
        for (write, zeros, submitted, acknowledged) in [(1, true, 10, 26), (2, false, 20, 21)] {
            backing_history.begins(WriteId(write), zeros, 0..1, submitted);
            backing_history.ends(WriteId(write), 0..1, acknowledged);
        }
        backing_history.begins(WriteId(3), true, 0..1, 30);
        backing_history.recovered(0, WriteId(1), 40);
        backing_history.drained(50);
        assert_eq!(backing_history.check(&[0; SECTOR_BYTES], SegmentId::NONE), Ok(()));
    }
}
