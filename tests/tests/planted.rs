//! The simulator finds each planted bug within a few seeds. Some bugs show in few seeds only. The
//! scripts of `crash_points.rs`, which crash at every moment, find those: `FenceIgnored` needs a
//! write during a discard. `CommitOverUndurable` needs a header that is torn in the short time
//! between two commits. `RecordNotDurable` needs a slot that is reused just before a power cut.
//! `DroppedNotErased` needs a log that grows up to what an earlier power cut had cut off.
//! `kernel_compat.rs` finds `UnreadableLeft` and `HalfEmptiedTrusted`, which need a device that
//! fails during a discard. `stuck.rs` finds bugs about blocks that cannot be written back.

use libwb::rules::Rule;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use wb_tests::sim::real::WriteCache;
use wb_tests::sim::run;

/// The seeds to search for each bug: the first seed, and how many may be needed. If the first seed
/// that shows the bug is far from 0, the search begins shortly before it. The ranges leave room,
/// because a change of the engine changes the scenario of each seed.
const SEEDS_NEEDED: &[(Rule, u64, u64)] = &[
    (Rule::FlushWaitsForDevice, 0, 100),
    (Rule::BackingFlushedBeforeRecord, 0, 20),
    (Rule::MergeKeepsOldSectors, 0, 20),
    (Rule::PinsRespected, 50, 300),
    (Rule::OnlyDurableWrittenBack, 250, 500),
    (Rule::OlderWrittenUnlessNewerInBatch, 0, 100),
    (Rule::OlderWrittenThoughNewerDurable, 0, 200),
    (Rule::RecoveryStopsAtGap, 50, 500),
    (Rule::LossWindowKept, 0, 200),
    (Rule::WrittenWithoutGap, 0, 300),
    (Rule::ReadsVerified, 0, 200),
    (Rule::CommittedNeverOverwritten, 0, 100),
    (Rule::DurableAsOfFlushStart, 0, 1000),
    (Rule::OpenEndClosed, 0, 500),
    (Rule::RecoveryStopsAtCutShort, 0, 800),
    (Rule::UnclaimedReadWhole, 0, 500),
    (Rule::OnlyDurableClaimed, 200, 800),
    (Rule::DiscardFlushed, 0, 200),
    (Rule::DiscardCoversDirty, 0, 100),
    (Rule::DiscardAfterLogFlush, 0, 200),
    (Rule::DiscardMarkEndsWithSlot, 0, 500),
    (Rule::LoggedStaysInLog, 0, 500),
    (Rule::WriteAroundFlushed, 0, 500),
    (Rule::WriteAroundAfterLogFlush, 300, 1000),
    (Rule::WriteAroundDropsCached, 0, 500),
    (Rule::WriteAroundCancelsAdmission, 700, 2000),
    (Rule::WriteCancelsAdmission, 0, 500),
    (Rule::DiscardCancelsAdmission, 300, 1500),
    (Rule::OneEpochPerBatch, 600, 800),
    (Rule::FailedFlushFinal, 100, 800),
    (Rule::RotIsNoPowerCut, 0, 50),
];

/// The simulator's failure for a seed, if any. A panic of the engine counts as well.
fn verdict(bug: Rule, seed: u64) -> Option<String> {
    match catch_unwind(|| run(&WriteCache::with(bug), seed)) {
        Ok(result) => {
            result.err().map(|failure| failure.text.lines().next().unwrap_or_default().to_string())
        }
        Err(_) => Some("a panic".into()),
    }
}

/// Searches for a bug; returns a line for the table, and whether the search found it.
fn look_for(&(bug, first, seeds): &(Rule, u64, u64)) -> (String, bool) {
    let found = (first..first + seeds).find_map(|seed| verdict(bug, seed).map(|text| (seed, text)));
    let line = match &found {
        Some((seed, text)) => {
            format!("{bug:?}: seed {seed}, {} from {first} on: {text}", seed - first + 1)
        }
        None => format!("{bug:?} goes unnoticed by the {seeds} seeds from {first} on"),
    };
    (line, found.is_some())
}

#[test]
fn every_planted_bug_is_found() {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut missed = Vec::new();
        while let Some(case) = SEEDS_NEEDED.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (line, found) = look_for(case);
            println!("{line}");
            missed.extend((!found).then_some(line));
        }
        missed
    };
    let missed = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mut missed = work();
        missed.extend(other.join().expect("the other thread does not panic"));
        missed
    });
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
