//! `wbdump segment`: shows the header and the metablocks of one segment.

use crate::log::Log;
use crate::segments::{CUT_SHORT, State, Summary};
use anyhow::{Result, bail};
use libwb::cli::{Output, Table, count, properties, table};
use libwb::format::{DirtyBits, Place, SegmentExtension, SegmentHeader, SegmentId, Slot};
use libwb::log::scan::SlotState;
use serde::Serialize;
use std::io::Write;

#[derive(Serialize)]
struct SegmentReport {
    id: u64,
    slot: u32,
    offset_bytes: u64,
    length_blocks: u8,
    dirty_blocks: usize,
    state: State,
    /// Why it was closed, and when, in RFC 3339, if the header tells.
    closed: Option<String>,
    time: Option<String>,
    checksum: u32,
    valid: bool,
    fault: Option<String>,
    /// It ends with its last flush; everything after that is torn.
    cut_short: bool,
    /// Null for a segment of the base format.
    extension: Option<ExtensionReport>,
    metablocks: Vec<Entry>,
}

/// The part of the header beyond the base format.
#[derive(Serialize)]
struct ExtensionReport {
    /// The digest of the UUID of the cache that it was written for.
    uuid_digest: u32,
    /// The last of the segments that were all durable when the header was written, and of those
    /// that were all written back.
    durable_segment: u64,
    written_back_segment: u64,
    /// The commit before the newest one; null if there is none.
    commit_before: Option<CommitBefore>,
}

#[derive(Serialize)]
struct CommitBefore {
    length_blocks: u8,
    checksum: u32,
}

#[derive(Serialize)]
struct Entry {
    block: u64,
    sector: u64,
    dirty_bits: u8,
    /// The CRC of the data block, if the segment keeps one.
    crc: Option<u32>,
    /// The data is not what was written, and the original is gone.
    lost: bool,
    data_offset_bytes: u64,
}

pub(crate) fn show(log: &Log, id: SegmentId, json: bool, out: &mut Output) -> Result<()> {
    let slot = log.geometry().slot_of(id);
    let (content, verdict, recovery) = log.examine(slot);
    let device = log.device.name();
    let header = match (&content.header, &verdict) {
        (Some(header), _) if header.id == id => header,
        (Some(header), _) => {
            bail!(
                "{device}: segment {id} is not there: its slot {slot} holds segment {}",
                header.id
            )
        }
        (None, SlotState::Invalid { fault, .. }) => {
            bail!("{device}: slot {slot}, where segment {id} belongs: {fault}")
        }
        (None, _) => {
            bail!("{device}: segment {id} is not there: its slot {slot} was never written")
        }
    };
    let report = report(log, slot, &verdict, State::of(&verdict, &recovery), header);
    if json {
        out.json(&report)?;
        return Ok(());
    }
    print(&report, out)
}

fn report(
    log: &Log,
    slot: Slot,
    verdict: &SlotState,
    state: State,
    header: &SegmentHeader,
) -> SegmentReport {
    let summary = Summary::of(header);
    let entries = (0u8..).zip(&header.metablocks).map(|(index, entry)| Entry {
        block: entry.block.0,
        sector: entry.block.sector().0,
        dirty_bits: entry.dirty.0,
        crc: entry.crc,
        lost: entry.lost,
        data_offset_bytes: log.geometry().place_offset(Place { slot, index }),
    });
    SegmentReport {
        id: header.id.0,
        slot: slot.0,
        offset_bytes: log.geometry().slot_offset(slot),
        length_blocks: header.length(),
        dirty_blocks: summary.dirty,
        state,
        closed: summary.closed(),
        time: summary.time(),
        checksum: header.checksum,
        valid: verdict.valid_id().is_some(),
        fault: match verdict {
            SlotState::Invalid { fault, .. } => Some(fault.to_string()),
            _ => None,
        },
        cut_short: matches!(verdict, SlotState::Valid { cut_short: true, .. }),
        extension: header.extension.as_ref().map(ExtensionReport::of),
        metablocks: entries.collect(),
    }
}

impl ExtensionReport {
    fn of(extension: &SegmentExtension) -> ExtensionReport {
        let before = |commit: libwb::format::Commit| CommitBefore {
            length_blocks: commit.length,
            checksum: commit.checksum,
        };
        ExtensionReport {
            uuid_digest: extension.digest,
            durable_segment: extension.durable.0,
            written_back_segment: extension.written_back.0,
            commit_before: extension.before.map(before),
        }
    }
}

fn print(r: &SegmentReport, out: &mut Output) -> Result<()> {
    writeln!(out, "{}", header_table(r))?;
    if r.metablocks.is_empty() {
        return Ok(());
    }
    let columns = ["INDEX", "BLOCK", "SECTOR", "DIRTY SECTORS", "DATA AT BYTE", "CRC"];
    let mut table = table(columns, &["DIRTY SECTORS"]);
    for (index, entry) in r.metablocks.iter().enumerate() {
        table.row([
            index.to_string(),
            entry.block.to_string(),
            entry.sector.to_string(),
            dirty_sectors(DirtyBits(entry.dirty_bits)),
            entry.data_offset_bytes.to_string(),
            match entry.crc {
                Some(_) if entry.lost => "lost".into(),
                Some(crc) => hex(crc),
                None => "-".into(),
            },
        ]);
    }
    writeln!(out, "\n{table}")?;
    Ok(())
}

fn header_table(r: &SegmentReport) -> Table {
    let verdict = match &r.fault {
        Some(fault) => format!("damaged: {fault}"),
        None if r.cut_short => format!("valid, {CUT_SHORT}"),
        None => "valid".into(),
    };
    let mut table = properties();
    let mut row = |name: &str, value: String| table.row([name.to_string(), value]);
    row("segment", format!("{} ({verdict})", r.id));
    row("state", r.state.name().into());
    row("slot", format!("{} (at byte {})", r.slot, r.offset_bytes));
    let length = count(u64::from(r.length_blocks), "block");
    row("length", format!("{length}, {} of them dirty", r.dirty_blocks));
    row("checksum", hex(r.checksum));
    let Some(extension) = &r.extension else {
        row("extension", "none: the base format alone".into());
        return table;
    };
    row("closed", r.closed.clone().unwrap_or_else(|| "-".into()));
    row("time", r.time.clone().unwrap_or_else(|| "-".into()));
    row("durable then", up_to(extension.durable_segment));
    row("written back then", up_to(extension.written_back_segment));
    let before = extension.commit_before.as_ref().map_or("none".into(), |commit| {
        format!(
            "{}, checksum {}",
            count(u64::from(commit.length_blocks), "block"),
            hex(commit.checksum)
        )
    });
    row("commit before", before);
    row("digest of the UUID", hex(extension.uuid_digest));
    table
}

fn up_to(id: u64) -> String {
    if id == 0 { "nothing".into() } else { format!("up to segment {id}") }
}

fn hex(n: u32) -> String {
    format!("{n:#010x}")
}

/// The dirty sectors of a block as text: "all", "none (clean)" or such as "0-2,5".
pub(crate) fn dirty_sectors(dirty: DirtyBits) -> String {
    if dirty.is_clean() {
        return "none (clean)".into();
    }
    if dirty.is_all() {
        return "all".into();
    }
    let run = |(first, count): (usize, usize)| match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", first + count - 1),
    };
    dirty.runs().map(run).collect::<Vec<_>>().join(",")
}
