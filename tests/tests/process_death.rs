//! The process dies alone, at every change to a device and at every step of a change to the log's
//! head. The next process must show exactly what was acknowledged.

use libwb::rules::Rule;
use std::sync::Arc;
use wb_tests::sim::engine::Engine;
use wb_tests::sim::exhaustive::Step::{
    self, Cut, Die, Discard, Drain, Flush, FlushBehind, Read, Reopen, Sleep, Write, WriteFua,
};
use wb_tests::sim::exhaustive::{Crashes, Left, Script, Tally, explore};
use wb_tests::sim::real::WriteCache;

/// How many interleavings it may take until a broken rule shows.
const BUG_SEEDS: u64 = 16;
/// Sectors of a whole segment's blocks.
const SEGMENT: u64 = 127 * 8;

/// Blocks in RAM alone, written again in place, whole and in part.
const IN_PLACE: &[Step] = &[
    Write(0, 8),
    Write(3, 2),
    Write(10, 4),
    Die,
    Write(0, 16),
    Read(0, 24),
    Die,
    Die,
    Write(1, 1),
];

/// Commits, and newer versions of what they hold.
const COMMITS: &[Step] = &[
    Write(0, 8),
    Flush,
    Die,
    Write(0, 8),
    Write(16, 4),
    FlushBehind,
    Write(2, 2),
    Die,
    Die,
    Flush,
    Write(0, 8),
    Cut(Left::Nothing),
    WriteFua(1, 2),
    Die,
    Write(1, 2),
    Drain,
    Write(1, 1),
    Die,
];

/// The process dies right after what was flushed is written again. Then the power fails.
const CUT_AFTER_DEATH: &[Step] = &[
    Write(0, 8),
    Flush,
    Die,
    Write(0, 8),
    FlushBehind,
    Sleep(1),
    Cut(Left::NewestTorn),
    Write(0, 4),
    Die,
    Flush,
    Cut(Left::Nothing),
];

/// The process dies during flushes, at about the end of a read. The next one is asked for a flush,
/// and then the power fails.
const FLUSHED: &[Step] = &[
    Write(0, 8),
    FlushBehind,
    Read(800, 8),
    Die,
    Flush,
    Cut(Left::Nothing),
    Write(8, 8),
    FlushBehind,
    Read(900, 16),
    Die,
    Flush,
    Cut(Left::Nothing),
];

/// Full segments on their way to the device.
const SEGMENTS: &[Step] = &[
    Write(0, SEGMENT + 24),
    Die,
    Write(4, SEGMENT),
    Die,
    Flush,
    Cut(Left::Nothing),
    Write(0, 8),
    Die,
];

/// Zeros of discards.
const DISCARDS: &[Step] = &[
    Write(0, 16),
    Discard(4, 8),
    Write(6, 1),
    Die,
    Discard(0, 8),
    Die,
    Drain,
    Write(0, 3),
    Die,
    Reopen,
    Discard(0, 16),
];

fn script(name: &'static str, segments: u64, steps: &'static [Step]) -> Script {
    Script { name, segments, blocks: 160, steps }
}

fn at_every_moment(name: &'static str, steps: &'static [Step]) {
    let engine: Arc<dyn Engine> = Arc::new(WriteCache::default());
    let mut all = Tally::default();
    for (extended, seed) in [(false, 0), (true, 0), (true, 1)] {
        let script = script(name, 5, steps);
        let tally = explore(&engine, &script, Crashes::Deaths, extended, seed);
        let tally = tally.unwrap_or_else(|text| panic!("{text}"));
        all.moments += tally.moments;
        all.recoveries += tally.recoveries;
    }
    println!("{name}: {all:?}");
    assert!(all.moments > 100, "{all:?}");
}

#[test]
fn in_place() {
    at_every_moment("in place", IN_PLACE);
}

#[test]
fn commits() {
    at_every_moment("commits", COMMITS);
}

#[test]
fn cut_after_death() {
    at_every_moment("cut after death", CUT_AFTER_DEATH);
}

#[test]
fn flushed() {
    at_every_moment("flushed", FLUSHED);
}

#[test]
fn segments() {
    at_every_moment("segments", SEGMENTS);
}

#[test]
fn discards() {
    at_every_moment("discards", DISCARDS);
}

/// Broken rules must show, to prove that the deaths find bugs.
#[test]
fn broken_rules_show() {
    let cases = [
        (Rule::HeadDataFirst, "in place", IN_PLACE),
        (Rule::HeadOverwriteUndone, "in place", IN_PLACE),
        (Rule::HeadResumed, "in place", IN_PLACE),
        (Rule::HeadKeptWhenResumed, "in place", IN_PLACE),
        (Rule::HeadKeptUntilWritten, "segments", SEGMENTS),
        (Rule::HeadKnowsCommit, "cut after death", CUT_AFTER_DEATH),
        (Rule::HeadEndStaysOpen, "commits", COMMITS),
        (Rule::FlushedAtOpen, "flushed", FLUSHED),
    ];
    let unnoticed: Vec<Rule> = cases
        .into_iter()
        .filter(|(rule, name, steps)| {
            let engine: Arc<dyn Engine> = Arc::new(WriteCache::with(*rule));
            let script = script(name, 5, steps);
            let found = (0..BUG_SEEDS)
                .find_map(|seed| explore(&engine, &script, Crashes::Deaths, true, seed).err());
            let first = found.as_ref().and_then(|text| text.lines().next());
            println!("{rule:?}: {}", first.unwrap_or("unnoticed"));
            found.is_none()
        })
        .map(|(rule, ..)| rule)
        .collect();
    assert!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
}
