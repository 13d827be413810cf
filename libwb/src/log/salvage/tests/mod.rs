//! Salvage and repair of logs in memory.

mod any_damage;
mod power_cuts;

use super::*;
use crate::device::Device;
use crate::format::SegmentId;
use crate::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, SECTOR_BYTES, SEGMENT_BYTES, to_u64, to_usize,
};
use crate::log::live::Beyond;
use crate::log::pairing::BackingFacts;
use crate::log::recovery::Corruption;
use crate::log::scan::SlotState;
use crate::log::test_log::{LENGTH, SLOTS, TestLog, expected, lost, read, salvage, volume};
use crate::log::{LogError, LogErrorKind};
use futures_lite::future::block_on;
use std::collections::BTreeMap;

#[test]
fn a_sound_log_is_left_alone() {
    for extended in [false, true] {
        let log = TestLog::new(20, extended);
        let device: Device = log.device();
        for way in SalvageMode::ALL {
            assert!(block_on(read(&device).salvage(&device, way)).unwrap().is_none());
        }
        assert!(block_on(read(&device).repair(&device)).unwrap().is_none());
    }
}

#[test]
fn of_a_segment_with_a_rotten_block_skip_keeps_the_others() {
    for bad in 0..LENGTH {
        let mut log = TestLog::new(9, true);
        log.rot(5, to_usize(bad));
        let (device, plan) = salvage(&log, SalvageMode::Skip);
        assert_eq!(volume(&device.memory.content()), Some(expected(1..=9, &[(5, bad)])), "{bad}");
        // Later segments rewrote the first two blocks of each segment.
        let blocks = if bad < 2 { vec![] } else { vec![500 + bad] };
        assert_eq!(lost(&plan), [(5, blocks)]);
        assert_eq!((plan.given_up[0].kept, plan.given_up[0].certainty), (4, Certainty::Sure));
    }
}

#[test]
fn a_newest_segment_that_is_cut_short_is_closed_where_skip_keeps_it() {
    let mut log = TestLog::new(9, true);
    // The bytes after the entries of a header belong to a torn commit.
    let behind = log.at(9) + SECTOR_BYTES + 16 * to_usize(LENGTH);
    log.rot(5, 3).image[behind] = 1;
    let (device, plan) = salvage(&log, SalvageMode::Skip);
    assert_eq!(volume(&device.memory.content()), Some(expected(1..=9, &[(5, 3)])));
    assert_eq!((plan.point, lost(&plan)), (SegmentId(9), vec![(5, vec![503])]));
}

#[test]
fn a_segment_that_is_cut_short_does_not_stand_where_the_log_is_to_go_on_after_it() {
    for record in [0, 15] {
        let mut log = TestLog::empty(5, true);
        for id in 1..=15 {
            log.put(id, true, id.saturating_sub(2));
        }
        let behind = log.at(14) + SECTOR_BYTES + 16 * to_usize(LENGTH);
        log.record(record).rot(15, 0).image[behind] = 1;
        log.write_pages(Some(SegmentId(15)));
        for way in SalvageMode::ALL {
            // If 14 is not written back, its proved blocks are kept.
            salvage(&log, way);
        }
    }
}

#[test]
fn without_the_extension_skip_gives_up_the_damaged_segment_alone() {
    let mut log = TestLog::new(9, false);
    log.rot(5, 3).record(2);
    let (device, plan) = salvage(&log, SalvageMode::Skip);
    assert_eq!(volume(&device.memory.content()), Some(expected([3, 4, 6, 7, 8, 9], &[])));
    assert_eq!(lost(&plan), [(5, vec![502, 503, 504])]);
    assert_eq!(plan.given_up[0].certainty, Certainty::Perhaps);
}

#[test]
fn stop_goes_back_to_before_the_damage() {
    for extended in [false, true] {
        let mut log = TestLog::new(20, extended);
        log.rot(12, 3);
        let (device, plan) = salvage(&log, SalvageMode::Stop);
        assert_eq!(volume(&device.memory.content()), Some(expected(7..=11, &[])), "{extended}");
        assert_eq!(plan.point, SegmentId(11));
        assert_eq!(
            lost(&plan).iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            (12..=20).collect::<Vec<_>>()
        );
        assert!(plan.summary().dirty_blocks_given_up >= 8 * 3);
    }
}

#[test]
fn stop_with_the_oldest_live_segment_gone_leaves_an_empty_log_that_goes_on() {
    let mut log = TestLog::new(20, true);
    log.garble(7);
    let (device, plan) = salvage(&log, SalvageMode::Stop);
    assert_eq!(
        (plan.point, volume(&device.memory.content())),
        (SegmentId(6), Some(BTreeMap::new()))
    );
}

#[test]
fn a_clean_mark_that_nothing_bears_out_is_taken_back() {
    let mut log = TestLog::new(5, true);
    log.write_pages(Some(SegmentId(9)));
    for way in SalvageMode::ALL {
        let (device, plan) = salvage(&log, way);
        assert_eq!(volume(&device.memory.content()), Some(expected(1..=5, &[])), "{way}");
        assert_eq!(plan.summary().dirty_blocks_given_up, 0);
    }
}

#[test]
fn what_is_left_of_the_segments_up_to_the_clean_mark_is_kept() {
    let mut log = TestLog::new(9, true);
    log.write_pages(Some(SegmentId(9)));
    log.rot(8, 2).rot(9, 4);
    let (device, _) = salvage(&log, SalvageMode::Skip);
    assert_eq!(volume(&device.memory.content()), Some(expected(1..=9, &[(8, 2), (9, 4)])));
    let (device, _) = salvage(&log, SalvageMode::Stop);
    assert_eq!(volume(&device.memory.content()), Some(expected(1..=7, &[])));
}

#[test]
fn the_log_goes_on_at_a_record_whose_segment_has_rotted() {
    for extended in [false, true] {
        let mut log = TestLog::new(9, extended);
        log.record(9).garble(9);
        for way in SalvageMode::ALL {
            let (device, plan) = salvage(&log, way);
            assert_eq!((plan.point, plan.gives_up()), (SegmentId(9), "gives up nothing".into()));
            assert_eq!(volume(&device.memory.content()), Some(BTreeMap::new()));
        }
    }
}

#[test]
fn a_record_that_nothing_bears_out_makes_skip_give_up_nothing() {
    let mut log = TestLog::new(9, false);
    log.record(11);
    let (device, plan) = salvage(&log, SalvageMode::Skip);
    assert_eq!(
        (plan.rejected_record, plan.gives_up()),
        (Some(SegmentId(11)), "gives up nothing".into())
    );
    assert_eq!(volume(&device.memory.content()), Some(expected(1..=9, &[])));
    let (device, plan) = salvage(&log, SalvageMode::Stop);
    assert_eq!((plan.point, plan.summary().segments_given_up), (SegmentId(11), (1..=9).collect()));
    assert_eq!(volume(&device.memory.content()), Some(BTreeMap::new()));
    // No mode accepts an id that no log of this size can have reached.
    for record in [500, SegmentId::MAX.0, u64::MAX] {
        log.record(record);
        for way in SalvageMode::ALL {
            let (device, _) = salvage(&log, way);
            assert_eq!(
                volume(&device.memory.content()),
                Some(expected(1..=9, &[])),
                "{record} {way}"
            );
        }
    }
}

#[test]
fn a_wrong_id_far_up_does_not_make_the_others_look_written_back() {
    for wrong in [5 + SLOTS * 1000, 5 + SLOTS * ((1 << 55) / SLOTS + 9)] {
        let mut log = TestLog::new(9, false);
        let at = log.at(5);
        log.image[at..at + 8].copy_from_slice(&wrong.to_le_bytes());
        assert_eq!(log.geometry().slot_of(SegmentId(wrong)), log.geometry().slot_of(SegmentId(5)));
        let (device, _) = salvage(&log, SalvageMode::Skip);
        assert_eq!(volume(&device.memory.content()), Some(expected([1, 2, 3, 4, 6, 7, 8, 9], &[])));
        let (device, _) = salvage(&log, SalvageMode::Stop);
        assert_eq!(volume(&device.memory.content()), Some(expected(1..=4, &[])));
    }
}

#[test]
fn what_lies_where_the_log_has_not_been_is_erased() {
    let mut log = TestLog::new(3, false);
    log.garble(12);
    let mut misplaced = TestLog::new(4, false);
    let (from, to) = (misplaced.at(4), misplaced.at(7));
    misplaced.image.copy_within(from..from + SEGMENT_BYTES, to);
    for (log, newest) in [(log, 3), (misplaced, 4)] {
        for way in SalvageMode::ALL {
            let (device, _) = salvage(&log, way);
            assert_eq!(volume(&device.memory.content()), Some(expected(1..=newest, &[])));
        }
    }
}

#[test]
fn slots_that_cannot_be_read_are_written_anew() {
    for id in [4, 7] {
        let mut log = TestLog::new(6, true);
        log.unreadable(id);
        let (device, plan) = salvage(&log, SalvageMode::Skip);
        assert_eq!(
            volume(&device.memory.content()),
            Some(expected((1..=6).filter(|&i| i != id), &[]))
        );
        assert_eq!(plan.given_up[0].certainty, Certainty::Unknown);
    }
}

#[test]
fn of_a_segment_with_an_unreadable_block_skip_keeps_the_others() {
    let mut log = TestLog::new(6, true);
    log.unreadable.push(to_u64(log.at(4) + 3 * BLOCK_BYTES));
    let (device, plan) = salvage(&log, SalvageMode::Skip);
    assert_eq!(volume(&device.memory.content()), Some(expected(1..=6, &[(4, 2)])));
    assert_eq!(lost(&plan), [(4, vec![402])]);
}

#[test]
fn a_log_that_the_kernel_module_continued_past_a_hole_goes_both_ways() {
    let mut log = TestLog::new(5, true);
    log.rot(4, 0);
    log.put(6, false, 0);
    let mut hole = log.clone();
    hole.put(5, true, 0);
    for way in SalvageMode::ALL {
        let device: Device = hole.device();
        assert!(matches!(
            read(&device).recovery().corruption[..],
            [Corruption::WrittenPastHole { .. }]
        ));
        let (device, _) = salvage(&hole, way);
        let segments: &[u64] =
            if way == SalvageMode::Skip { &[1, 2, 3, 4, 5, 6] } else { &[1, 2, 3] };
        assert_eq!(volume(&device.memory.content()), Some(expected(segments.iter().copied(), &[])));
    }
}

#[test]
fn the_wrong_backing_device_is_refused_before_anything_is_written() {
    let mut log = TestLog::new(9, true);
    log.page.as_mut().unwrap().backing_sectors = 8000;
    log.write_pages(None);
    log.rot(5, 1);
    let device: Device = log.device();
    let plan = block_on(read(&device).salvage(&device, SalvageMode::Skip)).unwrap().unwrap();
    let facts = |sectors| BackingFacts { name: "backing", sectors, identity: "" };
    let wrong = block_on(plan.check_backing(&device, &facts(9000)));
    assert!(
        matches!(wrong, Err(LogError { kind: LogErrorKind::WrongBacking { .. }, .. })),
        "{wrong:?}"
    );
    block_on(plan.check_backing(&device, &facts(8000))).unwrap();
    let mut log = TestLog::new(9, false);
    log.rot(5, 1);
    let device: Device = log.device();
    let plan = block_on(read(&device).salvage(&device, SalvageMode::Skip)).unwrap().unwrap();
    let small = block_on(plan.check_backing(&device, &facts(800 * 8)));
    assert!(
        matches!(
            small,
            Err(LogError {
                kind: LogErrorKind::BeyondBacking { beyond: Beyond { id: SegmentId(8), .. }, .. },
                ..
            })
        ),
        "{small:?}"
    );
}

#[test]
fn a_repair_makes_a_log_whole_and_keeps_its_volume() {
    let torn = |extended| {
        let mut log = TestLog::new(20, extended);
        log.rot(20, 1).record(9);
        log.rot(8, 2);
        log
    };
    let dropped = |extended| {
        let mut log = TestLog::new(9, extended);
        for id in [11, 12] {
            log.put(id, extended, 0);
        }
        log
    };
    for extended in [false, true] {
        for log in [torn(extended), dropped(extended)] {
            let before = volume(&log.image).expect("a sound log");
            let recorder = log.device();
            let device: Device = recorder.clone();
            let plan =
                block_on(read(&device).repair(&device)).unwrap().expect("something to repair");
            block_on(plan.apply(&device)).unwrap();
            let after = read(&device);
            assert!(block_on(after.repair(&device)).unwrap().is_none());
            assert!(after.slots.iter().all(|slot| !matches!(slot, SlotState::Invalid { .. })));
            assert!(after.recovery().dropped.is_empty());
            assert_eq!(volume(&recorder.memory.content()), Some(before));
        }
    }
}

#[test]
fn a_damaged_copy_of_the_superblock_extension_is_restored_from_the_sound_one() {
    for copy in EXTENSION_OFFSETS {
        for at in [3, 50] {
            let mut log = TestLog::new(5, true);
            log.image[to_usize(copy) + at] ^= 1;
            let device: Device = log.device();
            let plan =
                block_on(read(&device).repair(&device)).unwrap().expect("something to repair");
            block_on(plan.apply(&device)).unwrap();
            let pages = read(&device).superblock.pages;
            let uuids = pages.map(|page| page.expect("a sound copy").uuid);
            assert_eq!(uuids, [uuid::Uuid::from_u128(7); 2]);
        }
    }
}

#[test]
fn a_corrupt_log_is_not_repaired() {
    let mut log = TestLog::new(9, true);
    log.rot(5, 1);
    let device: Device = log.device();
    assert!(matches!(
        block_on(read(&device).repair(&device)),
        Err(LogError { kind: LogErrorKind::Corrupt { .. }, .. })
    ));
}
