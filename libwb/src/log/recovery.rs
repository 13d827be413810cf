//! Which segments of a log are live.
//!
//! Pure code over the verdicts of a scan. The terms:
//!
//! - *H*: the largest valid id.
//! - *W*: the largest id known to be written back.
//! - *P*: the recovery point, the last segment to apply.
//! - *D*: the loss window ([`Geometry::loss_window`]).
//!
//! ARCHITECTURE.md gives the rule and its proof.

use super::claims::Claims;
pub use super::corruption::Corruption;
use super::part::Part;
use super::reach::Reach;
use super::superblock::Superblock;
use super::verdict::{SlotFault, SlotState, Valid, proved, stray, valid};
use super::{LogError, LogErrorKind};
use crate::device::Device;
use crate::format::{Geometry, HeaderFault, Reason, SegmentId, Slot};
use std::borrow::Cow;
use std::ops::RangeInclusive;

#[cfg(test)]
mod tests;

/// The largest id at which a log may end, so that it can continue. No real log comes near it.
pub(super) const LAST_SANE_ID: SegmentId = SegmentId(SegmentId::MAX.0 / 2);

/// Why a slot holds no valid segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Explanation {
    /// A power cut interrupted the write of the segment. No acknowledged data is lost.
    PowerCut,
    /// Its old content had been written back; no data is at risk.
    WrittenBack,
    /// No explanation: data may be lost.
    None,
}

/// A slot without a valid segment, though the log has reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The slot.
    pub slot: Slot,
    /// The segment that belongs there; [`SegmentId::NONE`] if the log has not reached the slot.
    /// With [`Explanation::PowerCut`] it is the next segment to write, otherwise the newest one up
    /// to P.
    pub expected: SegmentId,
    /// Why it is not there.
    pub explanation: Explanation,
}

/// What recovery makes of a valid segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is applied.
    Live,
    /// It is known to be written back.
    WrittenBack,
    /// It was written back, because a later slot was being overwritten; see [`Recovery::skipped`].
    Skipped,
    /// It comes after the recovery point.
    Dropped,
}

/// What recovery does with a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The superblock record.
    pub record: SegmentId,
    /// H: the largest valid id, or [`SegmentId::NONE`].
    pub highest: SegmentId,
    /// W: every segment up to this one is known to be written back.
    pub written_back: SegmentId,
    /// P: the last segment to apply. The log continues after it.
    pub point: SegmentId,
    /// Every segment up to this one is known to have been durable.
    pub durable: SegmentId,
    /// Segments after W that are not applied: the slot of a later one was being overwritten, which
    /// proves that all of them were written back. Only on devices of the kernel module. The first
    /// is W + 1.
    pub skipped: Vec<SegmentId>,
    /// Valid segments after P. No flush has acknowledged them.
    pub dropped: Vec<SegmentId>,
    /// Slots without a valid segment, though the log has reached them.
    pub damage: Vec<Damage>,
    /// Damage that no power cut explains. If there is any, wb must not write to either device.
    pub corruption: Vec<Corruption>,
    /// The header of the segment at P does not say that it was closed. It must be closed before the
    /// log continues.
    pub is_open: bool,
    /// The segment at P is open, and its blocks after the last commit are torn.
    pub is_cut_short: bool,
}

impl Recovery {
    /// Returns itself, unless the log is corrupt.
    ///
    /// # Errors
    /// [`LogErrorKind::Corrupt`].
    pub(crate) fn refuse_corrupt(self, device: &Device) -> Result<Recovery, LogError> {
        if self.corruption.is_empty() {
            return Ok(self);
        }
        Err(LogError::new(device, LogErrorKind::Corrupt { corruption: self.corruption }))
    }

    /// The segments to apply, oldest first.
    pub fn live(&self) -> impl DoubleEndedIterator<Item = SegmentId> + use<> {
        let range: RangeInclusive<u64> = self.first_live().0..=self.point.0;
        range.map(SegmentId)
    }

    /// The segment at P, if its header must be rewritten because of [`Recovery::is_open`].
    pub fn open_end(&self) -> Option<SegmentId> {
        self.is_open.then_some(self.point)
    }

    /// The segment at P, if only a commit of it verifies.
    pub fn cut_short(&self) -> Option<SegmentId> {
        self.is_cut_short.then_some(self.point)
    }

    /// The number of segments to apply.
    pub fn live_count(&self) -> u64 {
        self.point.next().since(self.first_live())
    }

    /// What recovery makes of a valid segment.
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

    /// The points until which the log can be replayed.
    pub fn points(&self) -> RangeInclusive<SegmentId> {
        self.first_live().minus(1)..=self.point
    }

    /// The same log, ending at another one of its [`Recovery::points`]. The log must not continue
    /// on the device after that.
    #[cfg(feature = "engine")]
    pub(crate) fn until(self, point: SegmentId) -> Recovery {
        let is_last = point == self.point;
        Recovery {
            point,
            is_open: self.is_open && is_last,
            is_cut_short: self.is_cut_short && is_last,
            dropped: Vec::new(),
            damage: Vec::new(),
            ..self
        }
    }

    /// How far the log has come.
    pub(crate) fn reach(&self) -> Reach {
        let (written_back, durable) = self.points().into_inner();
        Reach { durable, written_back }
    }

    fn first_live(&self) -> SegmentId {
        self.skipped.last().copied().unwrap_or(self.written_back).next()
    }
}

/// Corrects the verdicts of a scan, given all of them together. These segments count as damaged
/// too:
///
/// - A segment that lacks blocks, unless a power cut explains that. It does if the segment was not
///   known to be durable and the log did not continue after it.
/// - In a log of a single slot, a segment that is cut short although it was written back: it is
///   being overwritten.
/// - On a device with the extension, a segment whose first sector neither wb nor the kernel module
///   writes like this.
pub fn explained<'a>(superblock: &Superblock, slots: &'a [SlotState]) -> Cow<'a, [SlotState]> {
    explained_part(superblock, Part::all(superblock.geometry, slots))
}

/// As [`explained`], for a part of the slots.
fn explained_part<'a>(superblock: &Superblock, part: Part<'a>) -> Cow<'a, [SlotState]> {
    let slots = part.states();
    let segments: Vec<Valid> = slots.iter().filter_map(|state| valid(state, superblock)).collect();
    let highest = segments.iter().map(|&(id, _)| id).max().unwrap_or_default();
    let modules =
        segments.iter().filter(|(_, extension)| extension.is_none()).map(|&(id, _)| id).max();
    let durable = Claims::of(superblock, slots).durable;
    let window = superblock.geometry.loss_window();
    let is_unexplained =
        |id: SegmentId| id <= durable || highest.since(id) >= window || Some(id) < modules;
    // With a single slot, the next segment is written over the newest one.
    let is_overwritten = |id: SegmentId, cut_short: bool| {
        superblock.geometry.slots() == 1 && cut_short && id <= superblock.record
    };
    let fault = |state: &SlotState| match (stray(state, superblock), state) {
        (Some(id), _) => Some(HeaderFault::FirstSector { id, may_be_torn: false }.into()),
        (None, &SlotState::Valid { id, length, cut_short, .. })
            if lacks_blocks(superblock, part, id) && is_unexplained(id)
                || is_overwritten(id, cut_short) =>
        {
            Some(SlotFault::CutShort { id, length })
        }
        _ => None,
    };
    if !slots.iter().any(|state| fault(state).is_some()) {
        return Cow::Borrowed(slots);
    }
    let explained = |state: &SlotState| match fault(state) {
        Some(fault) => SlotState::Invalid { fault, proved: proved(state, superblock), stray: None },
        None => state.clone(),
    };
    slots.iter().map(explained).collect()
}

/// Whether a valid segment lacks blocks, or may lack some. The log ends with it. But after one that
/// is open and whole, the kernel module may have continued the log.
pub(super) fn lacks_blocks(superblock: &Superblock, slots: Part<'_>, id: SegmentId) -> bool {
    let SlotState::Valid { id: found, cut_short, extension, .. } = slots.at(id) else {
        return false;
    };
    let is_open = extension.is_some_and(|extension| extension.reason == Reason::Open);
    let goes_on = || valid(slots.at(id.next()), superblock) == Some((id.next(), None));
    *found == id && (*cut_short || is_open && !goes_on())
}

/// Applies the recovery rule to the verdicts of a scan, one for each slot.
pub fn recover(superblock: &Superblock, slots: &[SlotState]) -> Recovery {
    recover_part(superblock, Part::all(superblock.geometry, slots))
}

/// As [`recover`], for a part of the slots.
pub(super) fn recover_part(superblock: &Superblock, part: Part<'_>) -> Recovery {
    let &Superblock { geometry, record, .. } = superblock;
    let slots = &*explained_part(superblock, part);
    let part = part.with(slots);
    let is_valid =
        |id: SegmentId| valid(part.at(id), superblock).is_some_and(|(found, _)| found == id);

    let mut segments: Vec<Valid> =
        slots.iter().filter_map(|state| valid(state, superblock)).collect();
    segments.sort_unstable_by_key(|&(id, _)| id);
    let (highest, newest) = segments.last().copied().unwrap_or_default();
    let claims = Claims::of(superblock, slots);
    let written_back = record.max(highest.minus(geometry.lap())).max(claims.written_back);
    let by_module = superblock.extension.is_none() || newest.is_none();
    let skipped =
        if by_module { skipped(geometry, highest, written_back, is_valid) } else { Vec::new() };
    let start = skipped.last().copied().unwrap_or(written_back).next();
    let mut point = start.minus(1);
    let mut is_open = false;
    while point < highest && !is_open && is_valid(point.next()) {
        point = point.next();
        is_open = lacks_blocks(superblock, part, point);
    }

    let dropped = segments.iter().map(|&(id, _)| id).filter(|&id| id > point).collect();
    let mut recovery = Recovery {
        record,
        highest,
        written_back,
        point,
        durable: claims.durable,
        skipped,
        dropped,
        damage: Vec::new(),
        corruption: Vec::new(),
        is_open,
        is_cut_short: is_open && matches!(part.at(point), SlotState::Valid { cut_short: true, .. }),
    };
    find_corruption(superblock, slots, &segments, &mut recovery);
    for (slot, state) in part.slots() {
        if let SlotState::Invalid { fault, .. } = state {
            explain(&mut recovery, geometry, slot, fault, geometry.loss_window());
        }
    }
    recovery
}

/// Adds the corruption that follows from the log as a whole.
fn find_corruption(
    superblock: &Superblock,
    slots: &[SlotState],
    segments: &[Valid],
    recovery: &mut Recovery,
) {
    let &Superblock { geometry, record, .. } = superblock;
    let &mut Recovery { point, highest, durable, .. } = recovery;
    let (missing, window) = (point.next(), geometry.loss_window());
    let mut add = |corruption| recovery.corruption.push(corruption);
    if durable > point {
        add(Corruption::DurableMissing { missing, durable });
    } else if went_on_past_a_hole(superblock, segments, point) {
        add(Corruption::WrittenPastHole { missing, highest });
    } else if highest.since(point) > window {
        add(Corruption::Gap { missing, highest, window });
    }
    // With a single slot, the newest segment itself may be the one being overwritten.
    let may_be_overwrite = geometry.slots() == 1
        && highest == SegmentId::NONE
        && !matches!(slots[0], SlotState::Empty);
    if record > highest && !may_be_overwrite {
        add(Corruption::RecordBeyondLog { record, highest });
    }
    if point > LAST_SANE_ID {
        add(Corruption::GarbageId { id: point });
    }
    if superblock.extension.is_none() && (superblock.lost_extension || slots.iter().any(is_marked))
    {
        add(Corruption::PairingLost);
    }
}

/// Whether wb wrote the content of a slot.
fn is_marked(state: &SlotState) -> bool {
    match state {
        SlotState::Empty => false,
        SlotState::Valid { extension, .. } => extension.is_some(),
        SlotState::Invalid {
            fault: SlotFault::Header(HeaderFault::FirstSector { .. }), ..
        } => true,
        SlotState::Invalid { proved, .. } => proved.is_some(),
    }
}

/// Whether the kernel module continued the log after a hole. wb never does that. Segments of the
/// module have no extension.
fn went_on_past_a_hole(superblock: &Superblock, segments: &[Valid], point: SegmentId) -> bool {
    let dropped =
        segments.iter().filter(|&&(id, _)| id > point).map(|(_, extension)| extension.is_some());
    superblock.extension.is_some()
        && dropped.clone().any(|ours| ours)
        && dropped.clone().any(|ours| !ours)
}

/// The segments that an interrupted overwrite proves to be written back. The kernel module seldom
/// writes the superblock record, so the slot just above H − n may be torn. Every segment up to the
/// last such slot was written back.
fn skipped(
    geometry: Geometry,
    highest: SegmentId,
    written_back: SegmentId,
    is_valid: impl Fn(SegmentId) -> bool,
) -> Vec<SegmentId> {
    // With a record, W is exact: no slot above it is being overwritten.
    if written_back > highest.minus(geometry.lap()) {
        return Vec::new();
    }
    let limit = highest.plus(geometry.loss_window()).minus(geometry.lap());
    let candidates = written_back.next().0..=limit.0;
    match candidates.clone().rev().map(SegmentId).find(|&id| !is_valid(id)) {
        Some(last) => (*candidates.start()..=last.0).map(SegmentId).collect(),
        None => Vec::new(),
    }
}

/// Whether a power cut may have left this fault. A power cut leaves each sector old or new, and
/// readable. wb rewrites a header only once its previous commit is durable, so that commit
/// verifies, unless the segment was written back and its slot is being overwritten.
fn may_be_torn(fault: &SlotFault, written_back: SegmentId) -> bool {
    match fault {
        SlotFault::Unreadable(_) => false,
        SlotFault::Header(HeaderFault::FirstSector { may_be_torn, .. }) => *may_be_torn,
        SlotFault::Header(HeaderFault::NoId) => false,
        SlotFault::Commit { id, .. } => *id <= written_back,
        SlotFault::Header(_)
        | SlotFault::WrongSlot { .. }
        | SlotFault::Checksum { .. }
        | SlotFault::CutShort { .. } => true,
    }
}

/// What is wrong with one slot that holds no later segment than those of a recovery that did not
/// see it: the damage, or the corruption.
pub(super) fn judged(
    superblock: &Superblock,
    recovery: &Recovery,
    slot: Slot,
    state: &SlotState,
) -> Result<Option<Damage>, Corruption> {
    let garbled = stray(state, superblock)
        .map(|id| HeaderFault::FirstSector { id, may_be_torn: false }.into());
    let fault = match (garbled, state) {
        (Some(fault), _) => fault,
        (None, SlotState::Invalid { fault, .. }) => fault.clone(),
        (None, &SlotState::Valid { id, length, cut_short: true, .. }) => {
            SlotFault::CutShort { id, length }
        }
        (None, SlotState::Valid { .. } | SlotState::Empty) => return Ok(None),
    };
    let (damage, corruption) = (Vec::new(), Vec::new());
    let mut alone = Recovery { damage, corruption, dropped: Vec::new(), ..recovery.clone() };
    explain(&mut alone, superblock.geometry, slot, &fault, superblock.geometry.write_window());
    match alone.corruption.into_iter().next() {
        Some(corruption) => Err(corruption),
        None => Ok(alone.damage.into_iter().next()),
    }
}

/// Adds the damage in a slot, and the corruption if nothing explains the damage. Writes to `window`
/// slots after the end of the log may have been under way.
fn explain(
    recovery: &mut Recovery,
    geometry: Geometry,
    slot: Slot,
    fault: &SlotFault,
    window: u64,
) {
    let point = recovery.point;
    if let SlotFault::WrongSlot { id, sound: true } = fault {
        recovery.corruption.push(Corruption::WrongSlot { slot, id: *id });
    }
    let unreadable = matches!(fault, SlotFault::Unreadable(_));
    let in_flight = geometry.id_in_slot(slot, point.plus(window));
    let old = geometry.id_in_slot(slot, point);
    let written_back = recovery.skipped.last().copied().unwrap_or(recovery.written_back);
    let (expected, explanation) = match (in_flight > point, may_be_torn(fault, written_back)) {
        (true, true) => (in_flight, Explanation::PowerCut),
        (true, false) => (in_flight, Explanation::None),
        (false, _) if old != SegmentId::NONE && old <= written_back => {
            (old, Explanation::WrittenBack)
        }
        (false, _) => (old, Explanation::None),
    };
    recovery.damage.push(Damage { slot, expected, explanation });
    if unreadable && explanation == Explanation::None {
        recovery.corruption.push(Corruption::Unreadable { slot });
        return;
    }
    if explanation == Explanation::None {
        recovery.corruption.push(Corruption::Unexplained { slot });
    }
}
