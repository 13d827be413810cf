use super::*;
use crate::format::{
    BLOCK_BYTES, RECORD_BLOCK_OFFSET, Record, SECTOR_BYTES, SuperblockExtension,
    encode_record_block, to_usize,
};
use crate::log::Use;
use crate::log::recovery::recover;
use crate::log::scan::scan_trusting;
use crate::log::superblock::read_superblock;
use crate::log::test_log::TestLog;
use fastrand::Rng;
use futures_lite::future::block_on;

const SLOTS: u64 = 40;

/// Segments up to `newest` of a log in which those up to `written_back` are written back.
fn log(written_back: u64, newest: u64) -> TestLog {
    let mut log = TestLog::empty(SLOTS, true);
    for id in newest.saturating_sub(SLOTS - 1).max(1)..=newest {
        log.put(id, true, id.saturating_sub(3));
    }
    prove_record(&mut log, written_back);
    log
}

fn prove_record(log: &mut TestLog, id: u64) {
    let digest = log.page.as_ref().map(SuperblockExtension::digest);
    let block = log.image[to_usize(RECORD_BLOCK_OFFSET)..].first_chunk_mut().unwrap();
    encode_record_block(block, Record { id: SegmentId(id), digest });
}

/// Everything that is decided on a log.
struct Decided {
    tail: Option<Tail>,
    /// What the slots outside the tail say, if there is a tail.
    looks: Vec<SecondLook>,
    all: Recovery,
    slots_read: usize,
}

impl Decided {
    fn on(log: &TestLog) -> Decided {
        let device: Device = log.device();
        let superblock = block_on(read_superblock(&device, Use::Write)).unwrap();
        let geometry = superblock.geometry;
        let all = block_on(scan_trusting(&device, &superblock, |_, _| {}));
        let all = recover(&superblock, &all);
        let mut read = std::collections::BTreeSet::new();
        let ahead = slots_ahead(geometry);
        let tail = block_on(read_tail(&device, &superblock, ahead, |slot, _| {
            read.insert(slot.0);
        }));
        let look = |tail: &Tail, id| {
            let slot = geometry.slot_of(SegmentId(id));
            let state = block_on(read_other_slot(&device, geometry, slot));
            second_look(&superblock, &tail.recovery, slot, &state)
        };
        let looks = tail.iter().flat_map(|tail| tail.rest.clone().map(move |id| look(tail, id)));
        Decided { looks: looks.collect(), tail, all, slots_read: read.len() }
    }

    fn contradictions(&self) -> impl Iterator<Item = &Corruption> {
        self.looks.iter().filter_map(|look| match look {
            SecondLook::Contradiction(what) => Some(what),
            SecondLook::Nothing | SecondLook::Damaged(_) => None,
        })
    }

    /// What is applied, erased and closed.
    fn essence(recovery: &Recovery) -> impl PartialEq + std::fmt::Debug + use<> {
        let torn = recovery.damage.iter().filter(|it| it.explanation == Explanation::PowerCut);
        let mut torn: Vec<u32> = torn.map(|damage| damage.slot.0).collect();
        torn.sort_unstable();
        let Recovery { written_back, point, .. } = *recovery;
        let (dropped, open) = (recovery.dropped.clone(), recovery.open_end());
        ([written_back, point], torn, dropped, open, recovery.is_cut_short)
    }
}

#[test]
fn the_tail_alone_is_read_of_a_log_that_a_crash_has_left() {
    for (written_back, newest) in [(0, 0), (0, 5), (5, 5), (30, 35), (60, 75), (80, 80)] {
        let decided = Decided::on(&log(written_back, newest));
        let tail = decided.tail.as_ref().expect("a usual log");
        assert_eq!(Decided::essence(&tail.recovery), Decided::essence(&decided.all));
        assert!(decided.looks.iter().all(|look| *look == SecondLook::Nothing));
        let live = to_usize(newest - written_back);
        assert!(decided.slots_read <= live + 1 + 20, "{} slots", decided.slots_read);
        assert_eq!(decided.slots_read + decided.looks.len(), to_usize(SLOTS));
    }
}

#[test]
fn all_is_read_where_the_record_does_not_prove_itself_or_the_module_wrote() {
    let mut unproved = log(60, 75);
    unproved.record(60);
    assert!(Decided::on(&unproved).tail.is_none());
    for id in [60, 70, 75, 76] {
        let mut log = log(60, 75);
        log.put(id, false, 0);
        assert!(Decided::on(&log).tail.is_none(), "{id}");
    }
    let mut base = TestLog::new(9, false);
    base.record(4);
    assert!(Decided::on(&base).tail.is_none());
}

#[test]
fn what_contradicts_the_log_beyond_its_tail_is_found_by_the_second_look() {
    // The log was once longer: the record and the segments after it are older copies.
    let mut older = log(10, 12);
    older.put(35, true, 33);
    let decided = Decided::on(&older);
    assert!(decided.tail.is_some());
    let missing = SegmentId(13);
    let durable = SegmentId(33);
    let found: Vec<_> = decided.contradictions().cloned().collect();
    assert_eq!(found, [Corruption::DurableMissing { missing, durable }]);
    assert_eq!(decided.all.corruption, found);
    // Its segment is damaged as well.
    older.rot(35, 1);
    assert_eq!(Decided::on(&older).contradictions().count(), 1);
    // Nothing was ever written there.
    let mut garbled = log(10, 12);
    garbled.garble(38);
    assert_eq!(Decided::on(&garbled).contradictions().count(), 1);
    // What is written back may be damaged.
    let mut written_back = log(60, 65);
    written_back.garble(50).rot_header(52, 17).unreadable(55);
    let decided = Decided::on(&written_back);
    let damaged = decided.looks.iter().filter(|look| **look != SecondLook::Nothing);
    let damaged: Vec<_> = damaged.cloned().collect();
    assert_eq!(damaged, [50, 52, 55].map(|id| SecondLook::Damaged(SegmentId(id))));
}

fn damage_something(log: &mut TestLog, newest: u64, rng: &mut Rng) {
    let near = newest + rng.u64(..SLOTS / 2);
    let id = if rng.bool() { near.saturating_sub(10).max(1) } else { rng.u64(1..=newest + SLOTS) };
    match rng.u32(..9) {
        0 => drop(log.garble(id)),
        1 => drop(log.rot_header(id, rng.usize(..SECTOR_BYTES))),
        2 => drop(log.rot_header(id, rng.usize(SECTOR_BYTES..BLOCK_BYTES))),
        3 => drop(log.rot(id, rng.usize(..5))),
        4 => log.put(id, true, id.saturating_sub(rng.u64(1..30))),
        5 => log.put(id, rng.bool(), 0),
        6 => log.put_open(id, 3, id.saturating_sub(rng.u64(1..9))),
        7 => drop(log.unreadable(id)),
        _ => {
            let at = log.at(id);
            log.image[at..at + BLOCK_BYTES].fill(0);
        }
    }
}

/// The tail and the second looks decide as the whole device does: they never serve, without a word,
/// what that refuses, and never another state.
#[test]
fn the_tail_and_the_second_looks_are_as_strict_as_the_whole_device() {
    let (mut tails, mut contradicted) = (0, 0);
    for seed in 0..1000 {
        let mut rng = Rng::with_seed(seed);
        let newest = rng.u64(..3 * SLOTS);
        let dirty = rng.u64(..SLOTS / 2);
        let mut log = log(newest.saturating_sub(dirty), newest);
        for _ in 0..rng.u32(..4) {
            damage_something(&mut log, newest, &mut rng);
        }
        let decided = Decided::on(&log);
        let Some(tail) = &decided.tail else { continue };
        tails += 1;
        if tail.recovery.corruption.is_empty() && decided.contradictions().next().is_none() {
            assert_eq!(decided.all.corruption, [], "seed {seed}");
            let (tail, all) = (&tail.recovery, &decided.all);
            assert_eq!(Decided::essence(tail), Decided::essence(all), "seed {seed}");
        } else {
            contradicted += 1;
        }
    }
    assert!(tails > 300 && contradicted > 20, "{tails} {contradicted}");
}
