//! The findings as JSON. The names are part of the program's interface.

use crate::findings::{Broken, Findings, Verdict};
use crate::repair::Repaired;
use libwb::log::recovery::Explanation;
use libwb::log::salvage::{Plan, Summary};
use serde::Serialize;

#[derive(Serialize)]
pub(crate) struct CheckReport<'a> {
    device: &'a str,
    verdict: Verdict,
    /// False when only the headers were read.
    data_verified: bool,
    size_bytes: u64,
    slots: u32,
    slots_valid: u64,
    slots_empty: u64,
    slots_damaged: usize,
    /// The superblock record; null if it is garbage.
    record_segment: Option<u64>,
    newest_segment: u64,
    written_back_segment: u64,
    recovery_point: u64,
    live_segments: u64,
    dirty_blocks: u64,
    clean_entries: u64,
    /// Blocks of the volume that are marked as lost.
    lost_blocks: Vec<u64>,
    skipped_segments: Vec<u64>,
    dropped_segments: Vec<u64>,
    dropped_dirty_blocks: u64,
    /// Segments of a sound log from which the kernel module may take old data for new.
    misleading_segments: Vec<u64>,
    backing: Option<&'a str>,
    /// Entries beyond the end of the backing device; null when none was given.
    entries_beyond_backing: Option<u64>,
    damage: Vec<Damaged<'a>>,
    corruption: Vec<String>,
    /// One of the two copies of the superblock extension is damaged.
    superblock_copy_damaged: bool,
    /// One of them was being written when the power went.
    superblock_copy_torn: bool,
    /// The ways to go on with a corrupt log, and what each would give up.
    salvage: Vec<Summary>,
    /// What --repair did; null if there was nothing to do. All other members describe the state
    /// after it.
    repair: Option<Repair>,
}

#[derive(Serialize)]
struct Repair {
    verdict_before: Verdict,
    written: Vec<String>,
    /// What the salvage of a corrupt log gave up; null if there was no salvage.
    salvage: Option<Summary>,
}

#[derive(Serialize)]
struct Damaged<'a> {
    slot: u32,
    offset_bytes: u64,
    expected_segment: Option<u64>,
    fault: &'a str,
    explanation: &'static str,
    data_at_risk: bool,
    blocks_at_risk: Vec<u64>,
}

impl CheckReport<'_> {
    pub(crate) fn of<'a>(f: &'a Findings, repaired: Option<&Repaired>) -> CheckReport<'a> {
        let mut corruption: Vec<_> =
            f.recovery.corruption.iter().map(ToString::to_string).collect();
        corruption.extend(f.record.err().map(|fault| fault.to_string()));
        CheckReport {
            device: &f.device,
            verdict: f.verdict(),
            data_verified: !f.headers_only,
            size_bytes: f.size,
            slots: f.geometry.slots(),
            slots_valid: f.valid,
            slots_empty: f.empty,
            slots_damaged: f.broken.len(),
            record_segment: f.record.ok().map(|id| id.0),
            newest_segment: f.recovery.highest.0,
            written_back_segment: f.recovery.written_back.0,
            recovery_point: f.recovery.point.0,
            live_segments: f.recovery.live_count(),
            dirty_blocks: f.live.dirty_blocks,
            clean_entries: f.live.clean_entries,
            lost_blocks: f.live.lost.iter().map(|block| block.0).collect(),
            skipped_segments: f.recovery.skipped.iter().map(|id| id.0).collect(),
            dropped_segments: f.recovery.dropped.iter().map(|id| id.0).collect(),
            dropped_dirty_blocks: f.dropped.dirty_blocks,
            misleading_segments: f.misleading.iter().map(|id| id.0).collect(),
            backing: f.backing.as_ref().map(|backing| backing.name.as_str()),
            entries_beyond_backing: f.backing.as_ref().map(|_| f.live.beyond_count),
            damage: f.broken.iter().map(|b| damaged(f, b)).collect(),
            corruption,
            superblock_copy_damaged: f.scanned.superblock.has_damaged_copy(),
            superblock_copy_torn: f.scanned.superblock.has_torn_copy(),
            salvage: f.ways.iter().map(Plan::summary).collect(),
            repair: repaired.map(|repaired| Repair {
                verdict_before: repaired.verdict,
                written: repaired.written.clone(),
                salvage: repaired
                    .plan
                    .as_ref()
                    .filter(|plan| plan.mode.is_some())
                    .map(Plan::summary),
            }),
        }
    }
}

fn damaged<'a>(f: &Findings, b: &'a Broken) -> Damaged<'a> {
    Damaged {
        slot: b.slot.0,
        offset_bytes: f.geometry.slot_offset(b.slot),
        expected_segment: Some(b.expected.0).filter(|&id| id > 0),
        fault: &b.fault,
        explanation: match b.explanation {
            Explanation::PowerCut => "power-cut",
            Explanation::WrittenBack => "written-back",
            Explanation::None => "unexplained",
        },
        data_at_risk: b.explanation == Explanation::None,
        blocks_at_risk: b.at_risk.iter().map(|block| block.0).collect(),
    }
}
