//! What a reader finds after the writer was killed at any step, and what it makes of nonsense.
#![cfg(feature = "sim")] // to see each step

use super::*;
use crate::format::{BlockNo, DirtyBits, Geometry, Reason, SUPERBLOCK_REGION_BYTES, SegmentId};
use crate::format::{SuperblockExtension, to_u64};
use crate::rules::{Rule, Rules};
use parking_lot::Mutex;
use proptest::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A segment as a reader sees it: its id, why it was closed, and each entry with its data.
type Seen = (u64, Option<Reason>, Vec<(Entry, u8)>);

fn read(head: &Head, rules: Rules) -> Result<Vec<Seen>, String> {
    let mut frames = Frames::of(head.clone(), rules).unwrap();
    let seen = frames.read()?.into_iter().map(|segment| {
        let data = |index: u8| {
            let block = segment.frame.block(index);
            assert!(block.iter().all(|byte| *byte == block[0]), "a torn block");
            block[0]
        };
        let entries = (0..).zip(&segment.entries).map(|(index, entry)| (*entry, data(index)));
        (segment.id.0, segment.reason, entries.collect())
    });
    Ok(seen.collect())
}

fn entry(block: u64) -> Entry {
    Entry::new(BlockNo(block), DirtyBits::ALL)
}

/// What a log does to its head, step by step. Calls `done` after each step.
fn script(head: &Head, rules: Rules, mut done: impl FnMut()) {
    let mut frames = Frames::of(head.clone(), rules).unwrap();
    let add = |frame: &mut Frame, index, block, data| {
        frame.block_mut(index).fill(data);
        frame.publish(index, entry(block));
    };
    let mut first = frames.begin(SegmentId(7)).unwrap();
    done();
    add(&mut first, 0, 100, 1);
    done();
    add(&mut first, 1, 101, 2);
    done();
    // Half of the block is there already when the next step begins.
    frames.overwrite(&mut first, 0, entry(100), |data| {
        data[..2000].fill(3);
        head.memory.store(at::FIGURES, 1);
        data.fill(3);
    });
    done();
    first.update(1, Entry { discarded: true, ..entry(101) });
    done();
    first.seal(2, Reason::Full);
    done();
    let mut second = frames.begin(SegmentId(8)).unwrap();
    done();
    add(&mut second, 0, 100, 4);
    done();
    first.clear();
    done();
    drop(first);
    let mut third = frames.begin(SegmentId(9)).unwrap();
    second.seal(1, Reason::Flush);
    add(&mut third, 0, 5, 5);
    done();
}

/// What a reader finds at each step that a watch sees, and between the steps.
fn all_that_is_seen(rules: Rules) -> (Vec<Vec<Seen>>, Vec<(usize, Head)>) {
    let (head, other) = (Head::create().unwrap(), Head::create().unwrap());
    let states = Mutex::new(vec![Vec::new()]);
    script(&head, rules, || {
        let now = head.copy().unwrap();
        states.lock().push(read(&now, Rules::default()).unwrap());
    });
    let copies = Arc::new(Mutex::new(Vec::new()));
    let steps = Arc::new(Mutex::new(0));
    let (kept, step) = (copies.clone(), steps.clone());
    other.watch(move |head| kept.lock().push((*step.lock(), head.copy().unwrap())));
    script(&other, rules, || *steps.lock() += 1);
    let copies = std::mem::take(&mut *copies.lock());
    (states.into_inner(), copies)
}

#[test]
fn a_reader_finds_the_state_before_a_step_or_after_it() {
    let (states, copies) = all_that_is_seen(Rules::default());
    assert!(copies.len() > 20, "{}", copies.len());
    for (step, head) in copies {
        // The last one does three things.
        if step + 2 == states.len() {
            continue;
        }
        let found = read(&head, Rules::default()).unwrap();
        assert!(found == states[step] || found == states[step + 1], "step {step}: {found:?}");
    }
}

#[test]
fn an_overwrite_that_is_not_undone_shows_a_torn_block() {
    let rules = Rules::breaking(Rule::HeadOverwriteUndone);
    let (_, copies) = all_that_is_seen(rules);
    let torn = catch_unwind(AssertUnwindSafe(|| {
        copies.iter().for_each(|(_, head)| drop(read(head, rules)));
    }));
    assert!(torn.is_err());
}

fn owner(uuid: u128, slots: u64) -> Owner {
    let bytes = SUPERBLOCK_REGION_BYTES + slots * to_u64(SEGMENT_BYTES);
    let page = SuperblockExtension::new(uuid::Uuid::from_u128(uuid), bytes);
    Owner::new(Geometry::of_device(bytes).unwrap(), Some(&page))
}

#[test]
fn a_head_of_another_cache_boot_or_version_is_refused() {
    let head = Head::create().unwrap();
    assert!(head.is_blank());
    head.bind(owner(1, 8));
    assert_eq!((head.is_blank(), head.check(owner(1, 8))), (false, Ok(())));
    let why = |owner| head.check(owner).unwrap_err();
    assert!(why(owner(2, 8)).contains("another cache"));
    assert!(why(owner(1, 9)).contains("another cache"));
    let change = |at: usize, word: u64| {
        let before = head.memory.word(at).load(std::sync::atomic::Ordering::SeqCst);
        head.memory.store(at, word);
        let why = why(owner(1, 8));
        head.memory.store(at, before);
        why
    };
    assert!(change(at::VERSION, 2).contains("its version is 2, and this program knows 1"));
    assert!(change(at::BOOT, 2).contains("checksum"));
    assert!(change(at::MAGIC, 2).contains("magic"));
    let mut other = owner(1, 8);
    other.of_another_boot();
    head.bind(other);
    assert!(why(owner(1, 8)).contains("another boot"));
    head.bind(owner(1, 8));
    assert_eq!(head.check(owner(1, 8)), Ok(()));
}

#[test]
fn segments_that_do_not_follow_each_other_are_refused() {
    let head = Head::create().unwrap();
    let frames = Frames::of(head.clone(), Rules::default()).unwrap();
    let both = [7, 9].map(|id| frames.begin(SegmentId(id)).unwrap());
    both.iter().for_each(|frame| frame.publish(0, entry(1)));
    drop((frames, both));
    let why = read(&head, Rules::default()).unwrap_err();
    assert!(why.contains("segment 9 comes after segment 7"), "{why}");
}

#[test]
fn a_new_segment_gets_no_frame_while_all_are_in_use() {
    let frames = Frames::of(Head::create().unwrap(), Rules::default()).unwrap();
    let mut all: Vec<Frame> = (1..).map_while(|id| frames.begin(SegmentId(id))).collect();
    assert_eq!(all.len(), FRAMES);
    all.pop();
    assert!(frames.begin(SegmentId(99)).is_some());
}

proptest! {
    #[test]
    fn no_head_is_too_strange(
        words in prop::collection::vec((0..HEAD_BYTES / 8, any::<u64>()), 0..50),
        small in prop::collection::vec((0..FRAMES, 0..16usize, 0..300u64), 0..50),
        undo: u64,
    ) {
        let head = Head::create().unwrap();
        for (at, word) in words {
            head.memory.store(8 * at, word);
        }
        for (frame, word, value) in small {
            head.memory.store(Head::frame_at(frame) + 8 * word, value);
        }
        head.memory.store(at::UNDO_PLACE, undo % 4096);
        let mut frames = Frames::of(head.clone(), Rules::default()).unwrap();
        if let Ok(segments) = frames.read() {
            for segment in segments {
                prop_assert!((1..=PLACES).contains(&segment.length()));
            }
        }
        let _ = head.check(owner(1, 8));
    }
}
