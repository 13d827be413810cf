//! Scripts on small caches that crash at every moment, in every way.

use libwb::cache::WriteMode;
use libwb::rules::Rule;
use std::sync::Arc;
use wb_tests::sim::engine::Engine;
use wb_tests::sim::exhaustive::Step::{
    self, Batch, Caching, Cut, Discard, DiscardBehind, Drain, Flush, FlushBehind, Mode, Read,
    Reopen, Sleep, Slow, Write, WriteFua,
};
use wb_tests::sim::exhaustive::{Crashes, Left, Script, Tally, explore};
use wb_tests::sim::real::WriteCache;

/// How many interleavings to run each script with.
const SEEDS: u64 = 2;
/// How many interleavings it may take until a broken rule shows.
const BUG_SEEDS: u64 = 64;
/// Sectors of a whole segment's blocks.
const SEGMENT: u64 = 127 * 8;

/// Parts of blocks, merged in RAM and from the cache device, with flushes between.
const MERGES: &[Step] = &[
    Write(0, 8),
    Write(19, 3),
    Flush,
    Write(2, 2),
    Write(17, 4),
    FlushBehind,
    Write(5, 12),
    Flush,
    Read(0, 32),
    Write(1, 1),
    Flush,
];

/// Each flush takes a slot, so that the log wraps more than once.
const LAPS: &[Step] = &[
    Write(0, 8),
    Flush,
    Write(3, 8),
    Flush,
    Write(0, 2),
    Flush,
    Write(8, 9),
    Flush,
    Write(1, 6),
    FlushBehind,
    Write(30, 3),
    Flush,
    Write(0, 40),
    Flush,
    Write(7, 2),
    Read(0, 64),
    Flush,
];

/// Write-back on demand, with newer versions on their way.
const DRAINS: &[Step] = &[
    Write(4, 8),
    Drain,
    Write(0, 6),
    FlushBehind,
    Write(5, 2),
    Drain,
    Write(4, 1),
    Write(6, 1),
    Sleep(3000),
    Write(7, 3),
    Drain,
];

/// Several commits of one segment. Parts of blocks are written again between them, and flushes
/// share a commit. A commit is torn in its header or its data, and a second crash follows. Then the
/// segment is closed, and the log wraps.
const COMMITS: &[Step] = &[
    Write(0, 8),
    Flush,
    Write(2, 2),
    Write(16, 12),
    Flush,
    Write(3, 6),
    FlushBehind,
    Write(3, 1),
    FlushBehind,
    Write(40, 8),
    Flush,
    Write(5, 2),
    FlushBehind,
    Sleep(1),
    Cut(Left::NewestTorn),
    Write(1, 2),
    Flush,
    Write(0, 30),
    FlushBehind,
    Cut(Left::AllButOldest),
    Write(9, 3),
    Flush,
    Write(9, 3),
    Drain,
    Write(10, 1),
    Flush,
    Drain,
    WriteFua(11, 1),
];

/// A segment with commits that fills up, with the next one on its way while its rest is not
/// written.
const OVERFLOWS: &[Step] = &[
    Write(0, SEGMENT - 16),
    Flush,
    Write(3, 8),
    Flush,
    Write(100, SEGMENT),
    Sleep(1),
    FlushBehind,
    Write(0, 8),
    Flush,
    Cut(Left::AllButOldest),
    Write(0, 8),
    Flush,
];

/// Closed and opened again, clean and dirty.
const REOPENS: &[Step] = &[
    Write(0, 8),
    Flush,
    Write(2, 3),
    Reopen,
    Write(1, 2),
    Write(9, 1),
    Reopen,
    Write(3, 9),
    Drain,
    Reopen,
    Read(0, 32),
];

/// Power cuts, and crashes of the recovery that follows.
const CUTS: &[Step] = &[
    Write(0, 8),
    Flush,
    Write(2, 3),
    FlushBehind,
    Sleep(1),
    Cut(Left::NewestTorn),
    Write(1, 2),
    Flush,
    Write(9, 3),
    FlushBehind,
    Cut(Left::AllButOldest),
    Write(0, 20),
    Flush,
    Cut(Left::Nothing),
    Drain,
];

/// Discards of dirty data in RAM and on the cache device, of data that is written back, and of
/// parts of blocks, with writes in between.
const DISCARDS: &[Step] = &[
    Write(0, 24),
    Flush,
    Write(3, 9),
    Discard(8, 8),
    Read(0, 32),
    Drain,
    Write(32, 3),
    Discard(5, 30),
    WriteFua(9, 2),
    DiscardBehind(8, 16),
    Write(12, 2),
    Flush,
    Reopen,
    Write(40, 8),
    Discard(0, 64),
    Write(1, 1),
    Drain,
];

/// Writes during a discard on a slow backing device, which are written back at once.
const FENCES: &[Step] = &[
    Write(0, 64),
    Drain,
    Slow(50),
    DiscardBehind(0, 64),
    Sleep(1),
    Write(8, 2),
    FlushBehind,
    Write(24, 8),
    Drain,
    Read(0, 64),
    DiscardBehind(0, 64),
    Write(16, 8),
    Drain,
    Read(0, 64),
];

/// Writes around the log, to blocks that it holds, held, or never held, with a change of mode and
/// other writes in between.
const AROUND: &[Step] = &[
    Write(0, 24),
    Write(41, 3),
    Flush,
    Mode(WriteMode::Around),
    Write(3, 9),
    Write(60, 4),
    Drain,
    Write(2, 12),
    Read(0, 64),
    Mode(WriteMode::Back),
    Write(4, 2),
    FlushBehind,
    Write(30, 9),
    Mode(WriteMode::Around),
    Write(40, 8),
    Write(5, 3),
    Mode(WriteMode::Back),
    Write(40, 1),
    Flush,
    Drain,
    Mode(WriteMode::Through),
    Write(0, 64),
    Cut(Left::Nothing),
    Mode(WriteMode::Through),
    Write(7, 20),
    Read(0, 64),
    Discard(8, 8),
    Reopen,
    Mode(WriteMode::Around),
    Write(9, 1),
    Flush,
];

/// Blocks that are cached for reads, with writes and discards before and after their cells reach
/// the log.
const CACHED: &[Step] = &[
    Write(0, 12),
    Drain,
    Caching(4),
    Read(64, 8),
    Read(64, 8),
    Write(66, 3),
    Flush,
    Read(72, 32),
    Read(72, 32),
    Sleep(1),
    Read(64, 64),
    Write(73, 2),
    FlushBehind,
    Write(96, 8),
    Drain,
    Read(104, 8),
    Read(104, 8),
    Discard(104, 8),
    Read(112, 16),
    Read(112, 16),
    Read(24, 16),
    Read(24, 16),
    Sleep(1),
    Read(0, 128),
    Write(117, 3),
    Write(105, 1),
    FlushBehind,
    Discard(72, 16),
    Cut(Left::AllButOldest),
    Caching(1),
    Read(80, 8),
    Read(80, 8),
    Sleep(1),
    Write(80, 4),
    Flush,
    Read(64, 64),
    Reopen,
    Write(81, 1),
    Drain,
];

/// Whole segments, several on their way. The oldest is lost: what is above the gap is dropped, and
/// the log grows up to it again.
const GAPS: &[Step] = &[
    Write(0, 3 * SEGMENT),
    Sleep(100),
    Cut(Left::AllButOldest),
    Write(5, 8),
    Flush,
    Write(7, 3),
    Flush,
    Write(0, 2),
    Flush,
];

/// The same blocks in several segments, written back a few at a time. The backing device alone must
/// hold what is written back, whatever later segments hold.
const BATCHES: &[Step] = &[
    Batch(1),
    Write(0, SEGMENT),
    Write(0, SEGMENT),
    Write(8, SEGMENT),
    Write(3, 16),
    Drain,
    Write(0, SEGMENT),
    Write(5, SEGMENT),
    FlushBehind,
    Drain,
];

/// More than the log holds, so that writers wait for slots, and slots are reused as soon as they
/// are free.
const FULL: &[Step] = &[
    Write(0, 3 * SEGMENT),
    Write(8, 3 * SEGMENT - 8),
    Write(3, SEGMENT),
    FlushBehind,
    Write(0, SEGMENT + 5),
    Flush,
];

/// The volume is as small as the steps allow.
fn script(name: &'static str, segments: u64, steps: &'static [Step]) -> Script {
    let blocks =
        if steps.iter().any(|step| matches!(step, Write(_, SEGMENT..))) { 3 * 127 } else { 16 };
    Script { name, segments, blocks, steps }
}

fn engine() -> Arc<dyn Engine> {
    Arc::new(WriteCache::default())
}

fn everywhere(name: &'static str, sizes: &[u64], steps: &'static [Step]) {
    let mut all = Tally::default();
    for &segments in sizes {
        for (extended, seed) in
            [false, true].into_iter().flat_map(|e| (0..SEEDS).map(move |seed| (e, seed)))
        {
            let tally = explore(
                &engine(),
                &script(name, segments, steps),
                Crashes::PowerCuts,
                extended,
                seed,
            );
            let tally = tally.unwrap_or_else(|text| panic!("{text}"));
            all.moments += tally.moments;
            all.crashes += tally.crashes;
            all.recoveries += tally.recoveries;
        }
    }
    println!("{name}: {all:?}");
    assert!(all.crashes > all.moments && all.moments > 100, "{all:?}");
}

#[test]
fn merges() {
    everywhere("merges", &[3, 5], MERGES);
}

#[test]
fn laps() {
    everywhere("laps", &[3, 5], LAPS);
}

#[test]
fn drains() {
    everywhere("drains", &[3, 5], DRAINS);
}

#[test]
fn commits() {
    everywhere("commits", &[3, 5], COMMITS);
}

#[test]
fn overflows() {
    everywhere("overflows", &[3, 8], OVERFLOWS);
}

#[test]
fn reopens() {
    everywhere("reopens", &[3, 5], REOPENS);
}

#[test]
fn cuts() {
    everywhere("cuts", &[3, 5], CUTS);
}

#[test]
fn discards() {
    everywhere("discards", &[3, 5], DISCARDS);
}

#[test]
fn around() {
    everywhere("around", &[3, 5], AROUND);
}

#[test]
fn cached() {
    everywhere("cached", &[5, 8], CACHED);
}

#[test]
fn fences() {
    everywhere("fences", &[3, 5], FENCES);
}

#[test]
fn batches() {
    everywhere("batches", &[5, 8], BATCHES);
}

#[test]
fn full() {
    everywhere("full", &[3], FULL);
}

#[test]
fn gaps() {
    everywhere("gaps", &[5, 8], GAPS);
}

/// Broken rules must show, to prove that the crashes find bugs.
#[test]
fn broken_rules_show() {
    let cases = [
        (Rule::FlushWaitsForDevice, "laps", 3, LAPS),
        (Rule::BackingFlushedBeforeRecord, "drains", 3, DRAINS),
        (Rule::MergeKeepsOldSectors, "merges", 5, MERGES),
        (Rule::RecordMadeDurable, "full", 3, FULL),
        (Rule::CommitReplacedOnlyWhenDurable, "commits", 5, COMMITS),
        (Rule::CommittedNeverOverwritten, "commits", 5, COMMITS),
        (Rule::OpenEndClosed, "commits", 5, COMMITS),
        (Rule::UnclaimedReadWhole, "commits", 5, COMMITS),
        (Rule::WrittenWithoutGap, "gaps", 8, GAPS),
        (Rule::LossWindowKept, "gaps", 8, GAPS),
        (Rule::OnlyDurableClaimed, "gaps", 8, GAPS),
        (Rule::RecoveryStopsAtGap, "gaps", 8, GAPS),
        (Rule::DroppedErased, "gaps", 8, GAPS),
        (Rule::DiscardFlushed, "discards", 5, DISCARDS),
        (Rule::DiscardCoversDirty, "discards", 5, DISCARDS),
        (Rule::RangeLocksRespected, "fences", 5, FENCES),
        (Rule::LoggedStaysInLog, "around", 5, AROUND),
        (Rule::WriteAroundFlushed, "around", 5, AROUND),
        (Rule::WriteAroundAfterLogFlush, "around", 5, AROUND),
        (Rule::WriteAroundDropsCached, "around", 5, AROUND),
        (Rule::OlderWrittenThoughNewerDurable, "batches", 8, BATCHES),
    ];
    for (rule, name, segments, steps) in cases {
        let engine: Arc<dyn Engine> = Arc::new(WriteCache::with(rule));
        let script = script(name, segments, steps);
        let caught = (0..BUG_SEEDS)
            .any(|seed| explore(&engine, &script, Crashes::PowerCuts, true, seed).is_err());
        assert!(caught, "{rule:?} goes unnoticed by {name}");
    }
}
