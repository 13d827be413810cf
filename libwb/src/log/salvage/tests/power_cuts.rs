//! A power cut at any write of a salvage, and a second attempt.

use crate::device::Device;
use crate::format::SegmentId;
use crate::log::evidence::cases_of_evidence;
use crate::log::salvage::{SalvageMode, Scanned};
use crate::log::test_log::{
    MASKS, TestLog, Write, in_sectors, read, salvage, survivors, volume, with_survivors,
};
use std::collections::{BTreeMap, HashSet};

/// Logs that are corrupt in every known way.
fn cases() -> Vec<TestLog> {
    let mut cases = Vec::new();
    for extended in [false, true] {
        let new = |newest| TestLog::new(newest, extended);
        let mut case = |mut log: TestLog, damage: &dyn Fn(&mut TestLog)| {
            damage(&mut log);
            cases.push(log);
        };
        case(new(9), &|log| {
            log.rot(3, 2);
        });
        case(new(20), &|log| {
            log.rot(8, 2).rot(12, 0).garble(18);
        });
        case(new(20), &|log| {
            log.garble(7).rot(8, 4).rot(11, 0);
        });
        case(new(20), &|log| {
            log.record(9).rot(10, 1).garble(9);
        });
        case(new(14), &|log| {
            log.garble(1).rot(9, 1);
        });
        case(new(9), &|log| {
            log.record(9).garble(9);
        });
        case(new(9), &|log| {
            log.record(11);
        });
        case(new(9), &|log| {
            log.record(u64::MAX).rot(4, 4);
        });
        case(new(9), &|log| {
            log.unreadable(2).garble(5);
        });
        case(new(5), &|log| {
            log.garble(12).garble(13);
        });
    }
    let mut marked = TestLog::new(9, true);
    marked.write_pages(Some(SegmentId(9)));
    marked.rot(8, 2).rot(9, 4);
    cases.push(marked);
    let mut marked_beyond = TestLog::new(9, true);
    marked_beyond.put(11, true, 0);
    marked_beyond.write_pages(Some(SegmentId(20)));
    cases.push(marked_beyond);
    cases.extend(cases_of_evidence());
    let mut mixed = TestLog::new(20, true);
    mixed.put(19, false, 0);
    mixed.garble(8);
    cases.push(mixed);
    cases
}

#[test]
fn a_power_cut_at_any_write_and_a_second_attempt_give_the_same_volume() {
    for (nth, log) in cases().iter().enumerate() {
        let device: Device = log.device();
        let before = generation(&read(&device));
        for mode in SalvageMode::ALL {
            let (done, plan) = salvage(log, mode);
            let want = volume(&done.memory.content()).expect("a sound log");
            let writes = done.writes.lock().clone();
            let sectors = in_sectors(&writes);
            // Several masks keep the same writes. All writes up to one flush are also no writes
            // after the previous one.
            let mut seen = HashSet::new();
            let mut check = |writes: &[Write], flushes, any, what: &str| {
                let survivors = survivors(writes, flushes, any);
                if seen.insert(survivors.clone()) {
                    let what =
                        format!("case {nth}, {mode}, flush {flushes}, {what}, mask {any:#x}");
                    let cut = with_survivors(log, writes, &survivors);
                    assert_eq!(
                        after_second_attempt(&cut, mode, before, &what).as_ref(),
                        Some(&want),
                        "{what}"
                    );
                }
            };
            for flushes in 0..=*done.flushes.lock() {
                let count = writes.iter().filter(|(.., after)| *after == flushes).count();
                let alone = (0..count).flat_map(|nth| [1 << nth, !(1 << nth)]);
                for any in MASKS.into_iter().take(2).chain(alone) {
                    check(&writes, flushes, any, "whole");
                }
                // Only the header proves the good blocks that a salvage keeps of a segment.
                if plan.given_up.iter().all(|lost| lost.kept == 0) {
                    for any in MASKS.into_iter().skip(2) {
                        check(&sectors, flushes, any, "torn");
                    }
                }
            }
        }
    }
}

fn generation(scanned: &Scanned) -> Option<u64> {
    scanned.superblock.extension().map(|page| page.generation)
}

/// The volume of a log after a salvage, if it needs one. If the log is sound without the segments
/// given up, its `generation` must distinguish it from an older copy.
fn after_second_attempt(
    log: &TestLog,
    mode: SalvageMode,
    before: Option<u64>,
    what: &str,
) -> Option<BTreeMap<u64, u8>> {
    let device: Device = log.device();
    let now = read(&device);
    if now.is_corrupt() {
        return volume(&salvage(log, mode).0.memory.content());
    }
    assert!(before.is_none() || generation(&now) > before, "{what}");
    volume(&log.image)
}
