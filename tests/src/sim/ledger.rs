//! What the backing device alone may hold when write-back is in strict order: the day the cache device is lost.
//!
//! It is what a disk with a volatile cache would hold: all up to some flush, and any part of what came after that, up to
//! the next. So if it shows a write that was submitted after a flush had been acknowledged, it lacks nothing that
//! had been acknowledged before that flush was submitted.

use super::oracle::Moment;
use super::stamp::{self, Content, WriteId};
use libwb::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use std::ops::Range;

const NEVER: Moment = Moment::MAX;

#[derive(Clone, Copy, Debug)]
struct Past {
    write: WriteId,
    submitted: Moment,
    acknowledged: Moment,
}

/// Every write that was not lost, and every flush that was acknowledged.
pub struct Ledger {
    sectors: Vec<Vec<Past>>,
    /// When each was submitted, and when it was acknowledged.
    flushes: Vec<(Moment, Moment)>,
}

impl Ledger {
    /// The history of a volume of so many sectors that has not begun.
    pub fn new(sectors: u64) -> Ledger {
        let first = Past { write: WriteId(0), submitted: 0, acknowledged: 0 };
        Ledger { sectors: vec![vec![first]; to_usize(sectors)], flushes: Vec::new() }
    }

    /// A write begins.
    pub fn begins(&mut self, write: WriteId, sectors: Range<u64>, submitted: Moment) {
        for sector in sectors {
            self.sectors[to_usize(sector)].push(Past { write, submitted, acknowledged: NEVER });
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

    /// A flush is acknowledged.
    pub fn flushed(&mut self, submitted: Moment, acknowledged: Moment) {
        self.flushes.push((submitted, acknowledged));
    }

    /// A sector was recovered with a write; what came after that is lost.
    pub fn recovered(&mut self, sector: u64, write: WriteId, now: Moment) {
        let pasts = &mut self.sectors[to_usize(sector)];
        if let Some(shown) = pasts.iter_mut().find(|past| past.write == write) {
            shown.acknowledged = shown.acknowledged.min(now);
            let until = shown.acknowledged;
            pasts.retain(|past| past.submitted <= until);
        }
    }

    /// Whether the backing device alone may hold this.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, data: &[u8]) -> Result<(), String> {
        let mut shown = Vec::with_capacity(self.sectors.len());
        for (sector, bytes) in (0..to_u64(self.sectors.len())).zip(data.chunks_exact(SECTOR_BYTES)) {
            let Content::Of(write) = stamp::decode(bytes, Sector(sector))? else {
                return Err(format!("sector {sector} holds zeros"));
            };
            let past = self.sectors[to_usize(sector)].iter().find(|past| past.write == write);
            shown.push(*past.ok_or_else(|| format!("sector {sector} shows {write}, which was lost"))?);
        }
        let newest = shown.iter().map(|past| past.submitted).max().unwrap_or_default();
        let passed = self.flushes.iter().filter(|(_, acknowledged)| *acknowledged < newest);
        let Some(flush) = passed.map(|&(submitted, _)| submitted).max() else { return Ok(()) };
        for ((sector, pasts), shown) in (0..).zip(&self.sectors).zip(shown) {
            let lost = |past: &&Past| past.acknowledged < flush && shown.acknowledged < past.submitted;
            if let Some(Past { write, .. }) = pasts.iter().find(lost) {
                return Err(format!(
                    "sector {sector} of the backing device shows {} and lacks {write}, though it shows a write that \
                     was submitted at {newest}, after the flush submitted at {flush}",
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
        for (sector, (write, bytes)) in (0..).zip(writes.into_iter().zip(data.chunks_mut(SECTOR_BYTES))) {
            stamp::fill(bytes, Sector(sector), WriteId(write));
        }
        data
    }

    #[test]
    fn what_came_after_a_flush_needs_what_came_before() {
        let mut ledger = Ledger::new(2);
        for (write, sector, at) in [(1, 0, 10), (2, 1, 20)] {
            ledger.begins(WriteId(write), sector..sector + 1, at);
            ledger.ends(WriteId(write), sector..sector + 1, at + 1);
        }
        assert_eq!(ledger.check(&shows([0, 2])), Ok(()), "without a flush, in any order");
        ledger.flushed(12, 15);
        assert!(ledger.check(&shows([0, 2])).unwrap_err().contains("lacks write 1"));
        for right in [[0, 0], [1, 0], [1, 2]] {
            assert_eq!(ledger.check(&shows(right)), Ok(()));
        }
        ledger.recovered(1, WriteId(0), 30);
        assert!(ledger.check(&shows([1, 2])).unwrap_err().contains("lost"));
    }
}
