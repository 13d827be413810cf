//! `wbdump segment`: one segment's header and metablocks.

use crate::Log;
use anyhow::{Result, bail};
use libwb::cli::{Output, count, table};
use libwb::format::{DirtyBits, Place, SegmentHeader, SegmentId, Slot};
use libwb::log::scan::{SlotContent, SlotState, read_slot};
use serde::Serialize;
use std::io::Write;

#[derive(Serialize)]
struct Report {
    id: u64,
    slot: u32,
    offset_bytes: u64,
    length_blocks: u8,
    checksum: u32,
    valid: bool,
    fault: Option<String>,
    metablocks: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    block: u64,
    sector: u64,
    dirty_bits: u8,
    data_offset_bytes: u64,
}

pub(crate) fn show(log: &Log, id: SegmentId, json: bool, out: &mut Output) -> Result<()> {
    let slot = log.geometry().slot_of(id);
    let content = log.io.block_on(read_slot(&log.device, log.geometry(), slot));
    let header = match (&content.header, &content.state) {
        (Some(header), _) if header.id == id => header,
        (Some(header), _) => bail!("segment {id} is not there: its slot {slot} holds segment {}", header.id),
        (None, SlotState::Invalid(fault)) => bail!("slot {slot}, where segment {id} belongs: {fault}"),
        (None, _) => bail!("segment {id} is not there: its slot {slot} was never written"),
    };
    let report = report(log, slot, &content, header);
    if json {
        out.json(&report)?;
        return Ok(());
    }
    print(&report, out)
}

fn report(log: &Log, slot: Slot, content: &SlotContent, header: &SegmentHeader) -> Report {
    let entries = (0u8..).zip(&header.metablocks).map(|(index, entry)| Entry {
        block: entry.block.0,
        sector: entry.block.sector().0,
        dirty_bits: entry.dirty.0,
        data_offset_bytes: log.geometry().place_offset(Place { slot, index }),
    });
    Report {
        id: header.id.0,
        slot: slot.0,
        offset_bytes: log.geometry().slot_offset(slot),
        length_blocks: header.length(),
        checksum: header.checksum,
        valid: content.state.valid_id().is_some(),
        fault: match &content.state {
            SlotState::Invalid(fault) => Some(fault.to_string()),
            _ => None,
        },
        metablocks: entries.collect(),
    }
}

fn print(r: &Report, out: &mut Output) -> Result<()> {
    let verdict = match &r.fault {
        Some(fault) => format!("damaged: {fault}"),
        None => "valid".into(),
    };
    writeln!(out, "segment   {} ({verdict})", r.id)?;
    writeln!(out, "slot      {} (at byte {})", r.slot, r.offset_bytes)?;
    writeln!(out, "length    {}", count(u64::from(r.length_blocks), "block"))?;
    writeln!(out, "checksum  {:#010x}", r.checksum)?;
    if r.metablocks.is_empty() {
        return Ok(());
    }
    let mut table = table(["INDEX", "BLOCK", "SECTOR", "DIRTY SECTORS", "DATA AT BYTE"], &["DIRTY SECTORS"]);
    for (index, entry) in r.metablocks.iter().enumerate() {
        table.row([
            index.to_string(),
            entry.block.to_string(),
            entry.sector.to_string(),
            dirty_sectors(DirtyBits(entry.dirty_bits)),
            entry.data_offset_bytes.to_string(),
        ]);
    }
    writeln!(out, "\n{table}")?;
    Ok(())
}

/// Which sectors of a block are dirty, for people: "all", "none (clean)" or such as "0-2,5".
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
