//! Which slots must change so that recovery accepts a log. Pure code over the verdicts of a scan.
//!
//! W, P, H and D are those of [`recovery`](crate::log::recovery). F is the last segment of the log
//! afterwards: P, or a later one if the plan keeps segments after P.

use super::mode::SalvageMode;
use crate::format::{Geometry, HeaderFault, Reason, SegmentExtension, SegmentId, Slot};
use crate::log::part::Part;
use crate::log::recovery::{Corruption, LAST_SANE_ID, Recovery, explained, lacks_blocks, recover};
use crate::log::segment_writes::filler_extension;
use crate::log::superblock::{RawSuperblock, Superblock};
use crate::log::verdict::{SlotFault, SlotState, proved, slot_index, valid};

/// A slot to rewrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) slot: Slot,
    /// The segment that it will hold; [`SegmentId::NONE`] if none.
    pub(super) id: SegmentId,
    /// The segment is not written back, so its surviving blocks are kept.
    pub(super) live: bool,
}

/// A segment that the plan gives up, whole or in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LostSegment {
    pub(super) slot: Slot,
    /// [`SegmentId::NONE`] if it is unknown.
    pub(super) id: SegmentId,
    /// What the slot holds.
    pub(super) found: Found,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The segment, undamaged.
    Sound,
    /// Something damaged, possibly the segment.
    Damaged,
    /// Nothing of the segment.
    Nothing,
}

/// The changes to slots and to the superblock region, and what they give up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SlotPlan {
    /// W. The superblock record must say this before any other write.
    pub(super) written_back: SegmentId,
    /// F.
    pub(super) point: SegmentId,
    /// The last segment known to have been durable.
    pub(super) durable: SegmentId,
    /// The first changes, in any order.
    pub(super) changes: Vec<Change>,
    /// The change after them. Until it, recovery refuses the log, or already gives its final
    /// result.
    pub(super) commit_change: Option<Change>,
    /// The last changes. What they erase is the evidence, until then, that the log was corrupt.
    pub(super) final_changes: Vec<Change>,
    /// The segment at F, if only a commit of it verifies. It must be closed there.
    pub(super) cut_short: Option<SegmentId>,
    /// The clean mark must go, because the segment that it names will be gone.
    pub(super) clear_clean_mark: bool,
    /// The superblock record, if the log contradicts it.
    pub(super) rejected_record: Option<SegmentId>,
    pub(super) lost: Vec<LostSegment>,
}

impl SlotPlan {
    /// Plans a salvage in this mode, or without a mode, a repair. `None` if the result would not be
    /// a log that recovery accepts.
    pub(super) fn new(
        raw: &RawSuperblock,
        slots: &[SlotState],
        mode: Option<SalvageMode>,
    ) -> Option<SlotPlan> {
        let mut superblock = raw.or_no_record();
        superblock.record = SegmentId::NONE;
        let slots =
            if mode.is_some() { without_misnumbered(&superblock, slots) } else { slots.to_vec() };
        let slots = explained(&superblock, &slots);
        let unrecorded = recover(&superblock, &slots);
        let rejected_record = match raw.record {
            Ok(record) if is_accepted(&superblock, &slots, record, unrecorded.highest, mode) => {
                superblock.record = record;
                None
            }
            Ok(record) => Some(record),
            Err(fault) => Some(SegmentId(fault.record()?)),
        };
        let recovery = recover(&superblock, &slots);
        let plan = Planner { superblock: &superblock, slots: &slots, recovery: &recovery };
        let mut slot_plan = plan.plan(mode);
        slot_plan.rejected_record = rejected_record;
        if superblock.record > recovery.highest
            && !may_continue(&superblock, &slots, recovery.highest, superblock.record)
        {
            plan.lose_unrecorded(&unrecorded, &mut slot_plan);
        }
        match slot_plan.exposed(&superblock, &slots) {
            // This ends: fewer segments are valid each time.
            Some(slots) => SlotPlan::new(raw, &slots, mode),
            None => slot_plan.leads_to_a_sound_log(&superblock, &slots).then_some(slot_plan),
        }
    }

    /// Some segments that lack blocks are valid only as long as the log ends with them. If the log
    /// will continue after such a segment, returns the verdicts with that segment as damaged.
    fn exposed(&self, superblock: &Superblock, slots: &[SlotState]) -> Option<Vec<SlotState>> {
        let (superblock, outcome) = self.outcome(superblock, slots);
        let after = explained(&superblock, &outcome);
        let changed = |nth: usize| {
            matches!(
                (&outcome[nth], &after[nth]),
                (SlotState::Valid { .. }, SlotState::Invalid { .. })
            )
        };
        (0..slots.len()).any(changed).then(|| {
            (0..slots.len())
                .map(|nth| if changed(nth) { &after[nth] } else { &slots[nth] })
                .cloned()
                .collect()
        })
    }

    /// Whether there is nothing to change.
    pub(super) fn is_empty(&self) -> bool {
        self.all_changes().next().is_none()
            && self.cut_short.is_none()
            && !self.clear_clean_mark
            && self.rejected_record.is_none()
    }

    /// Every change.
    pub(super) fn all_changes(&self) -> impl Iterator<Item = Change> {
        self.changes
            .iter()
            .copied()
            .chain(self.commit_change)
            .chain(self.final_changes.iter().copied())
    }

    /// Whether recovery will accept the log, up to F.
    fn leads_to_a_sound_log(&self, superblock: &Superblock, slots: &[SlotState]) -> bool {
        let (superblock, slots) = self.outcome(superblock, slots);
        let after = recover(&superblock, &slots);
        after.corruption.is_empty() && after.dropped.is_empty() && after.point == self.point
    }

    /// The superblock and the verdicts that a later scan will find.
    fn outcome(
        &self,
        superblock: &Superblock,
        slots: &[SlotState],
    ) -> (Superblock, Vec<SlotState>) {
        let mut superblock = superblock.clone();
        superblock.record = self.written_back;
        let page = superblock.extension.clone();
        if let Some(page) = superblock.extension.as_mut().filter(|_| self.clear_clean_mark) {
            page.clean = None;
        }
        let mut slots = slots.to_vec();
        for change in self.all_changes() {
            slots[slot_index(change.slot)] = match change.id {
                SegmentId::NONE => SlotState::Empty,
                id => SlotState::Valid {
                    id,
                    length: 0,
                    extension: page.as_ref().map(|page| filler_extension(page, id, self.durable)),
                    cut_short: false,
                    is_stray: false,
                },
            };
        }
        if let Some(id) = self.cut_short {
            let slot = &mut slots[slot_index(superblock.geometry.slot_of(id))];
            if let SlotState::Valid { extension, cut_short, .. } = slot {
                *cut_short = false;
                *extension = extension.map(|it| SegmentExtension { reason: Reason::Flush, ..it });
            }
        }
        (superblock, slots)
    }
}

struct Planner<'a> {
    superblock: &'a Superblock,
    slots: &'a [SlotState],
    recovery: &'a Recovery,
}

impl Planner<'_> {
    fn plan(&self, mode: Option<SalvageMode>) -> SlotPlan {
        let (recovery, geometry) = (self.recovery, self.superblock.geometry);
        let end = self.end();
        let tail_is_corrupt = mode.is_some()
            && (end > recovery.highest.max(recovery.point)
                || recovery.corruption.iter().any(|corruption| {
                    matches!(
                        corruption,
                        Corruption::Gap { .. }
                            | Corruption::DurableMissing { .. }
                            | Corruption::WrittenPastHole { .. }
                    )
                }));
        let point = match mode {
            Some(SalvageMode::Skip) if tail_is_corrupt => self.up_to_what_lacks_blocks(end),
            _ => recovery.point,
        };
        let written_back = recovery.live().next().map_or(recovery.point, |first| first.minus(1));
        let needed = written_back.max(point.minus(geometry.lap()));
        let mut slot_plan = SlotPlan {
            written_back,
            point,
            durable: recovery.durable,
            changes: Vec::new(),
            commit_change: None,
            final_changes: Vec::new(),
            cut_short: Some(point).filter(|&id| id > written_back && self.is_cut_short(id)),
            clear_clean_mark: self.clean_mark() > Some(point),
            rejected_record: None,
            lost: Vec::new(),
        };
        for slot in geometry.all_slots() {
            self.visit(slot, needed, &mut slot_plan);
        }
        if tail_is_corrupt {
            self.lose_tail(end, &mut slot_plan);
        }
        slot_plan.lost.sort_unstable_by_key(|lost| (lost.id, lost.slot));
        slot_plan.lost.dedup();
        slot_plan.order_changes(geometry, recovery.highest);
        slot_plan
    }

    /// The end of the log if every segment up to `end` is kept: the log must end with a segment
    /// that lacks blocks. Later ones were never acknowledged, unless they are known to be durable.
    fn up_to_what_lacks_blocks(&self, end: SegmentId) -> SegmentId {
        let first = self.recovery.durable.max(self.recovery.point).next();
        let mut ids = (first.0..=end.0).map(SegmentId);
        let slots = Part::all(self.superblock.geometry, self.slots);
        ids.find(|&id| lacks_blocks(self.superblock, slots, id)).unwrap_or(end)
    }

    /// Gives up the segments after F that are valid or were durable. At most one lap of them has a
    /// slot.
    fn lose_tail(&self, end: SegmentId, slot_plan: &mut SlotPlan) {
        let geometry = self.superblock.geometry;
        let last = end.max(self.recovery.durable);
        let first = slot_plan.point.max(last.minus(geometry.lap())).next();
        for id in (first.0..=last.0).map(SegmentId) {
            slot_plan.lost.push(self.lost_segment(geometry.slot_of(id), id));
        }
    }

    /// The last segment that the log had. It is the largest of:
    ///
    /// - the newest valid segment;
    /// - a segment with a durable commit;
    /// - the last segment known to have been durable, if no live segment occupies a slot up to it.
    fn end(&self) -> SegmentId {
        let highest = self.recovery.highest.max(self.recovery.point);
        let geometry = self.superblock.geometry;
        let committed = |state: &SlotState| match state {
            SlotState::Invalid { fault: SlotFault::Commit { .. }, .. } => {
                proved(state, self.superblock)
            }
            _ => None,
        };
        let committed = self.slots.iter().filter_map(committed).map(|(id, _)| id);
        let committed =
            committed.filter(|&id| is_near(geometry, highest, id)).max().unwrap_or_default();
        let durable = Some(self.recovery.durable).filter(|&last| {
            // At most a lap: without a valid segment, the end of the log is unknown otherwise.
            let first = highest.max(last.minus(geometry.lap())).next();
            is_near(geometry, highest, last)
                && (first.0..=last.0).all(|id| !self.is_needed(geometry.slot_of(SegmentId(id))))
        });
        highest.max(committed).max(durable.unwrap_or_default())
    }

    /// Whether a slot holds a valid segment that is not written back.
    fn is_needed(&self, slot: Slot) -> bool {
        let found = valid(&self.slots[slot_index(slot)], self.superblock);
        found.is_some_and(|(id, _)| id > self.recovery.written_back)
    }

    /// Whether only a commit of a segment verifies.
    fn is_cut_short(&self, id: SegmentId) -> bool {
        let slot = slot_index(self.superblock.geometry.slot_of(id));
        match self.slots[slot] {
            SlotState::Valid { id: found, cut_short, .. } => cut_short && found == id,
            _ => false,
        }
    }

    fn clean_mark(&self) -> Option<SegmentId> {
        self.superblock.extension.as_ref().and_then(|extension| extension.clean)
    }

    /// Plans the change of one slot. Segments up to `needed` are written back, or have no slot any
    /// more.
    fn visit(&self, slot: Slot, needed: SegmentId, slot_plan: &mut SlotPlan) {
        let (geometry, point) = (self.superblock.geometry, slot_plan.point);
        let state = &self.slots[slot_index(slot)];
        let id = geometry.id_in_slot(slot, point);
        let found = valid(state, self.superblock).map_or(SegmentId::NONE, |(found, _)| found);
        let live = id > needed;
        // The log must not end before the superblock record.
        let must_stand = live || (id == point && id != SegmentId::NONE);
        let fault = match state {
            SlotState::Invalid { fault, .. } => Some(fault),
            _ => None,
        };
        if !(must_stand && found != id || found > point || fault.is_some()) {
            return;
        }
        slot_plan.changes.push(Change { slot, id, live });
        if live {
            slot_plan.lost.push(self.lost_segment(slot, id));
        } else if let Some(fault) = fault {
            let in_flight = geometry.id_in_slot(slot, point.plus(geometry.loss_window()));
            let held = match fault {
                SlotFault::WrongSlot { id, sound: true } => *id,
                SlotFault::Unreadable(_) if in_flight > point => in_flight,
                SlotFault::Header(HeaderFault::FirstSector { id, may_be_torn: false })
                    if in_flight > point =>
                {
                    Some(in_flight).filter(|named| named.0 == *id).unwrap_or_default()
                }
                SlotFault::Header(HeaderFault::NoId) if in_flight > point => SegmentId::NONE,
                _ if in_flight == SegmentId::NONE => SegmentId::NONE,
                _ => return,
            };
            slot_plan.lost.push(LostSegment { slot, id: held, found: Found::Damaged });
        }
    }

    fn lost_segment(&self, slot: Slot, id: SegmentId) -> LostSegment {
        let found = match &self.slots[slot_index(slot)] {
            SlotState::Invalid { .. } => Found::Damaged,
            state if valid(state, self.superblock).is_some_and(|(found, _)| found == id) => {
                Found::Sound
            }
            _ => Found::Nothing,
        };
        LostSegment { slot, id, found }
    }

    /// Gives up the segments that only the superblock record shows to be written back. The plan
    /// accepts a record beyond the log.
    fn lose_unrecorded(&self, unrecorded: &Recovery, slot_plan: &mut SlotPlan) {
        let geometry = self.superblock.geometry;
        let standing = (unrecorded.written_back.next().0..=unrecorded.highest.0).map(SegmentId);
        let sound = standing
            .map(|id| self.lost_segment(geometry.slot_of(id), id))
            .filter(|d| d.found == Found::Sound);
        slot_plan.lost.splice(..0, sound);
    }
}

impl SlotPlan {
    /// Sorts the changes into the order in which they are safe.
    fn order_changes(&mut self, geometry: Geometry, highest: SegmentId) {
        // As long as the first missing segment is missing, recovery ends before it.
        let first = self.changes.iter().filter(|change| change.live).map(|change| change.id).min();
        if first.is_some() {
            self.commit_change =
                self.changes.extract_if(.., |change| Some(change.id) == first).next();
            self.final_changes = self.changes.extract_if(.., |change| !change.live).collect();
        } else if highest > self.point {
            // As long as the newest segment is valid, W and P do not change.
            let newest = geometry.slot_of(highest);
            self.commit_change = self.changes.extract_if(.., |change| change.slot == newest).next();
        }
    }
}

/// Whether a log whose newest valid segment is `highest` may have reached `last`. Without a valid
/// segment, its end is unknown.
fn is_near(geometry: Geometry, highest: SegmentId, last: SegmentId) -> bool {
    let from = if highest == SegmentId::NONE { last.minus(geometry.lap()) } else { highest };
    last <= LAST_SANE_ID && last.since(from) <= geometry.lap()
}

/// Whether the log may have continued from `highest` to `last`: every slot of these segments is
/// damaged. None holds an older segment.
fn may_continue(
    superblock: &Superblock,
    slots: &[SlotState],
    highest: SegmentId,
    last: SegmentId,
) -> bool {
    let geometry = superblock.geometry;
    let from = if highest == SegmentId::NONE { last.minus(geometry.lap()) } else { highest };
    let damaged = |id| {
        matches!(slots[slot_index(geometry.slot_of(SegmentId(id)))], SlotState::Invalid { .. })
    };
    last > highest && is_near(geometry, highest, last) && (from.next().0..=last.0).all(damaged)
}

/// Whether to accept the superblock record, which may be rotten. It counts if the log reaches it,
/// or may have reached it. [`SalvageMode::Stop`] would rather give up valid segments than let old
/// data replace newer data. So it also accepts a record that is less than a lap beyond the log.
fn is_accepted(
    superblock: &Superblock,
    slots: &[SlotState],
    record: SegmentId,
    highest: SegmentId,
    mode: Option<SalvageMode>,
) -> bool {
    let within_a_lap = record <= LAST_SANE_ID && record.since(highest) < superblock.geometry.lap();
    let traceless = highest != SegmentId::NONE && within_a_lap;
    match mode {
        // As recovery does.
        None => true,
        Some(SalvageMode::Skip) => {
            record <= highest || may_continue(superblock, slots, highest, record)
        }
        Some(SalvageMode::Stop) => {
            record <= highest || traceless || may_continue(superblock, slots, highest, record)
        }
    }
}

/// The verdicts, with misnumbered segments as damaged. The base format does not protect ids, and
/// one that is far too large would make all other segments look written back. The segments of a log
/// lie within a lap of each other. So one that is more than a lap above most of the others counts
/// as damaged.
fn without_misnumbered(superblock: &Superblock, slots: &[SlotState]) -> Vec<SlotState> {
    let lap = superblock.geometry.lap();
    let segments = slots.iter().filter_map(|state| valid(state, superblock));
    let mut segments: Vec<_> = segments.filter(|(id, _)| *id <= LAST_SANE_ID).collect();
    segments.sort_unstable_by_key(|&(id, _)| id);
    // The extension's CRC covers the id.
    let certain =
        segments.iter().filter(|(_, extension)| extension.is_some()).map(|&(id, _)| id).max();
    let (mut most, mut top, mut first) = (0, SegmentId::NONE, 0);
    for (nth, &(id, _)) in segments.iter().enumerate() {
        while segments[first].0 <= id.minus(lap) {
            first += 1;
        }
        let near = nth + 1 - first;
        if near > most && Some(id) >= certain {
            (most, top) = (near, id);
        }
    }
    let misnumbered =
        |state: &SlotState| valid(state, superblock).filter(|(id, _)| id.since(top) > lap);
    let damaged = |id| SlotState::invalid(SlotFault::WrongSlot { id, sound: false });
    slots
        .iter()
        .map(|state| misnumbered(state).map_or_else(|| state.clone(), |(id, _)| damaged(id)))
        .collect()
}
