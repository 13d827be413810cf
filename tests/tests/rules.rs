//! The simulator notices a cache that breaks a rule, within a few seeds. Some broken rules show in
//! few seeds only. Other tests find those:
//!
//! - The scripts of `crash_points.rs`, which crash at every moment, find `RangeLocksRespected` (it
//!   needs a write during a discard), `CommitReplacedOnlyWhenDurable` (a header that is torn
//!   between two commits), `RecordMadeDurable` (a slot that is reused just before a power cut) and
//!   `DroppedErased` (a log that grows up to what an earlier power cut had cut off).
//! - `kernel_compat.rs` finds `UnreadableEmptied` and `EmptiedOnlyWhenFlushed`, which need a device
//!   that fails during a discard.
//! - `failed_flushes.rs` finds `FailedFlushFinal`, `FailedDurableWriteFinal`, `HeadKeepsFailure`
//!   and `DurableWriteAlone`, which need large writes, a flush of the cache device or both while a
//!   commit is under way.
//! - `second_look.rs` finds `ContradictionFails`, which needs a device that has lost segments.
//! - `process_death.rs`, where the process dies at every moment, finds `HeadDataFirst`,
//!   `HeadKnowsCommit`, `HeadEndStaysOpen` and `FlushedAtOpen`.
//! - `cache_over_network.rs` finds `LostLinkNoFault`, which needs a backing device on a server, and
//!   `network.rs` the other rules about links.
//! - `stuck.rs` finds the rules about blocks that cannot be written back, and `HeadKeepsLost`.

use libwb::rules::Rule;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use wb_tests::sim::real::WriteCache;
use wb_tests::sim::run;

/// The seeds to search for each broken rule: the first seed, and how many may be needed. If the
/// first seed that shows it is far from 0, the search begins shortly before it. The ranges leave
/// room, because a change of the engine changes the scenario of each seed.
const SEEDS_NEEDED: &[(Rule, u64, u64)] = &[
    (Rule::FlushWaitsForDevice, 0, 100),
    (Rule::BackingFlushedBeforeRecord, 0, 20),
    (Rule::MergeKeepsOldSectors, 0, 20),
    (Rule::PinsRespected, 0, 600),
    (Rule::OnlyDurableWrittenBack, 250, 500),
    (Rule::OlderWrittenUnlessNewerInBatch, 0, 100),
    (Rule::OlderWrittenThoughNewerDurable, 0, 200),
    (Rule::RecoveryStopsAtGap, 50, 500),
    (Rule::LossWindowKept, 0, 200),
    (Rule::WrittenWithoutGap, 0, 300),
    (Rule::ReadsVerified, 0, 600),
    (Rule::CommittedNeverOverwritten, 0, 100),
    (Rule::DurableAsOfFlushStart, 0, 1000),
    (Rule::DurableWithoutGap, 0, 500),
    (Rule::OpenEndClosed, 0, 500),
    (Rule::RecoveryStopsAtCutShort, 800, 3000),
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
    (Rule::ReservedInSameVisit, 0, 3000),
    (Rule::VersionsStayInOrder, 0, 1500),
    (Rule::OneEpochPerBatch, 600, 800),
    (Rule::TailReadOn, 0, 500),
    (Rule::LinkedAsReadLast, 0, 500),
    (Rule::RotIsNoPowerCut, 0, 50),
    (Rule::HeadOverwriteUndone, 0, 1000),
    (Rule::HeadKeptUntilWritten, 0, 500),
    (Rule::HeadResumed, 0, 100),
    (Rule::HeadKeptWhenResumed, 0, 500),
];

/// The simulator's failure for a seed, if any. A panic of the engine counts as well.
fn verdict(rule: Rule, seed: u64) -> Option<String> {
    match catch_unwind(|| run(&WriteCache::with(rule), seed)) {
        Ok(result) => {
            result.err().map(|failure| failure.text.lines().next().unwrap_or_default().to_string())
        }
        Err(_) => Some("a panic".into()),
    }
}

/// Searches for a seed that shows a broken rule. Returns a line for the table, and whether there is
/// one.
fn look_for(&(rule, first, seeds): &(Rule, u64, u64)) -> (String, bool) {
    let found =
        (first..first + seeds).find_map(|seed| verdict(rule, seed).map(|text| (seed, text)));
    let line = match &found {
        Some((seed, text)) => {
            format!("{rule:?}: seed {seed}, {} from {first} on: {text}", seed - first + 1)
        }
        None => format!("{rule:?} goes unnoticed by the {seeds} seeds from {first} on"),
    };
    (line, found.is_some())
}

#[test]
fn every_broken_rule_is_noticed() {
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
