//! Damage that a power cut does not explain, according to headers and superblock pages. Recovery
//! refuses it, and a salvage can keep the good blocks.

use super::test_log::{LENGTH, TestLog, expected, lost, read, salvage, volume};
use crate::device::{BlockDevice, Device};
use crate::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, RECORD_BLOCK_OFFSET, Record, SECTOR_BYTES, SegmentId, Slot,
    SuperblockExtension, crc32c, encode_record_block, to_usize,
};
use crate::log::pairing::BackingFacts;
use crate::log::recovery::Corruption;
use crate::log::salvage::SalvageMode;
use crate::log::scan::{SlotFault, SlotState};
use futures_lite::future::block_on;

/// The newest segment holds three flushed blocks, and two that may not have been flushed.
fn open_end() -> TestLog {
    let mut log = TestLog::new(9, true);
    log.put_open(10, 3, 8);
    log
}

/// The newest segment is torn. Its header says that the segment before was durable, and that one
/// has a rotten block.
fn claimed_by_a_torn_header() -> TestLog {
    let mut log = TestLog::new(9, true);
    log.put(10, true, 9);
    log.rot(10, 4).rot(9, 3);
    log
}

/// The clean mark names a segment whose slot holds an older one.
fn lost_newest() -> TestLog {
    let mut log = TestLog::new(20, true);
    log.put(6, true, 4);
    log.record(10).write_pages(Some(SegmentId(20)));
    log
}

pub(super) fn cases_of_evidence() -> Vec<TestLog> {
    let mut rotten_commit = open_end();
    rotten_commit.rot(10, 1);
    let mut unpaired = TestLog::new(9, true);
    unpaired.lose_pages().rot(5, 3);
    let mut unmarked = TestLog::new(9, true);
    unmarked.rot_header(5, 50).rot(7, 2);
    let mut last_unmarked = TestLog::new(9, true);
    last_unmarked.rot_header(9, 33);
    let mut two_lost = claimed_by_a_torn_header();
    two_lost.rot(7, 2);
    vec![
        rotten_commit,
        claimed_by_a_torn_header(),
        lost_newest(),
        unpaired,
        unmarked,
        last_unmarked,
        two_lost,
    ]
}

fn corruption(log: &TestLog) -> Vec<Corruption> {
    let device: Device = log.device();
    read(&device).recovery().corruption
}

#[test]
fn the_commit_before_must_stand() {
    let log = open_end();
    assert_eq!(volume(&log.image), Some(expected(1..=10, &[])));
    for block in 0..LENGTH {
        let mut rotten = log.clone();
        rotten.rot(10, to_usize(block));
        if block >= 3 {
            // A power cut may have done that.
            assert_eq!(volume(&rotten.image), Some(expected(1..=10, &[(10, 3), (10, 4)])));
            continue;
        }
        assert_eq!(volume(&rotten.image), None, "{block}");
        let (device, plan) = salvage(&rotten, SalvageMode::Skip);
        assert_eq!(
            volume(&device.memory.content()),
            Some(expected(1..=10, &[(10, block)])),
            "{block}"
        );
        assert_eq!(plan.given_up[0].kept, 4);
        let (device, plan) = salvage(&rotten, SalvageMode::Stop);
        assert_eq!(volume(&device.memory.content()), Some(expected(1..=9, &[])));
        assert_eq!(plan.summary().segments_given_up, [10]);
        // An invalid entry does not hide the evidence.
        let mut entry = log.clone();
        entry.rot_header(10, SECTOR_BYTES + 16 * to_usize(block));
        assert_eq!(volume(&entry.image), None, "{block}");
    }
    let mut written_back = open_end();
    written_back.rot(10, 1).record(10);
    for id in 11..=14 {
        written_back.put(id, true, 10);
    }
    assert_eq!(corruption(&written_back), []);
}

#[test]
fn what_a_torn_header_says_was_durable_was() {
    let log = claimed_by_a_torn_header();
    let durable = SegmentId(9);
    assert_eq!(corruption(&log), [Corruption::DurableMissing { missing: durable, durable }]);
    let (device, plan) = salvage(&log, SalvageMode::Skip);
    assert_eq!((plan.point, lost(&plan)), (durable, vec![(9, vec![903])]));
    assert_eq!(volume(&device.memory.content()), Some(expected(1..=9, &[(9, 3)])));
}

#[test]
fn skip_ends_with_a_segment_that_lacks_blocks_and_was_not_known_to_be_durable() {
    let mut log = TestLog::new(9, true);
    log.put_open(10, 3, 9);
    log.put(11, true, 9);
    log.rot(9, 3).rot(10, 4);
    let (device, plan) = salvage(&log, SalvageMode::Skip);
    assert_eq!(plan.point, SegmentId(10));
    let but = [(9, 3), (10, 3), (10, 4)];
    assert_eq!(volume(&device.memory.content()), Some(expected(1..=10, &but)));
}

#[test]
fn a_header_with_a_damaged_first_sector_is_no_segment_of_the_kernel_module() {
    for byte in (0..8).chain(14..24).chain(28..69).chain([300]) {
        let mut log = TestLog::new(9, true);
        log.rot_header(9, byte);
        assert_eq!(volume(&log.image), None, "byte {byte} of the newest");
        let mut log = TestLog::new(9, true);
        log.rot_header(5, byte);
        assert_eq!(volume(&log.image), None, "byte {byte}");
        let (device, plan) = salvage(&log, SalvageMode::Skip);
        // The checksum of the base format proves the rest, unless the id is wrong.
        let but: Vec<_> = (0..LENGTH).filter(|_| byte < 8).map(|nth| (5, nth)).collect();
        assert_eq!(volume(&device.memory.content()), Some(expected(1..=9, &but)), "byte {byte}");
        assert_eq!(plan.given_up[0].kept, if byte < 8 { 0 } else { LENGTH }, "byte {byte}");
    }
    // Then the torn part does not matter.
    for byte in [14, 17, 300] {
        let mut log = open_end();
        assert_eq!(volume(&log.rot(10, 4).image), Some(expected(1..=10, &[(10, 3), (10, 4)])));
        assert_eq!(volume(&log.rot_header(10, byte).image), None, "byte {byte} of a torn one");
    }
    // The id found there does not extend the log either.
    let mut log = open_end();
    let at = log.at(12);
    log.image[at..at + 20]
        .copy_from_slice(&[26, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9]);
    let sum = crc32c(&[0; BLOCK_BYTES - SECTOR_BYTES]);
    log.image[at + 8..at + 12].copy_from_slice(&sum.to_le_bytes());
    let device: Device = log.device();
    let recovery = read(&device).recovery();
    assert_eq!((recovery.highest, recovery.point), (SegmentId(10), SegmentId(10)));
    assert_eq!(recovery.corruption, [Corruption::Unexplained { slot: Slot(11) }]);
    // On a device of the kernel module, these bytes do not count.
    let mut log = TestLog::new(9, false);
    log.rot_header(5, 50).rot_header(9, 20);
    assert_eq!(volume(&log.image), Some(expected(1..=9, &[])));
}

#[test]
fn a_segment_that_rot_has_given_a_later_id_does_not_come_back() {
    let mut log = TestLog::empty(16, true);
    (1..=16).for_each(|id| log.put(id, true, id - 1));
    log.record(3).write_pages(Some(SegmentId(16)));
    let at = log.at(1);
    log.image[at] = 17;
    assert_eq!(volume(&log.image), None);
    for way in SalvageMode::ALL {
        let (device, _) = salvage(&log, way);
        assert_eq!(volume(&device.memory.content()), Some(expected(4..=16, &[])));
    }
}

#[test]
fn all_that_is_given_up_is_named() {
    for way in SalvageMode::ALL {
        let (device, plan) = salvage(&lost_newest(), way);
        assert_eq!(plan.summary().segments_given_up, [20], "{way}");
        assert_eq!(volume(&device.memory.content()), Some(expected(11..=19, &[])), "{way}");
    }
    for (newest, way) in
        [0, 5].into_iter().flat_map(|newest| SalvageMode::ALL.map(|way| (newest, way)))
    {
        let mut far = TestLog::new(newest, true);
        far.write_pages(Some(SegmentId(1 << 50)));
        let (_, plan) = salvage(&far, way);
        assert!((9..=14).contains(&plan.given_up.len()), "{plan:?}");
    }
}

#[test]
fn without_its_pages_a_log_is_refused_until_it_is_paired_anew() {
    let damage: [fn(&mut TestLog); 3] = [
        |log| {
            log.lose_pages();
        },
        |log| EXTENSION_OFFSETS.iter().for_each(|&at| log.image[to_usize(at) + 60] ^= 1),
        |log| log.image[to_usize(EXTENSION_OFFSETS[0])..][..2 * 64 * 1024].fill(0x5a),
    ];
    for (nth, damage) in damage.into_iter().enumerate() {
        let mut log = TestLog::new(9, true);
        damage(&mut log);
        let recorder = log.device();
        let device: Device = recorder.clone();
        let scanned = read(&device);
        assert_eq!(scanned.recovery().corruption, [Corruption::PairingLost], "{nth}");
        assert_eq!(block_on(scanned.salvage_plans(&device)).unwrap().len(), 1);
        let mut plan = block_on(scanned.repair(&device)).unwrap().expect("new pages");
        plan.pair(&BackingFacts { name: "backing", sectors: 9000, identity: "serial" });
        block_on(plan.apply(&device)).unwrap();
        assert_eq!(volume(&recorder.memory.content()), Some(expected(1..=9, &[])), "{nth}");
        let after = read(&device);
        let pages = after.superblock.pages.map(|page| page.expect("a sound copy"));
        assert_eq!((pages[0].backing_sectors, pages[0].backing_id.as_str()), (9000, "serial"));
        assert_eq!(pages[0].digest(), log.page.as_ref().unwrap().digest());
    }
}

#[test]
fn pages_that_cannot_be_read_show_nothing_where_no_segment_and_no_record_is_ours() {
    for (extended, refused) in [(false, false), (true, true)] {
        let mut log = TestLog::new(9, extended);
        log.unreadable.extend(EXTENSION_OFFSETS);
        assert_eq!(corruption(&log).contains(&Corruption::PairingLost), refused);
    }
}

#[test]
fn a_page_after_which_none_could_be_newer_is_damaged() {
    let mut log = TestLog::new(9, true);
    let page = SuperblockExtension { generation: u64::MAX, ..log.page.clone().unwrap() };
    page.encode(log.image[to_usize(EXTENSION_OFFSETS[1])..].first_chunk_mut().unwrap());
    let device: Device = log.device();
    let scanned = read(&device);
    assert_eq!(scanned.superblock.extension().map(|page| page.generation), Some(0));
    assert!(scanned.superblock.has_damaged_copy());
}

#[test]
fn a_record_that_does_not_prove_itself_is_refused() {
    let with_record = |digest: u32| {
        let mut log = TestLog::new(9, true);
        let at = to_usize(RECORD_BLOCK_OFFSET);
        let record = Record { id: SegmentId(4), digest: Some(digest) };
        encode_record_block(log.image[at..].first_chunk_mut().unwrap(), record);
        log
    };
    let digest = TestLog::new(1, true).page.unwrap().digest();
    let log = with_record(digest);
    assert_eq!(volume(&log.image), Some(expected(5..=9, &[])));
    assert_eq!(volume(&with_record(digest ^ 1).image), None);
    for at in 0..24 {
        let mut rotten = log.clone();
        rotten.image[to_usize(RECORD_BLOCK_OFFSET) + BLOCK_BYTES - SECTOR_BYTES + at] ^= 8;
        assert_eq!(volume(&rotten.image), None, "byte {at}");
        for way in SalvageMode::ALL {
            let (device, plan) = salvage(&rotten, way);
            assert_eq!(volume(&device.memory.content()), Some(expected(1..=9, &[])), "byte {at}");
            assert!(plan.rejected_record.is_some());
        }
    }
    // Only the record shows that a device without pages had some.
    let mut empty = TestLog::empty(14, true);
    empty.image[to_usize(RECORD_BLOCK_OFFSET)..][..BLOCK_BYTES]
        .copy_from_slice(&log.image[to_usize(RECORD_BLOCK_OFFSET)..][..BLOCK_BYTES]);
    empty.lose_pages();
    assert!(corruption(&empty).contains(&Corruption::PairingLost));
}

#[test]
fn a_slot_whose_data_cannot_be_read_still_says_what_its_header_proves() {
    let mut log = claimed_by_a_torn_header();
    let torn = crate::format::to_u64(log.at(10) + 3 * BLOCK_BYTES);
    log.unreadable.push(torn);
    let recorder = log.device();
    let device: Device = recorder.clone();
    assert!(recorder.size() > torn);
    let scanned = read(&device);
    let unreadable = |state: &SlotState| {
        matches!(state, SlotState::Invalid { fault: SlotFault::Unreadable(_), proved: Some(_), .. })
    };
    assert!(scanned.slots.iter().any(unreadable));
    assert_eq!(scanned.recovery().durable, SegmentId(9));
}
