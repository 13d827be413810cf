//! What a check of the whole device found, and its verdict.

use crate::args::Args;
use crate::subject::{Backing, Subject};
use anyhow::Result;
use libwb::cli::{Exit, Progress};
use libwb::format::{
    BlockNo, Geometry, SEGMENT_BYTES, SegmentId, Slot, SuperblockFault, to_u64, to_usize,
};
use libwb::log::live::{Share, Totals};
use libwb::log::recovery::{Corruption, Damage, Explanation, Recovery};
use libwb::log::salvage::{Plan, Scanned};
use libwb::log::scan::{SlotContent, SlotFault, SlotState, read_slot_header, scan_headers};
use serde::Serialize;
use std::collections::HashSet;

/// The maximum number of damaged segments whose headers are read again, for the blocks at risk.
const LISTED: usize = 1000;

/// The verdict of a check, with stable names for JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// Nothing is wrong.
    Sound,
    /// A power cut explains everything that is wrong.
    SoundAfterPowerCut,
    /// The log is sound, and some blocks in it are marked as lost.
    BlocksLost,
    /// Something is damaged, but all of its data is on the backing device.
    Damaged,
    /// Data may be lost.
    Corrupt,
}

impl Verdict {
    pub(crate) fn exit(self) -> Exit {
        match self {
            Verdict::Sound | Verdict::SoundAfterPowerCut => Exit::Done,
            Verdict::BlocksLost | Verdict::Damaged | Verdict::Corrupt => Exit::ErrorsLeft,
        }
    }
}

/// A slot that should hold a valid segment, but does not.
pub(crate) struct Broken {
    pub(crate) slot: Slot,
    /// [`SegmentId::NONE`] if the log has not reached this slot.
    pub(crate) expected: SegmentId,
    pub(crate) explanation: Explanation,
    /// What is wrong with it.
    pub(crate) fault: String,
    /// A sound segment in this slot that belongs elsewhere.
    pub(crate) misplaced: Option<SegmentId>,
    /// The device failed to read it. A power cut does not cause that.
    pub(crate) unreadable: bool,
    /// If nothing explains the damage: the dirty blocks that the header lists, as far as it is
    /// readable.
    pub(crate) at_risk: Vec<BlockNo>,
}

/// What a check of the whole device found, and its verdict.
pub(crate) struct Findings {
    pub(crate) device: String,
    pub(crate) size: u64,
    pub(crate) geometry: Geometry,
    pub(crate) backing: Option<Backing>,
    pub(crate) headers_only: bool,
    pub(crate) record: Result<SegmentId, SuperblockFault>,
    pub(crate) valid: u64,
    pub(crate) empty: u64,
    pub(crate) recovery: Recovery,
    pub(crate) live: Totals,
    pub(crate) dropped: Totals,
    pub(crate) broken: Vec<Broken>,
    /// The ways to go on with a corrupt log.
    pub(crate) ways: Vec<Plan>,
    /// Segments of a sound log that are written back, but from which the kernel module may take old
    /// data for new.
    pub(crate) misleading: Vec<SegmentId>,
    pub(crate) scanned: Scanned,
}

impl Findings {
    pub(crate) fn gather(subject: &Subject, args: &Args) -> Result<Findings> {
        let Subject { io, device, superblock, backing, .. } = subject;
        let geometry = superblock.geometry;
        let mut progress = if args.quiet {
            Progress::none()
        } else {
            Progress::new("checking", geometry.lap(), SEGMENT_BYTES)
        };
        let mut shares = vec![Share::default(); to_usize(geometry.lap())];
        let visit = |slot: Slot, content: &SlotContent| {
            progress.set(u64::from(slot.0));
            if let Some(header) =
                content.header.as_ref().filter(|_| content.state.valid_id().is_some())
            {
                shares[to_usize(slot.0.into())] = Share::of(header);
            }
        };
        let slots = if args.headers_only {
            io.block_on(scan_headers(device, geometry, visit))
        } else {
            io.scan(device, geometry, visit)?
        };
        drop(progress);
        let scanned = Scanned::of(superblock.clone(), &slots);
        let (recovery, slots) = (scanned.recovery(), &scanned.slots);
        let sectors = backing.as_ref().map(|backing| backing.sectors);
        let share = |id| (id, &shares[to_usize(geometry.slot_of(id).0.into())]);
        let live = Totals::of(recovery.live().map(share), sectors);
        let dropped = Totals::of(recovery.dropped.iter().copied().map(share), None);
        let number = |wanted: fn(&SlotState) -> bool| {
            to_u64(slots.iter().filter(|&slot| wanted(slot)).count())
        };
        let misleading = match scanned.is_corrupt() {
            true => Vec::new(),
            false => {
                io.block_on(scanned.repair(device))?.map(|plan| plan.misleading).unwrap_or_default()
            }
        };
        Ok(Findings {
            device: device.name().to_string(),
            size: device.size(),
            geometry,
            backing: backing.clone(),
            headers_only: args.headers_only,
            record: superblock.record,
            valid: number(|slot| matches!(slot, SlotState::Valid { .. })),
            empty: number(|slot| matches!(slot, SlotState::Empty)),
            broken: broken(subject, &recovery, slots),
            recovery,
            live,
            dropped,
            ways: if args.headers_only {
                Vec::new()
            } else {
                subject.io.block_on(scanned.salvage_plans(&subject.device))?
            },
            misleading,
            scanned,
        })
    }

    pub(crate) fn verdict(&self) -> Verdict {
        let at_risk = self.broken.iter().any(|b| b.explanation == Explanation::None);
        if self.record.is_err()
            || !self.recovery.corruption.is_empty()
            || self.live.beyond_count > 0
            || at_risk
        {
            Verdict::Corrupt
        } else if !self.live.lost.is_empty() {
            Verdict::BlocksLost
        } else if self.scanned.superblock.has_damaged_copy()
            || self.broken.iter().any(|b| b.unreadable || b.explanation == Explanation::WrittenBack)
        {
            Verdict::Damaged
        } else if !self.broken.is_empty()
            || self.recovery.is_cut_short
            || self.scanned.superblock.has_torn_copy()
            || !self.recovery.dropped.is_empty()
            || !self.recovery.skipped.is_empty()
        {
            Verdict::SoundAfterPowerCut
        } else {
            Verdict::Sound
        }
    }
}

fn broken(subject: &Subject, recovery: &Recovery, slots: &[SlotState]) -> Vec<Broken> {
    let mut listed = 0;
    let mut look = |slot| {
        listed += 1;
        if listed > LISTED { Vec::new() } else { dirty_blocks(subject, slot) }
    };
    let unexplained = Unexplained::of(recovery, subject.superblock.geometry);
    let one = |damage: &Damage| {
        let SlotState::Invalid { fault, .. } = &slots[to_usize(u64::from(damage.slot.0))] else {
            return None;
        };
        let explanation = unexplained.or_as_recovered(damage);
        Some(Broken {
            slot: damage.slot,
            expected: damage.expected,
            explanation,
            fault: fault.to_string(),
            misplaced: match fault {
                SlotFault::WrongSlot { id, sound: true } => Some(*id),
                _ => None,
            },
            unreadable: matches!(fault, SlotFault::Unreadable(_)),
            at_risk: if explanation == Explanation::None { look(damage.slot) } else { Vec::new() },
        })
    };
    recovery.damage.iter().filter_map(one).collect()
}

/// The slots that show the corruption that recovery found. No other explanation holds for them.
pub(crate) struct Unexplained {
    slots: HashSet<Slot>,
    /// No segment up to this one was being written when the power went.
    durable: SegmentId,
}

impl Unexplained {
    pub(crate) fn of(recovery: &Recovery, geometry: Geometry) -> Unexplained {
        let slot = |corruption: &Corruption| match corruption {
            Corruption::Gap { missing, .. }
            | Corruption::DurableMissing { missing, .. }
            | Corruption::WrittenPastHole { missing, .. } => Some(geometry.slot_of(*missing)),
            Corruption::WrongSlot { slot, .. }
            | Corruption::Unexplained { slot }
            | Corruption::Unreadable { slot } => Some(*slot),
            Corruption::RecordBeyondLog { .. }
            | Corruption::GarbageId { .. }
            | Corruption::PairingLost => None,
        };
        let durable = |corruption: &Corruption| match corruption {
            Corruption::DurableMissing { durable, .. } => *durable,
            _ => SegmentId::NONE,
        };
        Unexplained {
            slots: recovery.corruption.iter().filter_map(slot).collect(),
            durable: recovery.corruption.iter().map(durable).max().unwrap_or(SegmentId::NONE),
        }
    }

    pub(crate) fn or_as_recovered(&self, damage: &Damage) -> Explanation {
        let was_durable =
            damage.explanation == Explanation::PowerCut && damage.expected <= self.durable;
        if was_durable || self.slots.contains(&damage.slot) {
            Explanation::None
        } else {
            damage.explanation
        }
    }
}

fn dirty_blocks(subject: &Subject, slot: Slot) -> Vec<BlockNo> {
    let content =
        subject.io.block_on(read_slot_header(&subject.device, subject.superblock.geometry, slot));
    let entries = content.header.into_iter().flat_map(|header| header.metablocks);
    let mut blocks: Vec<_> = entries.filter(|e| !e.dirty.is_clean()).map(|e| e.block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}
