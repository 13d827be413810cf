//! Which segments of a log are live.
//!
//! Pure code over the verdicts of a scan. The terms: *H*, the largest valid id; *W*, the largest id known to be
//! written back; *P*, the recovery point, the last segment that is applied; *D*, the loss window
//! ([`Geometry::loss_window`]). ARCHITECTURE.md gives the rule and why it holds.

use super::scan::{SlotFault, SlotState, Superblock};
use crate::format::{Geometry, SegmentExtension, SegmentId, Slot, SuperblockExtension};
use std::ops::RangeInclusive;

/// What explains a slot that holds no valid segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Explanation {
    /// The segment was being written when the power went. Nothing acknowledged is lost.
    PowerCut,
    /// Its old content had been written back; no data is at risk.
    WrittenBack,
    /// Nothing does: data may be lost.
    None,
}

/// A slot that holds no valid segment though the log has reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Where.
    pub slot: Slot,
    /// The segment that ought to be there: the next one to be written for [`Explanation::PowerCut`], else the
    /// newest one up to the recovery point; [`SegmentId::NONE`] where the log has not reached.
    pub expected: SegmentId,
    /// Why it is not.
    pub explanation: Explanation,
}

/// Damage to the log that a power cut does not explain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corruption {
    /// Valid segments lie too far beyond the last one that can be applied.
    #[error(
        "segment {missing} is missing or damaged, though valid segments reach up to {highest}; a power cut loses at most the last {window}"
    )]
    Gap {
        /// The first segment that is not there.
        missing: SegmentId,
        /// The largest valid id.
        highest: SegmentId,
        /// How many a power cut may lose.
        window: u64,
    },
    /// A segment is gone that was known to be durable.
    #[error("segment {missing} is missing or damaged, though everything up to segment {durable} was durable")]
    DurableMissing {
        /// The first segment that is not there.
        missing: SegmentId,
        /// What a later header says was durable.
        durable: SegmentId,
    },
    /// The superblock record names a segment that the log has not reached.
    #[error(
        "the superblock record says that segment {record} is written back, but the newest segment is {highest}"
    )]
    RecordBeyondLog {
        /// The record.
        record: SegmentId,
        /// The largest valid id.
        highest: SegmentId,
    },
    /// A sound segment stands where it cannot have been written on a device of this size.
    #[error(
        "slot {slot} holds segment {id}, which belongs elsewhere; has the device been truncated or resized?"
    )]
    WrongSlot {
        /// Where.
        slot: Slot,
        /// The segment.
        id: SegmentId,
    },
    /// A slot holds garbage that no write under way explains.
    #[error("slot {slot} holds no valid segment, and no power cut explains that")]
    Unexplained {
        /// Where.
        slot: Slot,
    },
}

/// What recovery makes of a valid segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is applied.
    Live,
    /// It is known to be written back.
    WrittenBack,
    /// It was written back, as a later slot under overwrite shows; see [`Recovery::skipped`].
    Skipped,
    /// It comes after the recovery point.
    Dropped,
}

/// What is to be done with a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The superblock record.
    pub record: SegmentId,
    /// H: the largest valid id, or [`SegmentId::NONE`].
    pub highest: SegmentId,
    /// W: every segment up to this one is known to be written back.
    pub written_back: SegmentId,
    /// P: the last segment that is applied. The next one to be written follows it.
    pub point: SegmentId,
    /// Segments after W that are not applied because a later one was under overwrite, which shows that they had
    /// been written back. Only on devices that the kernel module wrote. The first is W + 1.
    pub skipped: Vec<SegmentId>,
    /// Valid segments after P. They were never acknowledged as durable.
    pub dropped: Vec<SegmentId>,
    /// Slots that hold no valid segment though the log has reached them.
    pub damage: Vec<Damage>,
    /// Damage that no power cut explains. When there is any, nothing may be written to either device.
    pub corruption: Vec<Corruption>,
}

impl Recovery {
    /// The segments to apply, oldest first.
    pub fn live(&self) -> impl DoubleEndedIterator<Item = SegmentId> + use<> {
        let range: RangeInclusive<u64> = self.first_live().0..=self.point.0;
        range.map(SegmentId)
    }

    /// How many segments there are to apply.
    pub fn live_count(&self) -> u64 {
        self.point.next().since(self.first_live())
    }

    /// What becomes of a valid segment.
    pub fn standing(&self, id: SegmentId) -> Standing {
        if id > self.point {
            Standing::Dropped
        } else if id >= self.first_live() {
            Standing::Live
        } else if id > self.written_back {
            Standing::Skipped
        } else {
            Standing::WrittenBack
        }
    }

    fn first_live(&self) -> SegmentId {
        self.skipped.last().copied().unwrap_or(self.written_back).next()
    }
}

/// What the headers of valid segments say beyond the base format. Facts that were true then, and stay true.
#[derive(Default)]
struct Claims {
    /// Every segment up to this one was durable.
    durable: SegmentId,
    /// Every segment up to this one was written back.
    written_back: SegmentId,
}

impl Claims {
    fn of(segments: &[Valid]) -> Claims {
        let mut claims = Claims::default();
        for (id, extension) in segments.iter().filter_map(|&(id, extension)| Some((id, extension?))) {
            // A header can only speak of segments before its own.
            let before = |claim: SegmentId| if claim < id { claim } else { SegmentId::NONE };
            claims.durable = claims.durable.max(before(extension.durable));
            claims.written_back = claims.written_back.max(before(extension.written_back));
        }
        claims
    }
}

type Valid = (SegmentId, Option<SegmentExtension>);

/// A slot's segment, if it is valid and not one of an earlier cache on the device.
fn valid(state: &SlotState, superblock: &Superblock) -> Option<Valid> {
    let SlotState::Valid { id, extension, .. } = state else { return None };
    let ours = superblock.extension.as_ref().map(SuperblockExtension::digest);
    let foreign = ours.zip(extension.as_ref()).is_some_and(|(ours, its)| ours != its.digest);
    (!foreign).then_some((*id, *extension))
}

/// Applies the rule to the verdicts of a scan, one for each slot.
pub fn recover(superblock: &Superblock, slots: &[SlotState]) -> Recovery {
    let &Superblock { geometry, record, .. } = superblock;
    assert_eq!(slots.len(), geometry.all_slots().len());
    let window = geometry.loss_window();
    let is_valid = |id: SegmentId| {
        let state = &slots[slot_index(geometry.slot_of(id))];
        valid(state, superblock).is_some_and(|(found, _)| found == id)
    };

    let mut segments: Vec<Valid> = slots.iter().filter_map(|state| valid(state, superblock)).collect();
    segments.sort_unstable_by_key(|&(id, _)| id);
    let (highest, newest) = segments.last().copied().unwrap_or_default();
    let claims = Claims::of(&segments);
    let written_back = record.max(highest.minus(geometry.lap())).max(claims.written_back);
    let by_module = superblock.extension.is_none() || newest.is_none();
    let skipped = if by_module { skipped(geometry, highest, written_back, is_valid) } else { Vec::new() };
    let start = skipped.last().copied().unwrap_or(written_back).next();
    let mut point = start.minus(1);
    while point < highest && is_valid(point.next()) {
        point = point.next();
    }

    let dropped = segments.iter().map(|&(id, _)| id).filter(|&id| id > point).collect();
    let mut recovery = Recovery {
        record,
        highest,
        written_back,
        point,
        skipped,
        dropped,
        damage: Vec::new(),
        corruption: Vec::new(),
    };
    if claims.durable > point {
        let durable = claims.durable;
        recovery.corruption.push(Corruption::DurableMissing { missing: point.next(), durable });
    } else if highest.since(point) > window {
        recovery.corruption.push(Corruption::Gap { missing: point.next(), highest, window });
    }
    // With a single slot, the newest segment itself may be under overwrite.
    if record > highest
        && !(geometry.slots() == 1 && highest == SegmentId::NONE && !matches!(slots[0], SlotState::Empty))
    {
        recovery.corruption.push(Corruption::RecordBeyondLog { record, highest });
    }
    for (slot, state) in geometry.all_slots().zip(slots) {
        if let SlotState::Invalid(fault) = state {
            explain(&mut recovery, geometry, slot, fault);
        }
    }
    recovery
}

fn slot_index(slot: Slot) -> usize {
    slot.0 as usize
}

/// The kernel module seldom writes the superblock record, so a slot just above H − n may be under overwrite. Every
/// segment up to the last such slot had been written back.
fn skipped(
    geometry: Geometry,
    highest: SegmentId,
    written_back: SegmentId,
    is_valid: impl Fn(SegmentId) -> bool,
) -> Vec<SegmentId> {
    let limit = highest.plus(geometry.loss_window()).minus(geometry.lap());
    let candidates = written_back.next().0..=limit.0;
    match candidates.clone().rev().map(SegmentId).find(|&id| !is_valid(id)) {
        Some(last) => (*candidates.start()..=last.0).map(SegmentId).collect(),
        None => Vec::new(),
    }
}

fn explain(recovery: &mut Recovery, geometry: Geometry, slot: Slot, fault: &SlotFault) {
    let point = recovery.point;
    if let SlotFault::WrongSlot { id, sound: true } = fault {
        recovery.corruption.push(Corruption::WrongSlot { slot, id: *id });
    }
    let in_flight = geometry.id_in_slot(slot, point.plus(geometry.loss_window()));
    let old = geometry.id_in_slot(slot, point);
    let written_back = recovery.skipped.last().copied().unwrap_or(recovery.written_back);
    let (expected, explanation) = if in_flight > point {
        (in_flight, Explanation::PowerCut)
    } else if old != SegmentId::NONE && old <= written_back {
        (old, Explanation::WrittenBack)
    } else {
        (old, Explanation::None)
    };
    recovery.damage.push(Damage { slot, expected, explanation });
    if explanation == Explanation::None {
        recovery.corruption.push(Corruption::Unexplained { slot });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, to_u64};
    use proptest::prelude::*;

    fn geometry(slots: u64) -> Geometry {
        Geometry::of_device(SUPERBLOCK_REGION_BYTES + slots * to_u64(SEGMENT_BYTES)).expect("a sane size")
    }

    /// The slots of a log of which the segments up to `newest` were written, but for those in `torn`.
    fn log(slots: u64, newest: u64, torn: &[u64]) -> Vec<SlotState> {
        let g = geometry(slots);
        g.all_slots()
            .map(|slot| match g.id_in_slot(slot, SegmentId(newest)) {
                SegmentId::NONE => SlotState::Empty,
                id if torn.contains(&id.0) => SlotState::Invalid(SlotFault::Checksum { id }),
                id => SlotState::Valid { id, length: 127, extension: None },
            })
            .collect()
    }

    fn run(slots: u64, record: u64, states: &[SlotState]) -> Recovery {
        let superblock = Superblock { geometry: geometry(slots), record: SegmentId(record), extension: None };
        recover(&superblock, states)
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
        states[5] = SlotState::Valid { id: SegmentId(6), length: 127, extension: None };
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
                    SlotState::Valid { id, length: 1, extension: None }
                } else {
                    SlotState::Invalid(SlotFault::WrongSlot { id, sound: true })
                }
            })
            .collect();
        assert!(run(10, 0, &states).corruption.iter().any(|c| matches!(c, Corruption::WrongSlot { .. })));
    }

    #[test]
    fn a_record_beyond_the_log_is_corruption() {
        let r = run(14, 99, &log(14, 5, &[]));
        assert!(matches!(r.corruption[0], Corruption::RecordBeyondLog { .. }));
        // The only slot is under overwrite: nothing else can be there.
        assert!(run(1, 7, &log(1, 7, &[7])).corruption.is_empty());
    }

    fn extended(durable: u64, written_back: u64) -> Option<SegmentExtension> {
        Some(SegmentExtension {
            digest: page().digest(),
            reason: crate::format::Reason::Full,
            durable: SegmentId(durable),
            written_back: SegmentId(written_back),
            time: 0,
        })
    }

    fn page() -> SuperblockExtension {
        SuperblockExtension::new(uuid::Uuid::from_u128(7), 0)
    }

    /// As [`run`], on a device with the extension; `claims` gives what each valid segment's header says.
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
        let superblock =
            Superblock { geometry: geometry(slots), record: SegmentId(record), extension: Some(page()) };
        recover(&superblock, &states)
    }

    #[test]
    fn a_header_that_knows_more_than_the_record_is_believed() {
        let r = run_extended(14, 2, log(14, 9, &[]), |id| extended(id - 1, id.saturating_sub(4)));
        assert_eq!(r.live().collect::<Vec<_>>(), ids(6..=9));
        // No header can know of what came after it.
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
    fn wb_never_overwrites_what_the_record_does_not_cover_so_nothing_is_skipped() {
        let r = run_extended(14, 0, log(14, 14, &[1]), |_| extended(0, 0));
        assert!(r.skipped.is_empty());
        assert_eq!(
            r.corruption[0],
            Corruption::Gap { missing: SegmentId(1), highest: SegmentId(14), window: 3 }
        );
        // But the kernel module does, and it may have written since.
        let r = run_extended(14, 0, log(14, 14, &[1]), |id| if id == 14 { None } else { extended(0, 0) });
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

    fn any_state() -> impl Strategy<Value = SlotState> {
        let id = prop_oneof![0..40u64, any::<u64>().prop_map(|id| id % (SegmentId::MAX.0 + 1))]
            .prop_map(SegmentId);
        prop_oneof![
            Just(SlotState::Empty),
            id.clone().prop_map(|id| SlotState::Valid { id, length: 1, extension: None }),
            id.prop_map(|id| SlotState::Invalid(SlotFault::Checksum { id })),
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
            let states: Vec<_> = states.into_iter().zip(geometry(n).all_slots()).map(|(state, slot)| match state {
                SlotState::Valid { id, .. } if id == SegmentId::NONE || geometry(n).slot_of(id) != slot => SlotState::Empty,
                other => other,
            }).collect();
            let r = run(n, record, &states);
            prop_assert!(r.live_count() <= n);
            prop_assert!(r.live().all(|id| states[slot_index(geometry(n).slot_of(id))].valid_id() == Some(id)));
        }
    }
}
