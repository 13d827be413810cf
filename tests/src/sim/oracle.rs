//! The oracle decides which contents of a volume its history allows.
//!
//! Time is a count of events. One write precedes another if it was acknowledged before the other
//! was submitted. Otherwise the two are concurrent, and either order is right. Two rules follow.
//!
//! *Reads.* A sector shows a write that was submitted before the read ended and that no other write
//! had certainly replaced when the read began. A write that a read has shown has taken effect by
//! then.
//!
//! *Crashes.* Recovery shows the state at one moment T, at or after the submission of the last
//! acknowledged flush. A write that any sector shows was submitted before T. So every write
//! acknowledged before the latest such submission is in the state: each of its sectors shows it or
//! something no older. A write under way at T may be there in part. Of an acknowledged write, each
//! block is there whole or not at all, and no block without those before it (`blocks`).
//!
//! *Discards* are writes of zeros. A sector of zeros may show any discard, so one right discard is
//! enough.
//!
//! After a power cut, the recovered state is durable, and the history starts from it. After the
//! death of the process alone, a later power cut may still undo it down to the last flush. What was
//! not recovered never comes back.

use super::backing_history::BackingHistory;
use super::stamp::{self, Content, WriteId};
use events::{Event, history};
use libwb::device::sim::Crash;
use libwb::format::{SECTOR_BYTES, Sector, SegmentId, to_u64, to_usize};
use std::collections::BTreeSet;
use version::{NEVER, Version, candidates, forget, may_be_read, may_be_recovered};

mod blocks;
mod events;
mod version;

pub use version::Moment;

/// The history of a volume, and the judge of what it shows.
pub struct Oracle {
    now: Moment,
    /// The submission of the last acknowledged flush.
    flushed: Moment,
    /// For each sector the versions it may show.
    sectors: Vec<Vec<Version>>,
    events: Vec<(Moment, Event)>,
    writes: u64,
    /// When the reads under way began.
    reads: BTreeSet<Moment>,
    /// Set if the backing device alone is judged as well.
    backing_history: Option<BackingHistory>,
    /// Whether a power cut may tear a block of a write that is not durable.
    tears_blocks: bool,
    /// The first violation.
    failure: Option<String>,
}

impl Oracle {
    /// The history of a volume of `sectors` sectors, each as write 0 fills it.
    pub fn new(sectors: u64) -> Oracle {
        let first = Version {
            write: WriteId(0),
            submitted: 0,
            acknowledged: 0,
            zeros: false,
            durable: false,
            effective: 0,
            again: false,
            failed: false,
            replaced: None,
        };
        Oracle {
            now: 1,
            flushed: 1,
            sectors: vec![vec![first]; to_usize(sectors)],
            events: Vec::new(),
            writes: 0,
            reads: BTreeSet::new(),
            backing_history: None,
            tears_blocks: false,
            failure: None,
        }
    }

    /// Allows torn blocks after a power cut.
    pub fn let_blocks_tear(&mut self) {
        self.tears_blocks = true;
    }

    /// Starts to judge the backing device alone, too.
    pub fn keep_backing_history(&mut self) {
        self.backing_history = Some(BackingHistory::new(to_u64(self.sectors.len())));
    }

    /// The superblock record is lost.
    pub fn record_lost(&mut self) {
        self.note("the superblock record is lost");
        if let Some(backing_history) = &mut self.backing_history {
            backing_history.record_lost();
        }
    }

    /// The engine moved blocks that the backing device refused to the end of the log.
    pub fn blocks_moved(&mut self) {
        if let Some(backing_history) = &mut self.backing_history {
            backing_history.blocks_moved();
        }
    }

    /// Whether the backing device alone may hold `data` once the segments up to `written_back` are
    /// written back.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn allows_alone(
        &self,
        data: &[u8],
        written_back: SegmentId,
        strict: bool,
    ) -> Result<(), String> {
        let Some(backing_history) = &self.backing_history else { return Ok(()) };
        backing_history.check(data, written_back)?;
        if strict { backing_history.check_strict(data) } else { Ok(()) }
    }

    /// A write that was acknowledged lies in this segment of the log or in one before.
    pub fn logged(&mut self, write: WriteId, first: Sector, count: u64, segment: SegmentId) {
        if let Some(backing_history) = &mut self.backing_history {
            backing_history.logged(write, first.0..first.0 + count, segment);
        }
    }

    /// The first violation of a rule, with the history of the sector.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Adds a line to the history.
    pub fn note(&mut self, text: impl Into<String>) {
        let now = self.tick();
        self.events.push((now, Event::Note(text.into())));
    }

    /// Records a violation that the caller has found.
    pub fn fail(&mut self, text: &str) {
        if self.failure.is_none() {
            self.failure = Some(format!("{text}\n{}", history(&self.events, None)));
        }
    }

    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    fn fail_at(&mut self, sector: u64, text: &str) {
        if self.failure.is_none() {
            self.failure = Some(format!(
                "at {}, sector {sector} {text}\n{}",
                self.now,
                history(&self.events, Some(sector))
            ));
        }
    }

    /// A write of `count` sectors begins.
    pub fn write_begins(&mut self, first: Sector, count: u64) -> WriteId {
        self.begins(first, count, false)
    }

    /// A discard of `count` sectors begins.
    pub fn discard_begins(&mut self, first: Sector, count: u64) -> WriteId {
        self.begins(first, count, true)
    }

    fn begins(&mut self, first: Sector, count: u64, zeros: bool) -> WriteId {
        let submitted = self.tick();
        self.writes += 1;
        let write = WriteId(self.writes);
        let version = Version {
            write,
            submitted,
            acknowledged: NEVER,
            zeros,
            durable: false,
            effective: NEVER,
            again: false,
            failed: false,
            replaced: None,
        };
        let range = first.0..first.0 + count;
        for sector in range.clone() {
            self.sectors[to_usize(sector)].push(version);
        }
        if let Some(backing_history) = &mut self.backing_history {
            backing_history.begins(write, zeros, range.clone(), submitted);
        }
        let what = if zeros { "discard" } else { "write" };
        self.events.push((submitted, Event::Submit(write, what, range)));
        write
    }

    /// As [`Oracle::write_ends`], for a write or a discard that is durable once acknowledged.
    pub fn durable_write_ends(
        &mut self,
        write: WriteId,
        first: Sector,
        count: u64,
        acknowledged: bool,
    ) {
        for sector in first.0..first.0 + count {
            let versions = &mut self.sectors[to_usize(sector)];
            if let Some(version) = versions.iter_mut().find(|version| version.write == write) {
                version.durable = acknowledged;
            }
        }
        self.write_ends(write, first, count, acknowledged);
    }

    /// A write has ended. A failed one may have been done in part, and may still take effect.
    pub fn write_ends(&mut self, write: WriteId, first: Sector, count: u64, acknowledged: bool) {
        let now = self.tick();
        let range = first.0..first.0 + count;
        if let Some(backing_history) = self.backing_history.as_mut().filter(|_| acknowledged) {
            backing_history.ends(write, range.clone(), now);
        }
        for sector in range.clone() {
            let versions = &mut self.sectors[to_usize(sector)];
            let Some(version) = versions.iter_mut().find(|version| version.write == write) else {
                continue;
            };
            if acknowledged {
                version.acknowledged = now;
                version.effective = version.settled().min(now);
                version.again = false;
                let reading = self.reads.first().copied().unwrap_or(NEVER);
                forget(versions, self.flushed.min(reading));
            } else {
                version.effective = NEVER;
                version.failed = true;
                for version in versions {
                    version.replaced = version.replaced.filter(|(_, by)| *by != write);
                }
            }
        }
        self.events.push((now, Event::Done(write, range, acknowledged)));
    }

    /// A write that was not answered comes again after the death of the process. It takes effect
    /// once more, whatever has shown of it before.
    pub fn comes_again(&mut self, write: WriteId, first: Sector, count: u64) {
        for sector in first.0..first.0 + count {
            let versions = self.sectors[to_usize(sector)].iter_mut();
            for version in versions.filter(|version| version.write == write) {
                version.effective = NEVER;
                version.replaced = None;
                version.again = true;
            }
        }
    }

    /// A flush begins now.
    pub fn flush_begins(&mut self) -> Moment {
        self.tick()
    }

    /// A read begins now.
    pub fn read_begins(&mut self) -> Moment {
        let now = self.tick();
        self.reads.insert(now);
        now
    }

    /// A read that began at `began` has failed.
    pub fn read_fails(&mut self, began: Moment) {
        self.reads.remove(&began);
    }

    /// A flush, or an operation that implies one, that began at `began` has ended.
    pub fn flush_ends(&mut self, what: &'static str, began: Moment, acknowledged: bool) {
        let now = self.tick();
        if acknowledged {
            self.flushed = self.flushed.max(began);
            if let Some(backing_history) = &mut self.backing_history {
                backing_history.flushed(began, now);
                if what == "drain" {
                    backing_history.drained(began);
                }
            }
        }
        self.events.push((now, Event::Flush(what, began, acknowledged)));
    }

    /// A read that began at `began` has returned `data`.
    pub fn read_ends(&mut self, began: Moment, first: Sector, data: &[u8]) {
        let now = self.tick();
        self.reads.remove(&began);
        for (sector, bytes) in (first.0..).zip(data.chunks_exact(SECTOR_BYTES)) {
            let checked = stamp::decode(bytes, Sector(sector))
                .and_then(|content| self.check_read(sector, content, began, now));
            if let Err(text) = checked {
                return self.fail_at(sector, &format!("{text}; read from {began} on"));
            }
        }
    }

    fn check_read(
        &mut self,
        sector: u64,
        content: Content,
        began: Moment,
        now: Moment,
    ) -> Result<(), String> {
        let versions = &mut self.sectors[to_usize(sector)];
        let candidates = candidates(versions, content)?;
        let (right, wrong): (Vec<_>, Vec<_>) = candidates
            .into_iter()
            .map(|shown| (shown, may_be_read(versions, &shown, began)))
            .partition(|(_, judged)| judged.is_ok());
        let &[(shown, _)] = right.as_slice() else {
            // Several discards look the same.
            let first_wrong = wrong.into_iter().next().filter(|_| right.is_empty());
            return first_wrong.map_or(Ok(()), |(_, judged)| judged);
        };
        if shown.failed {
            return Ok(());
        }
        for version in versions {
            if version.write == shown.write {
                version.effective = version.effective.min(now);
            } else if version.settled() < began {
                version.replaced.get_or_insert((now, shown.write));
            }
        }
        Ok(())
    }

    /// Whether a power cut at this moment may leave a volume that reads as `data`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn allows(&self, data: &[u8]) -> Result<(), String> {
        let shown = self.decode(data).and_then(|shown| self.check_recovered(&shown));
        shown.map(drop).map_err(|(sector, text)| {
            format!(
                "sector {sector} {text}, after recovery\n{}",
                history(&self.events, Some(sector))
            )
        })
    }

    /// Whether a read of the whole volume may show `data` now.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn allows_now(&self, data: &[u8]) -> Result<(), String> {
        let began = self.now + 1;
        let judge = |sector: u64, content| {
            let versions = &self.sectors[to_usize(sector)];
            let shown = candidates(versions, content)?;
            let judged = shown.iter().map(|shown| may_be_read(versions, shown, began));
            judged.reduce(Result::or).unwrap_or(Ok(()))
        };
        let shown = self.decode(data);
        let wrong = match shown {
            Ok(shown) => (0..).zip(shown).find_map(|(sector, content)| {
                judge(sector, content).err().map(|text| (sector, text))
            }),
            Err(wrong) => Some(wrong),
        };
        wrong.map_or(Ok(()), |(sector, text)| {
            Err(format!("sector {sector} {text}\n{}", history(&self.events, Some(sector))))
        })
    }

    fn decode(&self, data: &[u8]) -> Result<Vec<Content>, (u64, String)> {
        (0..to_u64(self.sectors.len()))
            .zip(data.chunks_exact(SECTOR_BYTES))
            .map(|(sector, bytes)| {
                stamp::decode(bytes, Sector(sector)).map_err(|text| (sector, text))
            })
            .collect()
    }

    /// The whole volume as it was read after a crash.
    pub fn recovered(&mut self, crash: Crash, data: &[u8]) {
        let checked = self.decode(data).and_then(|shown| self.check_recovered(&shown));
        match checked {
            Ok(shown) => self.start_from(crash, &shown),
            Err((sector, text)) => {
                self.fail_at(sector, &format!("{text}, after {crash:?} and recovery"))
            }
        }
    }

    /// Which version each sector shows.
    fn check_recovered(&self, shown: &[Content]) -> Result<Vec<Version>, (u64, String)> {
        let mut moment = self.flushed;
        let mut reason = format!("a flush submitted at {moment} was acknowledged");
        let mut found = Vec::with_capacity(shown.len());
        for ((sector, versions), &content) in (0..).zip(&self.sectors).zip(shown) {
            let candidates = candidates(versions, content).map_err(|text| (sector, text))?;
            let Some(oldest) = candidates.iter().min_by_key(|version| version.submitted) else {
                continue;
            };
            if oldest.submitted > moment {
                moment = oldest.submitted;
                reason = format!(
                    "sector {sector} shows {}, which was submitted at {moment}",
                    oldest.write
                );
            }
            found.push(candidates);
        }
        let mut recovered = Vec::with_capacity(found.len());
        for ((sector, versions), candidates) in (0..).zip(&self.sectors).zip(found) {
            let judge = |shown: &Version| may_be_recovered(versions, shown, moment, &reason);
            let right = candidates.iter().find(|shown| judge(shown).is_ok());
            let wrong = || {
                (
                    sector,
                    candidates.first().and_then(|shown| judge(shown).err()).unwrap_or_default(),
                )
            };
            recovered.push(right.copied().ok_or_else(wrong)?);
        }
        if !self.tears_blocks {
            blocks::check(&self.sectors, &recovered)?;
        }
        Ok(recovered)
    }

    /// Takes the recovered content as the state from now on.
    fn start_from(&mut self, crash: Crash, shown: &[Version]) {
        let now = self.tick();
        self.reads.clear();
        for ((sector, versions), &version) in (0..).zip(&mut self.sectors).zip(shown) {
            if let Some(backing_history) = &mut self.backing_history {
                backing_history.recovered(sector, version.write, now);
            }
            let mut version = version;
            version.acknowledged = version.acknowledged.min(now);
            version.effective = version.acknowledged;
            version.replaced = None;
            version.failed = false;
            version.again = false;
            match crash {
                Crash::PowerCut => {
                    versions.clear();
                    version.submitted = now;
                    version.acknowledged = now;
                    version.effective = now;
                }
                Crash::Kill => {
                    versions.retain(|v| v.write != version.write && !version.precedes(v));
                    for v in versions.iter_mut() {
                        v.replaced = Some((now, version.write));
                        v.again = false;
                    }
                }
            }
            versions.push(version);
        }
        let now = self.tick();
        if crash == Crash::PowerCut {
            self.flushed = now;
        }
        self.events
            .push((now, Event::Note(format!("recovered from {crash:?}; all sectors agree"))));
    }
}

#[cfg(test)]
mod tests;
