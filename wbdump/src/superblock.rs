//! `wbdump super`: shows the superblock, and totals of the log.

use crate::log::Log;
use anyhow::Result;
use libwb::cli::{LAST_SECOND, Output, human_size, properties};
use libwb::format::{SEGMENT_BYTES, printable, to_u64};
use libwb::log::live::{Totals, live_totals};
use libwb::log::recovery::Recovery;
use libwb::log::scan::SlotState;
use libwb::log::superblock::RawSuperblock;
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

#[derive(Serialize)]
struct SuperblockReport<'a> {
    device: &'a str,
    size_bytes: u64,
    magic_ok: bool,
    /// The record, if it is readable and not garbage.
    record_segment: Option<u64>,
    segments: u32,
    segment_bytes: usize,
    slots_valid: usize,
    slots_empty: usize,
    slots_damaged: usize,
    newest_segment: u64,
    written_back_segment: u64,
    recovery_point: u64,
    live_segments: u64,
    dropped_segments: usize,
    dirty_blocks: u64,
    dirty_entries: u64,
    clean_entries: u64,
    corruption: Vec<String>,
    /// Null for a device of the base format.
    extension: Option<ExtensionReport<'a>>,
}

#[derive(Serialize)]
struct ExtensionReport<'a> {
    uuid: String,
    label: &'a str,
    /// Seconds since 1970 (UTC).
    created: u64,
    generation: u64,
    sound_copies: usize,
    backing_sectors: u64,
    backing_id: &'a str,
    /// The newest segment when the cache was last closed in order.
    clean_segment: Option<u64>,
}

fn extension(superblock: &RawSuperblock) -> Option<ExtensionReport<'_>> {
    let page = superblock.extension()?;
    Some(ExtensionReport {
        uuid: page.uuid.to_string(),
        label: &page.label,
        created: page.created,
        generation: page.generation,
        sound_copies: superblock.pages.iter().flatten().count(),
        backing_sectors: page.backing_sectors,
        backing_id: &page.backing_id,
        clean_segment: page.clean.map(|id| id.0),
    })
}

pub(crate) fn show(log: &Log, json: bool, out: &mut Output) -> Result<()> {
    let (slots, recovery) = log.scan(|_, _| ());
    let totals = log.io.block_on(live_totals(&log.device, log.geometry(), &recovery, None))?;
    let report = report(log, &slots, &recovery, &totals);
    if json {
        out.json(&report)?;
        return Ok(());
    }
    print(&report, out)
}

fn report<'a>(
    log: &'a Log,
    slots: &[SlotState],
    recovery: &Recovery,
    totals: &Totals,
) -> SuperblockReport<'a> {
    let number = |wanted: fn(&SlotState) -> bool| slots.iter().filter(|&slot| wanted(slot)).count();
    SuperblockReport {
        device: log.device.name(),
        size_bytes: log.device.size(),
        magic_ok: log.superblock.magic.is_ok(),
        record_segment: log.superblock.record.ok().map(|id| id.0),
        segments: log.geometry().slots(),
        segment_bytes: SEGMENT_BYTES,
        slots_valid: number(|slot| matches!(slot, SlotState::Valid { .. })),
        slots_empty: number(|slot| matches!(slot, SlotState::Empty)),
        slots_damaged: number(|slot| matches!(slot, SlotState::Invalid { .. })),
        newest_segment: recovery.highest.0,
        written_back_segment: recovery.written_back.0,
        recovery_point: recovery.point.0,
        live_segments: recovery.live_count(),
        dropped_segments: recovery.dropped.len(),
        dirty_blocks: totals.dirty_blocks,
        dirty_entries: totals.dirty_entries,
        clean_entries: totals.clean_entries,
        corruption: recovery.corruption.iter().map(ToString::to_string).collect(),
        extension: extension(&log.superblock),
    }
}

fn print(r: &SuperblockReport<'_>, out: &mut Output) -> Result<()> {
    let record =
        r.record_segment.map_or_else(|| "garbage, or unreadable".into(), |id| id.to_string());
    let magic = if r.magic_ok { "right" } else { "wrong" };
    let rows = [
        ("device", r.device.to_string()),
        ("size", format!("{} ({} bytes)", human_size(r.size_bytes), r.size_bytes)),
        ("magic", magic.to_string()),
        ("superblock record", record),
        ("segments", format!("{} of {}", r.segments, human_size(to_u64(r.segment_bytes)))),
        (
            "slots",
            format!(
                "{} valid, {} empty, {} damaged",
                r.slots_valid, r.slots_empty, r.slots_damaged
            ),
        ),
        ("newest segment", id_or_none(r.newest_segment)),
        ("written back up to", id_or_none(r.written_back_segment)),
        ("recovery point", id_or_none(r.recovery_point)),
        ("live segments", r.live_segments.to_string()),
        ("dropped segments", r.dropped_segments.to_string()),
        ("dirty blocks", format!("{} ({} entries in the log)", r.dirty_blocks, r.dirty_entries)),
        ("clean entries", r.clean_entries.to_string()),
    ];
    let mut table = properties();
    let mut row = |name: &str, value: String| table.row([name.to_string(), value]);
    rows.into_iter().for_each(|(name, value)| row(name, value));
    match &r.extension {
        None => row("extension", "none: the base format alone".into()),
        Some(extension) => {
            extension_rows(extension).into_iter().for_each(|(name, value)| row(name, value))
        }
    }
    for corruption in &r.corruption {
        row("corrupt", corruption.clone());
    }
    writeln!(out, "{table}")?;
    Ok(())
}

fn extension_rows(e: &ExtensionReport<'_>) -> [(&'static str, String); 6] {
    let backing = match (e.backing_sectors, e.backing_id) {
        (0, _) => "any".into(),
        (sectors, "") => format!("one of {sectors} sectors"),
        (sectors, id) => format!("{}, of {sectors} sectors", printable(id)),
    };
    [
        (
            "extension",
            format!("{} of 2 copies are sound, generation {}", e.sound_copies, e.generation),
        ),
        ("uuid", e.uuid.clone()),
        ("label", if e.label.is_empty() { "none".into() } else { printable(e.label) }),
        (
            "created",
            humantime::format_rfc3339_seconds(
                UNIX_EPOCH + Duration::from_secs(e.created.min(LAST_SECOND)),
            )
            .to_string(),
        ),
        ("backing device", backing),
        (
            "closed in order at",
            e.clean_segment.map_or_else(|| "never".into(), |id| format!("segment {id}")),
        ),
    ]
}

fn id_or_none(id: u64) -> String {
    if id == 0 { "none".into() } else { id.to_string() }
}
