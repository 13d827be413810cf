//! The findings as text: the verdict, the contents of the device, what is wrong, what that means
//! for the data, and what to do.

use crate::findings::{Broken, Findings, Verdict};
use libwb::cli::{Output, count, human_size};
use libwb::format::{BLOCK_BYTES, SECTOR_BYTES, SegmentId, to_u64};
use libwb::log::recovery::{Corruption, Explanation};
use libwb::log::salvage::{salvage_advice, salvage_options, segments};
use std::io::{self, Write};

/// The maximum number of list items that are shown one by one.
const SHOWN: usize = 10;

/// The first line.
pub(crate) fn headline(f: &Findings) -> String {
    let device = &f.device;
    let errors = errors(f);
    match (f.verdict(), errors.first()) {
        (Verdict::Sound, _) if f.headers_only => {
            format!("{device}: sound, as far as the headers alone tell")
        }
        (Verdict::Sound, _) => format!("{device}: sound"),
        (Verdict::SoundAfterPowerCut, _) => {
            format!(
                "{device}: sound after a power cut; nothing that was acknowledged as durable is \
                 lost"
            )
        }
        (Verdict::BlocksLost, _) => format!(
            "{device}: {} of the volume lost; the log is sound",
            match f.live.lost.len() {
                1 => "1 block".into(),
                n => format!("{n} blocks"),
            }
        ),
        (Verdict::Damaged, _) => format!(
            "{device}: DAMAGED, but no data is at risk: {} in what is no longer needed",
            count(to_u64(errors.len()), "error")
        ),
        (Verdict::Corrupt, Some(error)) => format!("{device}: CORRUPT: {}", error.what),
        (Verdict::Corrupt, None) => format!("{device}: CORRUPT"),
    }
}

pub(crate) fn print(f: &Findings, out: &mut Output) -> io::Result<()> {
    out.text(&headline(f), "  ")?;
    summary(f, out)?;
    let errors = errors(f);
    if !errors.is_empty() {
        writeln!(out, "\nErrors:")?;
    }
    for error in &errors {
        out.text(&format!("  - {}.", error.what), "    ")?;
        out.text(&format!("    {}", error.meaning), "    ")?;
    }
    let notes = notes(f);
    if !notes.is_empty() {
        writeln!(out, "\nNotes:")?;
    }
    for note in &notes {
        out.text(&format!("  - {note}"), "    ")?;
    }
    if let Some(advice) = advice(f) {
        writeln!(out)?;
        out.text(&format!("What to do: {advice}"), "  ")?;
    }
    let ways = if f.scanned.lost_nothing_but_the_pairing() { &[][..] } else { &f.ways };
    for way in salvage_options(ways, "--repair --salvage") {
        out.text(&format!("  - {way}."), "    ")?;
    }
    Ok(())
}

fn summary(f: &Findings, out: &mut Output) -> io::Result<()> {
    let r = &f.recovery;
    let mut line =
        |name: &str, value: String| out.text(&format!("  {name:<16}{value}"), &" ".repeat(18));
    line(
        "segments",
        format!(
            "{} valid, {} empty, {} damaged, of {}",
            f.valid,
            f.empty,
            f.broken.len(),
            f.geometry.slots()
        ),
    )?;
    line("recovery point", segment_or_none(r.point))?;
    let written_back = match r.written_back {
        SegmentId::NONE => "nothing yet, as far as is known".into(),
        id => format!("up to segment {id}"),
    };
    line("written back", written_back)?;
    let to_apply = match r.live().next() {
        None => "nothing".into(),
        Some(first) => format!(
            "{}, with {} and {}",
            range(first, r.point),
            dirty_blocks(f.live.dirty_blocks),
            count(f.live.clean_entries, "clean block"),
        ),
    };
    line("to apply", to_apply)?;
    let addresses = match &f.backing {
        None => "not checked against a backing device (give --backing)".into(),
        Some(b) if f.live.beyond_count == 0 => format!(
            "all inside {} ({})",
            b.name,
            human_size(b.sectors.saturating_mul(to_u64(SECTOR_BYTES)))
        ),
        Some(b) => format!("{} outside {}", f.live.beyond_count, b.name),
    };
    line("addresses", addresses)?;
    line(
        "data",
        if f.headers_only {
            "not read (--headers-only)"
        } else {
            "read and compared with its checksums"
        }
        .into(),
    )
}

fn dirty_blocks(n: u64) -> String {
    let number = count(n, "dirty block");
    match n {
        0 => number,
        _ => format!("{number} ({})", human_size(n.saturating_mul(to_u64(BLOCK_BYTES)))),
    }
}

struct Problem {
    what: String,
    /// What it means for the data.
    meaning: String,
}

fn errors(f: &Findings) -> Vec<Problem> {
    let mut errors = Vec::new();
    if let Err(fault) = f.record {
        let meaning = "Nothing tells what was written back, so every segment counts as not \
                       written back."
            .into();
        errors.push(Problem { what: fault.to_string(), meaning });
    }
    errors.extend(f.recovery.corruption.iter().filter_map(|corruption| explained(f, corruption)));
    errors.extend(lost(f));
    errors.extend(resized(f));
    if f.scanned.superblock.has_damaged_copy() {
        errors.push(Problem {
            what: "one of the two copies of the superblock extension is damaged".into(),
            meaning: "The other one is sound. The device may be wearing out.".into(),
        });
    }
    let told = f.scanned.is_resized();
    let bad = |b: &&Broken| {
        !(told && b.misplaced.is_some()) && (b.explanation != Explanation::PowerCut || b.unreadable)
    };
    errors.extend(f.broken.iter().filter(bad).take(SHOWN).map(|b| slot_error(f, b)));
    let hidden = f.broken.iter().filter(bad).count().saturating_sub(SHOWN);
    if hidden > 0 {
        let meaning = "--json lists them all.".into();
        errors.push(Problem {
            what: format!("{} more like these", count(to_u64(hidden), "slot")),
            meaning,
        });
    }
    if let (Some(first), Some(backing)) = (f.live.beyond.first(), &f.backing) {
        errors.push(Problem {
            what: format!(
                "{} ({} such in all)",
                first.text(&backing.name, backing.sectors),
                f.live.beyond_count,
            ),
            meaning: "That data has no place there. Most likely it is not the backing device of \
                      this cache, or it was made smaller."
                .into(),
        });
    }
    errors
}

fn lost(f: &Findings) -> Option<Problem> {
    let lost = &f.live.lost;
    let shown: Vec<_> = lost.iter().take(SHOWN).map(|block| block.bytes().to_string()).collect();
    let more = if lost.len() > SHOWN { ", ..." } else { "" };
    (!lost.is_empty()).then(|| Problem {
        what: format!(
            "{} of the volume cannot be read any more",
            count(to_u64(lost.len()), "block")
        ),
        meaning: format!(
            "The cache device altered the data before wb could write it back (4096 bytes each, at \
             byte {}{more} of the volume). Reads of these blocks fail until you rewrite or \
             discard them.",
            shown.join(", ")
        ),
    })
}

fn resized(f: &Findings) -> Option<Problem> {
    if !f.scanned.is_resized() {
        return None;
    }
    let mut found = f.broken.iter().filter_map(|b| Some((b.slot, b.misplaced?)));
    let (slot, id) = found.next()?;
    let others = match found.count() {
        0 => String::new(),
        n => format!(", and {} more like it", count(to_u64(n), "slot")),
    };
    Some(Problem {
        what: format!(
            "slot {slot} holds segment {id}, which is sound but belongs elsewhere{others}; the \
             device was truncated or resized"
        ),
        meaning: format!(
            "On a device of this size ({} bytes), nothing tells which segments belong to the log. \
             At its former size, the cache may be whole.",
            f.size
        ),
    })
}

/// Errors of single slots are shown with the slots.
fn explained(f: &Findings, corruption: &Corruption) -> Option<Problem> {
    let meaning = match corruption {
        Corruption::Gap { missing, .. }
        | Corruption::DurableMissing { missing, .. }
        | Corruption::WrittenPastHole { missing, .. }
            if f.recovery.dropped.is_empty() =>
        {
            format!("What segment {missing} held may be lost.")
        }
        Corruption::Gap { missing, .. }
        | Corruption::DurableMissing { missing, .. }
        | Corruption::WrittenPastHole { missing, .. } => format!(
            "After it come {} with {}, which may be nowhere else. If you apply them, you give up \
             what segment {missing} held.",
            segments(&f.recovery.dropped),
            count(f.dropped.dirty_blocks, "dirty block"),
        ),
        Corruption::RecordBeyondLog { .. } | Corruption::GarbageId { .. } => {
            "The newest part of the log is gone, or the record is wrong. Data that was not written \
             back may be lost."
                .into()
        }
        Corruption::PairingLost => "Nothing tells any more which backing device is the right one. \
                                    On another one, the log would destroy data."
            .into(),
        Corruption::WrongSlot { .. }
        | Corruption::Unexplained { .. }
        | Corruption::Unreadable { .. } => {
            return None;
        }
    };
    Some(Problem { what: corruption.to_string(), meaning })
}

fn slot_error(f: &Findings, b: &Broken) -> Problem {
    let what = format!("{}: {}", where_it_is(f, b), b.fault);
    let meaning = match b.explanation {
        Explanation::WrittenBack => {
            "Its data had been written back; none is at risk. The device may be wearing out.".into()
        }
        Explanation::PowerCut => "It cannot have held anything acknowledged as durable, but the \
                                  device is failing."
            .into(),
        Explanation::None if b.at_risk.is_empty() => {
            "What it held may be lost, and its header does not tell which blocks that was.".into()
        }
        Explanation::None => {
            let shown: Vec<_> = b.at_risk.iter().take(SHOWN).map(ToString::to_string).collect();
            let more = if b.at_risk.len() > SHOWN { ", ..." } else { "" };
            format!(
                "At risk, as far as its header can be trusted: {} of the backing device \
                 ({}{more}; in units of 4096 bytes).",
                count(to_u64(b.at_risk.len()), "block"),
                shown.join(", "),
            )
        }
    };
    Problem { what, meaning }
}

fn notes(f: &Findings) -> Vec<String> {
    let mut notes: Vec<String> = f
        .broken
        .iter()
        .filter(|b| b.explanation == Explanation::PowerCut && !b.unreadable)
        .map(|b| {
            format!("{}: {}. It was being written when the power went.", where_it_is(f, b), b.fault)
        })
        .take(SHOWN)
        .collect();
    let r = &f.recovery;
    if r.is_cut_short {
        notes.push(format!(
            "Segment {} is cut short: it ends with the last flush, and everything after that is \
             torn. wb applies it up to the flush; the kernel module would drop it. --repair \
             closes it there.",
            r.point
        ));
    }
    let breaks = r
        .corruption
        .iter()
        .any(|c| matches!(c, Corruption::Gap { .. } | Corruption::DurableMissing { .. }));
    if !r.dropped.is_empty() && !breaks {
        notes.push(format!(
            "After a gap come {}, which will not be applied: the power went before anything in \
             them was acknowledged as durable.",
            segments(&r.dropped)
        ));
    }
    if f.scanned.superblock.has_torn_copy() {
        notes.push(
            "One of the two copies of the superblock extension is torn: it was being written when \
             the power went. The other one is sound. --repair and the next detach rewrite the \
             torn one."
                .into(),
        );
    }
    if !r.skipped.is_empty() {
        notes.push(format!(
            "{} need not be applied: {} was being overwritten, which happens only after \
             everything up to it was written back.",
            capitalized(&segments(&r.skipped)),
            if r.skipped.len() == 1 { "it" } else { "the last of them" },
        ));
    }
    if !f.misleading.is_empty() {
        notes.push(format!(
            "The kernel module may take old data in {} for new, as in any cache that was not \
             detached in order. Before you give it the device, use --repair, or attach and detach \
             the volume. wb needs neither.",
            segments(&f.misleading)
        ));
    }
    notes
}

fn advice(f: &Findings) -> Option<String> {
    let advice = match f.verdict() {
        Verdict::Sound => return None,
        Verdict::SoundAfterPowerCut => "nothing. Use the cache as usual.",
        Verdict::BlocksLost => {
            "attach the volume, and find out which files the blocks belong to (debugfs, xfs_io). \
             Restore those from a backup, which rewrites the blocks. Replace the cache device."
        }
        Verdict::Damaged => {
            "repair it with --repair, or write everything back: the damaged slots will be \
             overwritten in time. Watch the device, or replace it."
        }
        Verdict::Corrupt if f.scanned.is_resized() => {
            "give the device its former size again, then check it again. Until then, do not attach \
             or format it."
        }
        Verdict::Corrupt if f.live.beyond_count > 0 && f.recovery.corruption.is_empty() => {
            "look for the right backing device. Do not attach this pair."
        }
        Verdict::Corrupt if f.scanned.lost_nothing_but_the_pairing() => {
            "copy the device first. Then write a new superblock extension with --repair, and name \
             the right backing device with --backing: the cache is paired with it. wbctl attach \
             and replay do the same with --salvage."
        }
        Verdict::Corrupt if !f.ways.is_empty() => {
            return Some(format!(
                "copy both devices first, and use wbdump to see what can be read. Then {}, here \
                 or with wbctl attach or replay:",
                salvage_advice(&f.ways)
            ));
        }
        Verdict::Corrupt => {
            "do not attach, write back or format anything yet: that would make the loss final. \
             Copy both devices first; then use wbdump to see what can still be read."
        }
    };
    Some(advice.into())
}

fn where_it_is(f: &Findings, b: &Broken) -> String {
    let at = format!("slot {} (at byte {})", b.slot, f.geometry.slot_offset(b.slot));
    // The message about a wrong checksum already names the segment.
    if b.expected == SegmentId::NONE || b.fault.contains(&format!("segment {} ", b.expected)) {
        at
    } else {
        format!("{at}, where segment {} belongs", b.expected)
    }
}

fn segment_or_none(id: SegmentId) -> String {
    if id == SegmentId::NONE { "none".into() } else { format!("segment {id}") }
}

fn range(first: SegmentId, last: SegmentId) -> String {
    if first == last { format!("segment {first}") } else { format!("segments {first} to {last}") }
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map(|first| first.to_uppercase().collect::<String>() + chars.as_str())
        .unwrap_or_default()
}
