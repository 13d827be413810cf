//! Reading a log in the time of what is dirty: its tail alone, from the last segment that is
//! written back.
//!
//! On a device that wb wrote last, the record is durable before a slot is used again. So it is
//! exact, and the segments up to it matter no more. From there, the log is walked to its end, and
//! then through as many slots as could hold something that a power cut has left, or evidence that
//! the log had once come further. If anything is unusual, the whole device is read instead, which
//! decides. ARCHITECTURE.md gives the proof.
//!
//! The other slots are looked at once the volume is served: [`second_look`] says what one means.

use super::corruption::Corruption;
use super::part::Part;
use super::recovery::{Explanation, Recovery, judged, recover_part};
use super::scan::{
    HEADER_SCAN_DEPTH, SlotContent, SlotState, read_slot, read_slot_header, read_unproved,
};
use super::superblock::Superblock;
use super::verdict::{proved, valid};
use crate::device::Device;
use crate::format::{Geometry, SegmentId, Slot, to_u64};
use futures_util::{StreamExt, stream};
use std::ops::Range;

/// The tail of a log.
#[derive(Clone, Debug)]
pub struct Tail {
    /// What recovery makes of it.
    pub recovery: Recovery,
    /// The segments in whose slots nothing was looked at. Each would be the next to use its slot.
    pub rest: Range<u64>,
}

/// How many slots after the end of a log are read. wb writes at most a window ahead of what is
/// durable, so a power cut leaves nothing beyond one. If the first segment of them was durable and
/// is damaged, the header a window later says so, if the log came so far. So two windows hold what
/// a power cut has left, and the evidence if it was none.
pub const fn slots_ahead(geometry: Geometry) -> u64 {
    2 * geometry.write_window()
}

/// Reads the tail of a log: `ahead` slots after its end. Calls `visit` for each slot, perhaps
/// twice; the second call counts. Returns `None` if only the whole device can decide.
pub async fn read_tail(
    device: &Device,
    superblock: &Superblock,
    ahead: u64,
    mut visit: impl FnMut(Slot, &SlotContent),
) -> Option<Tail> {
    let &Superblock { geometry, record, .. } = superblock;
    if !superblock.is_record_proved {
        return None;
    }
    let first = record.max(SegmentId(1));
    let end = first.plus(geometry.lap());
    let reads = (first.0..end.0).map(SegmentId).map(async |id| {
        let slot = geometry.slot_of(id);
        (id, slot, read_slot_header(device, geometry, slot).await)
    });
    let mut reads = stream::iter(reads).buffered(HEADER_SCAN_DEPTH);
    let (mut slots, mut states, mut closed) = (Vec::new(), Vec::new(), Vec::new());
    let (mut point, mut left) = (first.minus(1), ahead.max(1));
    while left > 0
        && let Some((id, slot, content)) = reads.next().await
    {
        let found = valid(&content.state, superblock);
        if found.is_some_and(|(_, extension)| extension.is_none()) {
            // Of the kernel module.
            return None;
        }
        match found.is_some_and(|(found, _)| found == id) && point == id.minus(1) {
            true => point = id,
            false => left -= 1,
        }
        visit(slot, &content);
        slots.push(slot);
        closed.push(content.is_closed());
        states.push(content.state);
    }
    drop(reads);
    read_unproved(device, superblock, &slots, &mut states, &closed, visit).await;
    let part = Part::from(geometry, first, &states);
    let recovery = recover_part(superblock, part);
    let rest = first.plus(to_u64(states.len())).0..end.0;
    (rest.is_empty() || is_usual(superblock, part, &recovery)).then_some(Tail { recovery, rest })
}

/// Whether the tail of a log is as a power cut leaves it on a device that wb wrote last.
fn is_usual(superblock: &Superblock, slots: Part<'_>, recovery: &Recovery) -> bool {
    let &Superblock { geometry, record, .. } = superblock;
    let &Recovery { point, written_back, .. } = recovery;
    let may_be_lost = |id: SegmentId| id > point && id.since(point) <= geometry.write_window();
    let is_ours = |state: &SlotState| match state {
        SlotState::Empty => true,
        SlotState::Valid { .. } => valid(state, superblock).is_some_and(|(_, its)| its.is_some()),
        // It shows as damage.
        SlotState::Invalid { .. } => true,
    };
    recovery.corruption.is_empty()
        && recovery.skipped.is_empty()
        && written_back == record
        && (record == SegmentId::NONE || slots.at(record).valid_id() == Some(record))
        && recovery.dropped.iter().all(|&id| may_be_lost(id))
        && recovery.damage.iter().all(|damage| {
            damage.explanation == Explanation::PowerCut && may_be_lost(damage.expected)
        })
        && slots.states().iter().all(is_ours)
}

/// What a slot outside the tail of a log means, once the log is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecondLook {
    /// Nothing.
    Nothing,
    /// This segment is damaged. It is written back, so no data is at risk.
    Damaged(SegmentId),
    /// The log that is served is not the one that was written, and no power cut explains that.
    Contradiction(Corruption),
}

/// Reads a slot outside the tail of a log: its header, and the rest if that is no sound segment.
pub async fn read_other_slot(device: &Device, geometry: Geometry, slot: Slot) -> SlotState {
    match read_slot_header(device, geometry, slot).await.state {
        SlotState::Invalid { .. } => read_slot(device, geometry, slot).await.state,
        state => state,
    }
}

/// What a slot outside the tail means. `recovery` is what was made of the tail.
pub fn second_look(
    superblock: &Superblock,
    recovery: &Recovery,
    slot: Slot,
    state: &SlotState,
) -> SecondLook {
    let point = recovery.point;
    let missing = point.next();
    let found = valid(state, superblock).map(|(id, _)| id);
    let claims = proved(state, superblock).filter(|&(id, _)| id > point);
    if let Some((_, claim)) = claims.filter(|(id, claim)| (missing..*id).contains(&claim.durable)) {
        let durable = claim.durable;
        return SecondLook::Contradiction(Corruption::DurableMissing { missing, durable });
    }
    if let Some(highest) = found.filter(|&id| id > point).or(claims.map(|(id, _)| id)) {
        let window = superblock.geometry.write_window();
        return SecondLook::Contradiction(Corruption::Gap { missing, highest, window });
    }
    match judged(superblock, recovery, slot, state) {
        Err(corruption) => SecondLook::Contradiction(corruption),
        Ok(None) => SecondLook::Nothing,
        // What a power cut tears lies in the tail. Here, only an old segment can be damaged.
        Ok(Some(_)) => match superblock.geometry.id_in_slot(slot, point) {
            SegmentId::NONE => SecondLook::Contradiction(Corruption::Unexplained { slot }),
            old => SecondLook::Damaged(old),
        },
    }
}

#[cfg(test)]
mod tests;
