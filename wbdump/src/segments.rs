//! `wbdump segments`: one row for each slot, in log order.

use crate::Log;
use crate::superblock::MAX_TIME;
use anyhow::Result;
use libwb::cli::{Output, table};
use libwb::format::{Reason, SegmentExtension, SegmentHeader, SegmentId, Slot, to_u64};
use libwb::log::recovery::{Recovery, Standing};
use libwb::log::scan::SlotState;
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

/// What is said of a segment that is cut short.
pub(crate) const CUT_SHORT: &str = "up to its last flush; what came after is torn";

/// How much of a time in RFC 3339 tells the second: `2026-11-25T12:41:45`.
const SECONDS: usize = 19;

/// How wide a terminal is on which offsets are shown.
const WIDE: u16 = 100;

/// Which rows to show.
#[derive(Clone, Copy)]
pub(crate) struct Only {
    pub(crate) live: bool,
    pub(crate) bad: bool,
}

/// What a slot holds, in a word, with stable names for JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    Live,
    WrittenBack,
    Dropped,
    Damaged,
    Empty,
}

impl State {
    pub(crate) fn of(state: &SlotState, recovery: &Recovery) -> State {
        match state {
            SlotState::Empty => State::Empty,
            SlotState::Invalid { .. } => State::Damaged,
            SlotState::Valid { id, .. } => match recovery.standing(*id) {
                Standing::Live => State::Live,
                Standing::WrittenBack | Standing::Skipped => State::WrittenBack,
                Standing::Dropped => State::Dropped,
            },
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            State::Live => "live",
            State::WrittenBack => "written back",
            State::Dropped => "dropped",
            State::Damaged => "damaged",
            State::Empty => "empty",
        }
    }
}

#[derive(Serialize)]
struct Row {
    /// As the header says, where one can be read.
    id: Option<u64>,
    slot: u32,
    offset_bytes: u64,
    length_blocks: Option<u8>,
    dirty_blocks: Option<usize>,
    state: State,
    /// Why it was closed, and when, in RFC 3339; where the header says.
    closed: Option<String>,
    time: Option<String>,
    fault: Option<String>,
    /// It ends with its last flush; what was written of it after that is torn.
    cut_short: bool,
}

pub(crate) fn list(log: &Log, only: Only, json: bool, out: &mut Output) -> Result<()> {
    let mut headers = Vec::with_capacity(log.geometry().all_slots().len());
    let (slots, recovery) = log.scan(|_, content| headers.push(content.header.as_ref().map(Summary::of)));
    let mut rows: Vec<(SegmentId, Row)> = log
        .geometry()
        .all_slots()
        .zip(slots.iter().zip(headers))
        .map(|(slot, (state, header))| row(log, &recovery, slot, state, header))
        .collect();
    rows.retain(|(_, row)| {
        (!only.live || row.state == State::Live) && (!only.bad || row.state == State::Damaged)
    });
    rows.sort_by_key(|(order, row)| (*order, row.slot));
    print(rows.iter().map(|(_, row)| row), json, out)
}

/// What is kept of a header while the device is read.
pub(crate) struct Summary {
    id: SegmentId,
    length: u8,
    pub(crate) dirty: usize,
    extension: Option<SegmentExtension>,
}

impl Summary {
    pub(crate) fn of(header: &SegmentHeader) -> Summary {
        let dirty = header.metablocks.iter().filter(|entry| !entry.dirty.is_clean()).count();
        Summary { id: header.id, length: header.length(), dirty, extension: header.extension }
    }

    pub(crate) fn time(&self) -> Option<String> {
        let time = self.extension?.time;
        // What stands in for a lost segment has none.
        let since = Duration::from_millis((time > 0).then_some(time)?.min(MAX_TIME * 1000));
        Some(humantime::format_rfc3339_millis(UNIX_EPOCH + since).to_string())
    }

    pub(crate) fn closed(&self) -> Option<String> {
        Some(match self.extension?.reason {
            Reason::Full => "full".into(),
            Reason::Flush => "flush".into(),
            Reason::Idle => "idle".into(),
            Reason::Close => "close".into(),
            Reason::Salvage => "salvage".into(),
            Reason::Open => "open".into(),
            Reason::Other(code) => format!("code {code}"),
        })
    }
}

/// Where a slot belongs in the log: a damaged one goes where the segment that is missing there would go, and an empty one
/// last.
pub(crate) fn order(recovery: &Recovery, slot: Slot, state: &SlotState) -> SegmentId {
    match state {
        SlotState::Valid { id, .. } => *id,
        SlotState::Empty => SegmentId::MAX,
        SlotState::Invalid { .. } => recovery
            .damage
            .binary_search_by_key(&slot, |damage| damage.slot)
            .map_or(SegmentId::MAX, |at| recovery.damage[at].expected),
    }
}

/// A row and where it belongs in the log.
fn row(
    log: &Log,
    recovery: &Recovery,
    slot: Slot,
    state: &SlotState,
    header: Option<Summary>,
) -> (SegmentId, Row) {
    let row = Row {
        id: header.as_ref().map(|header| header.id.0),
        slot: slot.0,
        offset_bytes: log.geometry().slot_offset(slot),
        length_blocks: header.as_ref().map(|header| header.length),
        dirty_blocks: header.as_ref().map(|header| header.dirty),
        state: State::of(state, recovery),
        closed: header.as_ref().and_then(Summary::closed),
        time: header.as_ref().and_then(Summary::time),
        fault: match state {
            SlotState::Invalid { fault, .. } => Some(fault.to_string()),
            _ => None,
        },
        cut_short: matches!(state, SlotState::Valid { cut_short: true, .. }),
    };
    (order(recovery, slot, state), row)
}

fn print<'a>(rows: impl Iterator<Item = &'a Row>, json: bool, out: &mut Output) -> Result<()> {
    if json {
        for row in rows {
            out.json(row)?;
        }
        return Ok(());
    }
    // What the slot tells as well is left out where a row would not fit on a line.
    let is_narrow = out.columns().is_some_and(|columns| columns < WIDE);
    let words = &["CLOSED", "STATE"];
    let mut table = if is_narrow {
        table(["ID", "SLOT", "BLOCKS", "DIRTY", "CLOSED", "TIME", "STATE"], words)
    } else {
        table(["ID", "SLOT", "AT BYTE", "BLOCKS", "DIRTY", "CLOSED", "TIME", "STATE"], words)
    };
    for row in rows {
        let state = match &row.fault {
            Some(fault) => format!("{}: {fault}", row.state.name()),
            None if row.cut_short => format!("{}, {CUT_SHORT}", row.state.name()),
            None => row.state.name().to_string(),
        };
        let [id, length, dirty] =
            [row.id, row.length_blocks.map(u64::from), row.dirty_blocks.map(to_u64)].map(or_dash);
        let closed = row.closed.clone().unwrap_or_else(|| "-".into());
        // Whole seconds, or a row is too wide for 80 columns.
        let time = row.time.as_deref().map_or("-".into(), |time| format!("{}Z", &time[..SECONDS]));
        let (slot, offset) = (row.slot.to_string(), row.offset_bytes.to_string());
        if is_narrow {
            table.row([id, slot, length, dirty, closed, time, state]);
        } else {
            table.row([id, slot, offset, length, dirty, closed, time, state]);
        }
    }
    writeln!(out, "{table}")?;
    Ok(())
}

fn or_dash(n: Option<u64>) -> String {
    n.map_or_else(|| "-".into(), |n| n.to_string())
}
