//! `wbcheck --segment`: checks one segment against the others, as attaching sees them.

use crate::args::Args;
use crate::findings::{Unexplained, Verdict};
use crate::subject::Subject;
use anyhow::{Result, bail};
use libwb::cli::{Exit, Output, Progress, count};
use libwb::format::{SEGMENT_BYTES, SegmentId, to_usize};
use libwb::log::live::{Totals, totals};
use libwb::log::recovery::{Explanation, Recovery, Standing, explained, recover};
use libwb::log::scan::{SlotState, read_slot, scan_trusting};
use serde::Serialize;
use std::io::Write;

#[derive(Serialize)]
struct SegmentReport<'a> {
    device: &'a str,
    segment: u64,
    slot: u32,
    offset_bytes: u64,
    verdict: Verdict,
    summary: String,
    dirty_blocks: u64,
    clean_entries: u64,
    /// Entries beyond the end of the backing device; null when none was given.
    entries_beyond_backing: Option<u64>,
}

pub(crate) fn check(
    subject: &Subject,
    id: SegmentId,
    args: &Args,
    out: &mut Output,
) -> Result<Exit> {
    let Subject { io, device, superblock, backing, .. } = subject;
    let geometry = superblock.geometry;
    let slot = geometry.slot_of(id);
    let mut progress = if args.quiet {
        Progress::none()
    } else {
        Progress::new("checking", geometry.lap(), SEGMENT_BYTES)
    };
    let known = superblock.or_no_record();
    let mut slots =
        io.block_on(scan_trusting(device, &known, |slot, _| progress.set(u64::from(slot.0))));
    drop(progress);
    let place = to_usize(u64::from(slot.0));
    slots[place] = io.block_on(read_slot(device, geometry, slot)).state;
    let slots = explained(&known, &slots);
    let recovery = recover(&known, &slots);

    let mut held = Totals::default();
    let (verdict, summary) = match &slots[place] {
        SlotState::Valid { id: found, .. } if *found == id => {
            let sectors = backing.as_ref().map(|backing| backing.sectors);
            held = io.block_on(totals(device, geometry, [id], recovery.cut_short(), sectors))?;
            valid(&recovery, id, &held)
        }
        SlotState::Invalid { fault, .. } => {
            let damage = recovery.damage.iter().find(|damage| damage.slot == slot);
            let unexplained = Unexplained::of(&recovery, geometry);
            let why =
                damage.map_or(Explanation::None, |damage| unexplained.or_as_recovered(damage));
            invalid(why, &fault.to_string())
        }
        other if is_live_hole(&recovery, id) => {
            (Verdict::Corrupt, format!("it is missing: {}", holds(other)))
        }
        other => bail!(
            "{}: segment {id} is not in the log: its slot {slot} {}; the newest segment is {}",
            device.name(),
            holds(other),
            recovery.highest
        ),
    };
    let report = SegmentReport {
        device: device.name(),
        segment: id.0,
        slot: slot.0,
        offset_bytes: geometry.slot_offset(slot),
        verdict,
        summary,
        dirty_blocks: held.dirty_blocks,
        clean_entries: held.clean_entries,
        entries_beyond_backing: backing.as_ref().map(|_| held.beyond_count),
    };
    print(&report, args, out)?;
    Ok(verdict.exit())
}

fn print(r: &SegmentReport<'_>, args: &Args, out: &mut Output) -> Result<()> {
    if args.json {
        out.json(r)?;
    } else if !(args.quiet && r.verdict.exit() == Exit::Done) {
        let word = match r.verdict {
            Verdict::Sound | Verdict::SoundAfterPowerCut => "sound",
            Verdict::BlocksLost => "BLOCKS LOST",
            Verdict::Damaged => "DAMAGED",
            Verdict::Corrupt => "CORRUPT",
        };
        writeln!(
            out,
            "{}: segment {} (slot {}, at byte {}): {word}: {}",
            r.device, r.segment, r.slot, r.offset_bytes, r.summary
        )?;
    }
    Ok(())
}

fn valid(recovery: &Recovery, id: SegmentId, held: &Totals) -> (Verdict, String) {
    if held.beyond_count > 0 {
        let many = count(held.beyond_count, "entry");
        return (
            Verdict::Corrupt,
            format!("{many} beyond the end of the backing device; is it the right one?"),
        );
    }
    let what = format!(
        "{}, {}",
        count(held.dirty_blocks, "dirty block"),
        count(held.clean_entries, "clean block")
    );
    match recovery.standing(id) {
        Standing::Live if recovery.is_cut_short && id == recovery.point => (
            Verdict::SoundAfterPowerCut,
            format!("{what} up to the last flush; what was written of it after that is torn"),
        ),
        Standing::Live => (Verdict::Sound, format!("{what}, not written back yet")),
        Standing::WrittenBack | Standing::Skipped => {
            (Verdict::Sound, format!("{what}, written back already"))
        }
        Standing::Dropped if !recovery.corruption.is_empty() => (
            Verdict::Sound,
            format!(
                "{what}, but the log is corrupt after segment {}: see what wbcheck says",
                recovery.point
            ),
        ),
        Standing::Dropped => (
            Verdict::SoundAfterPowerCut,
            format!("{what}, but it comes after the recovery point, segment {}", recovery.point),
        ),
    }
}

fn invalid(why: Explanation, fault: &str) -> (Verdict, String) {
    match why {
        Explanation::PowerCut => (
            Verdict::SoundAfterPowerCut,
            format!(
                "{fault}; it was being written when the power went, and nothing acknowledged is \
                 lost"
            ),
        ),
        Explanation::WrittenBack => (
            Verdict::Damaged,
            format!("{fault}; its data had been written back, and none is at risk"),
        ),
        Explanation::None => (Verdict::Corrupt, format!("{fault}; its data may be lost")),
    }
}

/// Whether a segment should be there: it is neither written back nor beyond the newest.
fn is_live_hole(recovery: &Recovery, id: SegmentId) -> bool {
    let last = recovery.highest.max(recovery.durable.next());
    id > recovery.point && id < last && !recovery.corruption.is_empty()
}

fn holds(state: &SlotState) -> String {
    match state {
        SlotState::Valid { id, .. } => format!("holds segment {id}"),
        _ => "was never written".into(),
    }
}
