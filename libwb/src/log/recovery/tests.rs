use super::*;
use crate::format::{
    SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, SegmentExtension, SuperblockExtension, to_u64,
};
use crate::log::verdict::slot_index;
use proptest::prelude::*;

fn geometry(slots: u64) -> Geometry {
    Geometry::of_device(SUPERBLOCK_REGION_BYTES + slots * to_u64(SEGMENT_BYTES))
        .expect("a sane size")
}

/// The slots of a log with the segments up to `newest`, except those in `torn`.
fn log(slots: u64, newest: u64, torn: &[u64]) -> Vec<SlotState> {
    let g = geometry(slots);
    g.all_slots()
        .map(|slot| match g.id_in_slot(slot, SegmentId(newest)) {
            SegmentId::NONE => SlotState::Empty,
            id if torn.contains(&id.0) => invalid(SlotFault::Checksum { id }),
            id => SlotState::Valid {
                id,
                length: 127,
                extension: None,
                cut_short: false,
                is_stray: false,
            },
        })
        .collect()
}

fn run(slots: u64, record: u64, states: &[SlotState]) -> Recovery {
    recover(&superblock(slots, record, None), states)
}

fn superblock(slots: u64, record: u64, extension: Option<SuperblockExtension>) -> Superblock {
    Superblock {
        geometry: geometry(slots),
        record: SegmentId(record),
        is_record_proved: false,
        extension,
        lost_extension: false,
    }
}

fn invalid(fault: SlotFault) -> SlotState {
    SlotState::invalid(fault)
}

fn ids(range: impl IntoIterator<Item = u64>) -> Vec<SegmentId> {
    range.into_iter().map(SegmentId).collect()
}

#[test]
fn a_fresh_cache_has_nothing_to_apply() {
    let r = run(14, 0, &log(14, 0, &[]));
    assert_eq!((r.point, r.live_count()), (SegmentId(0), 0));
    assert!(r.corruption.is_empty() && r.damage.is_empty());
}

#[test]
fn a_whole_log_is_applied_from_the_oldest_dirty_segment() {
    let r = run(14, 0, &log(14, 20, &[]));
    assert_eq!(r.live().collect::<Vec<_>>(), ids(7..=20));
    let r = run(14, 12, &log(14, 20, &[]));
    assert_eq!(r.live().collect::<Vec<_>>(), ids(13..=20));
    let r = run(14, 20, &log(14, 20, &[]));
    assert_eq!((r.live_count(), r.point), (0, SegmentId(20)));
}

#[test]
fn a_torn_newest_segment_is_a_power_cut() {
    let r = run(14, 0, &log(14, 5, &[5]));
    assert_eq!(r.point, SegmentId(4));
    assert!(r.corruption.is_empty());
    assert_eq!(r.damage[0].explanation, Explanation::PowerCut);
}

#[test]
fn a_hole_drops_what_follows_and_the_stale_segment_in_it_is_not_applied() {
    // Segment 20 was lost; its slot still holds segment 6, which is valid and older than 7.
    let mut states = log(14, 22, &[]);
    states[5] = SlotState::Valid {
        id: SegmentId(6),
        length: 127,
        extension: None,
        cut_short: false,
        is_stray: false,
    };
    let r = run(14, 0, &states);
    assert_eq!(r.live().collect::<Vec<_>>(), ids(9..=19));
    assert_eq!(r.dropped, ids([21, 22]));
    assert!(r.corruption.is_empty());
}

#[test]
fn a_torn_overwrite_under_the_old_first_sector_costs_only_what_was_written_back() {
    // Segment 15 was being written over segment 1.
    let r = run(14, 0, &log(14, 14, &[1]));
    assert_eq!(r.skipped, ids([1]));
    assert_eq!(r.live().collect::<Vec<_>>(), ids(2..=14));
    assert!(r.corruption.is_empty());
    assert_eq!(r.damage[0].explanation, Explanation::PowerCut);
}

#[test]
fn rot_in_the_middle_is_corruption() {
    let r = run(14, 0, &log(14, 14, &[6]));
    assert_eq!(
        r.corruption,
        [Corruption::Gap { missing: SegmentId(6), highest: SegmentId(14), window: 3 }]
    );
    assert_eq!(r.point, SegmentId(5));
}

#[test]
fn rot_in_a_segment_that_was_written_back_puts_nothing_at_risk() {
    let r = run(14, 10, &log(14, 14, &[8]));
    assert!(r.corruption.is_empty());
    assert_eq!(r.damage[0].explanation, Explanation::WrittenBack);
    assert_eq!(r.live().collect::<Vec<_>>(), ids(11..=14));
}

#[test]
fn a_first_lap_that_rotted_whole_is_not_taken_for_an_empty_log() {
    let r = run(14, 0, &log(14, 5, &[1, 2, 3, 4, 5]));
    assert!(r.corruption.contains(&Corruption::Unexplained { slot: Slot(3) }), "{r:?}");
}

#[test]
fn a_truncated_device_is_noticed() {
    let states: Vec<_> = (0..10)
        .map(|slot| {
            let id = geometry(14).id_in_slot(Slot(slot), SegmentId(30));
            if geometry(10).slot_of(id) == Slot(slot) {
                SlotState::Valid {
                    id,
                    length: 1,
                    extension: None,
                    cut_short: false,
                    is_stray: false,
                }
            } else {
                invalid(SlotFault::WrongSlot { id, sound: true })
            }
        })
        .collect();
    assert!(
        run(10, 0, &states).corruption.iter().any(|c| matches!(c, Corruption::WrongSlot { .. }))
    );
}

#[test]
fn a_record_beyond_the_log_is_corruption() {
    let r = run(14, 99, &log(14, 5, &[]));
    assert!(matches!(r.corruption[0], Corruption::RecordBeyondLog { .. }));
    // The only slot was being overwritten, so it cannot hold anything else.
    assert!(run(1, 7, &log(1, 7, &[7])).corruption.is_empty());
}

fn extended(durable: u64, written_back: u64) -> Option<SegmentExtension> {
    Some(SegmentExtension {
        digest: page().digest(),
        reason: Reason::Full,
        durable: SegmentId(durable),
        written_back: SegmentId(written_back),
        time: 0,
        before: None,
    })
}

fn page() -> SuperblockExtension {
    SuperblockExtension::new(uuid::Uuid::from_u128(7), 0)
}

/// As [`run`], on a device with the extension; `claims` gives what each valid segment's header
/// says.
fn run_extended(
    slots: u64,
    record: u64,
    mut states: Vec<SlotState>,
    claims: impl Fn(u64) -> Option<SegmentExtension>,
) -> Recovery {
    for state in &mut states {
        if let SlotState::Valid { id, extension, .. } = state {
            *extension = claims(id.0);
        }
    }
    recover(&superblock(slots, record, Some(page())), &states)
}

#[test]
fn a_header_that_knows_more_than_the_record_is_believed() {
    let r = run_extended(14, 2, log(14, 9, &[]), |id| extended(id - 1, id.saturating_sub(4)));
    assert_eq!(r.live().collect::<Vec<_>>(), ids(6..=9));
    // A header cannot make claims about later segments.
    let r = run_extended(14, 2, log(14, 9, &[]), |id| extended(0, id + 1000));
    assert_eq!(r.live().collect::<Vec<_>>(), ids(3..=9));
}

#[test]
fn a_durable_segment_that_is_gone_is_corruption_however_near_the_end() {
    let r = run_extended(14, 0, log(14, 9, &[8]), |id| extended(id - 1, 0));
    assert_eq!(
        r.corruption,
        [Corruption::DurableMissing { missing: SegmentId(8), durable: SegmentId(8) }]
    );
    let r = run_extended(14, 0, log(14, 9, &[8]), |id| extended(id.saturating_sub(2), 0));
    assert!(r.corruption.is_empty());
    assert_eq!((r.point, r.dropped), (SegmentId(7), ids([9])));
}

#[test]
fn rot_after_a_clean_close_is_corruption_even_in_the_newest_segment() {
    let mut superblock = superblock(14, 0, Some(page()));
    let states = log(14, 3, &[3]);
    assert!(recover(&superblock, &states).corruption.is_empty());
    superblock.extension.as_mut().unwrap().clean = Some(SegmentId(3));
    assert_eq!(
        recover(&superblock, &states).corruption,
        [Corruption::DurableMissing { missing: SegmentId(3), durable: SegmentId(3) }]
    );
}

#[test]
fn what_cannot_be_read_is_not_taken_for_the_work_of_a_power_cut() {
    let unreadable = || {
        let cause = nix::errno::Errno::EIO;
        let operation = crate::device::Operation::Read;
        invalid(SlotFault::Unreadable(crate::device::DeviceError {
            device: "cache".into(),
            operation,
            offset: 0,
            length: 4096,
            cause,
        }))
    };
    let mut states = log(14, 5, &[]);
    states[3] = unreadable();
    assert_eq!(run(14, 0, &states).corruption, [Corruption::Unreadable { slot: Slot(3) }]);
    // Written-back segments are not needed.
    let mut states = log(14, 9, &[]);
    states[3] = unreadable();
    assert!(run(14, 7, &states).corruption.is_empty());
}

#[test]
fn a_log_that_the_kernel_module_continued_past_a_hole_is_not_cut_back_in_silence() {
    let r = run_extended(14, 0, log(14, 6, &[4]), |id| if id > 5 { None } else { extended(0, 0) });
    assert_eq!(
        r.corruption,
        [Corruption::WrittenPastHole { missing: SegmentId(4), highest: SegmentId(6) }]
    );
}

#[test]
fn wb_never_overwrites_what_the_record_does_not_cover_so_nothing_is_skipped() {
    let r = run_extended(14, 0, log(14, 14, &[1]), |_| extended(0, 0));
    assert!(r.skipped.is_empty());
    assert_eq!(
        r.corruption[0],
        Corruption::Gap { missing: SegmentId(1), highest: SegmentId(14), window: 3 }
    );
    // But the kernel module does, and it may have written since.
    let r =
        run_extended(14, 0, log(14, 14, &[1]), |id| if id == 14 { None } else { extended(0, 0) });
    assert_eq!(r.skipped, ids([1]));
}

#[test]
fn a_segment_of_an_earlier_cache_is_not_taken_for_one_of_this() {
    let r = run_extended(14, 0, log(14, 9, &[]), |id| {
        let mut claims = extended(0, 0)?;
        claims.digest ^= u32::from(id > 5);
        Some(claims)
    });
    assert_eq!((r.highest, r.point), (SegmentId(5), SegmentId(5)));
    assert!(r.dropped.is_empty() && r.corruption.is_empty());
}

/// As [`run_extended`], with segments that end with a commit, or are cut short.
fn run_with_commits(states: Vec<SlotState>, open: &[u64], short: &[u64], durable: u64) -> Recovery {
    let mut states = states;
    for state in &mut states {
        let SlotState::Valid { id, extension, cut_short, .. } = state else { continue };
        let claims = extended(durable.min(id.0 - 1), 0).unwrap();
        let is_open = open.contains(&id.0);
        let reason = if is_open { Reason::Open } else { Reason::Full };
        *extension = Some(SegmentExtension { reason, ..claims });
        *cut_short = short.contains(&id.0);
    }
    recover(&superblock(14, 0, Some(page())), &states)
}

#[test]
fn the_log_ends_with_a_segment_that_was_not_closed() {
    for (open, short) in [(&[7][..], &[][..]), (&[], &[7]), (&[7], &[7])] {
        let r = run_with_commits(log(14, 9, &[]), open, short, 6);
        assert_eq!(
            (r.point, r.dropped.clone(), r.corruption.clone()),
            (SegmentId(7), ids([8, 9]), vec![])
        );
        assert_eq!((r.open_end(), r.is_cut_short), (Some(SegmentId(7)), !short.is_empty()));
        let r = run_with_commits(log(14, 7, &[]), open, short, 6);
        assert_eq!((r.point, r.open_end()), (SegmentId(7), Some(SegmentId(7))));
    }
}

#[test]
fn a_segment_that_lacks_blocks_though_it_was_durable_is_corruption() {
    for (open, short) in [(&[7][..], &[][..]), (&[], &[7])] {
        // A later header claims it as durable, or a power cut does not reach back that far.
        let r = run_with_commits(log(14, 9, &[]), open, short, 7);
        let durable = SegmentId(7);
        assert_eq!(r.corruption, [Corruption::DurableMissing { missing: durable, durable }]);
        let r = run_with_commits(log(14, 10, &[]), open, short, 6);
        assert!(
            matches!(r.corruption[..], [Corruption::Gap { missing: SegmentId(7), .. }]),
            "{r:?}"
        );
        assert_eq!((r.point, r.open_end()), (SegmentId(6), None));
    }
}

#[test]
fn the_kernel_module_goes_on_after_a_segment_that_was_not_closed() {
    let r = run_extended(14, 0, log(14, 9, &[]), |id| {
        let reason = if id == 7 { Reason::Open } else { Reason::Full };
        (id < 8).then(|| SegmentExtension { reason, ..extended(id - 1, 0).unwrap() })
    });
    assert_eq!((r.point, r.open_end(), r.corruption), (SegmentId(9), None, vec![]));
}

#[test]
fn nothing_is_skipped_above_a_record_that_is_above_what_a_lap_tells() {
    // H − n is 6, and the kernel module may have been writing over segment 7, or over 9.
    assert_eq!(run(14, 0, &log(14, 20, &[9])).skipped, ids(7..=9));
    let r = run(14, 8, &log(14, 20, &[9]));
    assert_eq!((r.skipped.len(), r.point), (0, SegmentId(8)));
    assert!(matches!(r.corruption[0], Corruption::Gap { missing: SegmentId(9), .. }), "{r:?}");
}

#[test]
fn what_a_torn_header_proves_counts() {
    let mut states = log(14, 9, &[9]);
    let torn = |durable, back| SlotState::Invalid {
        fault: SlotFault::Checksum { id: SegmentId(10) },
        proved: extended(durable, back).map(|extension| (SegmentId(10), extension)),
        stray: None,
    };
    states[9] = torn(9, 4);
    let r = run_extended(14, 0, states.clone(), |_| extended(0, 0));
    assert_eq!((r.written_back, r.durable), (SegmentId(4), SegmentId(9)));
    assert_eq!(
        r.corruption[0],
        Corruption::DurableMissing { missing: SegmentId(9), durable: SegmentId(9) }
    );
    // It makes no claim about another cache or about later segments.
    states[9] = torn(10, 10);
    let r = run_extended(14, 0, states.clone(), |_| extended(0, 0));
    assert_eq!((r.written_back, r.durable, r.corruption), (SegmentId(0), SegmentId(0), vec![]));
    let SlotState::Invalid { proved: Some((_, extension)), .. } = &mut states[9] else {
        unreachable!()
    };
    (extension.durable, extension.digest) = (SegmentId(9), 1);
    assert_eq!(run_extended(14, 0, states, |_| extended(0, 0)).durable, SegmentId(0));
}

fn any_state() -> impl Strategy<Value = SlotState> {
    let id = prop_oneof![0..40u64, any::<u64>().prop_map(|id| id % (SegmentId::MAX.0 + 1))]
        .prop_map(SegmentId);
    prop_oneof![
        Just(SlotState::Empty),
        id.clone().prop_map(|id| SlotState::Valid {
            id,
            length: 1,
            extension: None,
            cut_short: false,
            is_stray: false
        }),
        id.prop_map(|id| invalid(SlotFault::Checksum { id })),
    ]
}

proptest! {
    #[test]
    fn any_verdicts_give_a_bounded_answer(
        states in prop::collection::vec(any_state(), 1..20),
        record in prop_oneof![0..40u64, Just(SegmentId::MAX.0)],
    ) {
        let n = to_u64(states.len());
        // A scan calls a segment valid only in the slot that its id belongs to.
        let in_its_slot = |(state, slot): (SlotState, Slot)| match state.valid_id() {
            Some(id) if id == SegmentId::NONE || geometry(n).slot_of(id) != slot => {
                SlotState::Empty
            }
            _ => state,
        };
        let slots = states.into_iter().zip(geometry(n).all_slots());
        let states: Vec<_> = slots.map(in_its_slot).collect();
        let r = run(n, record, &states);
        prop_assert!(r.live_count() <= n);
        let state = |id| &states[slot_index(geometry(n).slot_of(id))];
        prop_assert!(r.live().all(|id| state(id).valid_id() == Some(id)));
    }
}

#[test]
fn the_only_slot_is_torn_where_the_next_segment_has_begun_over_a_written_back_one() {
    let page = Some(SuperblockExtension::new(uuid::Uuid::from_u128(1), 1 << 30));
    let digest = page.as_ref().expect("it is there").digest();
    let extension = SegmentExtension {
        digest,
        reason: Reason::Full,
        durable: SegmentId(25),
        written_back: SegmentId(25),
        time: 0,
        before: None,
    };
    let state = |cut_short| SlotState::Valid {
        id: SegmentId(26),
        length: 3,
        extension: Some(extension),
        cut_short,
        is_stray: false,
    };
    let recovered =
        |record, cut_short| recover(&superblock(1, record, page.clone()), &[state(cut_short)]);
    let torn = recovered(26, true);
    assert_eq!((torn.point, torn.live_count()), (SegmentId(26), 0));
    assert!(torn.corruption.is_empty(), "{:?}", torn.corruption);
    assert_eq!(torn.damage.len(), 1);
    assert_eq!(torn.damage[0].explanation, Explanation::PowerCut);
    // Before it was written back, it is the newest segment, which a power cut may cut short.
    let newest = recovered(25, true);
    assert_eq!((newest.point, newest.live_count()), (SegmentId(26), 1));
    assert!(newest.damage.is_empty());
    assert!(recovered(26, false).damage.is_empty());
}
