//! `wbdump segments`: shows one row for each slot that holds anything, in log order.

use crate::log::Log;
use anyhow::Result;
use libwb::cli::{LAST_SECOND, Output, count, table};
use libwb::format::{Reason, SegmentExtension, SegmentHeader, SegmentId, Slot, to_u64, to_usize};
use libwb::log::recovery::{Recovery, Standing};
use libwb::log::scan::{SlotContent, SlotState};
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, UNIX_EPOCH};

/// The remark about a segment that is cut short.
pub(crate) const CUT_SHORT: &str = "up to its last flush; what came after is torn";

/// The length of a time in RFC 3339 up to its seconds: `2026-11-25T12:41:45`.
const SECONDS: usize = 19;

/// The width from which a terminal shows offsets.
const WIDE: u16 = 100;

/// Which rows to show.
#[derive(Clone, Copy)]
pub(crate) struct Only {
    pub(crate) live: bool,
    pub(crate) bad: bool,
}

/// The state of a slot, with stable names for JSON.
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
    /// From the header, if that is readable.
    id: Option<u64>,
    slot: u32,
    offset_bytes: u64,
    length_blocks: Option<u8>,
    dirty_blocks: Option<usize>,
    state: State,
    /// Why it was closed, and when, in RFC 3339, if the header tells.
    closed: Option<String>,
    time: Option<String>,
    fault: Option<String>,
    /// It ends with its last flush; everything after that is torn.
    cut_short: bool,
}

pub(crate) fn list(log: &Log, only: Only, json: bool, out: &mut Output) -> Result<()> {
    let listing = Listing::of(log);
    let shown = listing.in_order(only);
    let empty = listing.empty().filter(|_| !only.live && !only.bad);
    if json {
        for slot in shown.into_iter().chain(empty) {
            out.json(&listing.row(slot))?;
        }
        return Ok(());
    }
    print(shown.into_iter().map(|slot| listing.row(slot)), out)?;
    match empty.count() {
        0 => Ok(()),
        n => Ok(writeln!(out, "{}", count(to_u64(n), "empty slot"))?),
    }
}

/// The source of a listing. It makes a row only when it shows it: most slots of a large cache may
/// be empty, and those must take no memory.
struct Listing<'a> {
    log: &'a Log,
    slots: Vec<SlotState>,
    recovery: Recovery,
    headers: Summaries,
}

impl Listing<'_> {
    fn of(log: &Log) -> Listing<'_> {
        let mut headers = Summaries::default();
        let (slots, recovery) = log.scan(|slot, content| headers.visit(slot, content));
        Listing { log, slots, recovery, headers }
    }

    fn all(&self) -> impl Iterator<Item = (Slot, &SlotState)> {
        self.log.geometry().all_slots().zip(&self.slots)
    }

    /// The slots that hold anything, in log order.
    fn in_order(&self, only: Only) -> Vec<Slot> {
        let wanted = |state: &SlotState| match State::of(state, &self.recovery) {
            State::Empty => false,
            state => (!only.live || state == State::Live) && (!only.bad || state == State::Damaged),
        };
        let wanted = self.all().filter(|(_, state)| wanted(state));
        let mut slots: Vec<_> =
            wanted.map(|(slot, state)| (order(&self.recovery, slot, state), slot)).collect();
        slots.sort_unstable();
        slots.into_iter().map(|(_, slot)| slot).collect()
    }

    fn empty(&self) -> impl Iterator<Item = Slot> {
        self.all().filter(|(_, state)| matches!(state, SlotState::Empty)).map(|(slot, _)| slot)
    }

    fn row(&self, slot: Slot) -> Row {
        let (state, header) = (&self.slots[to_usize(u64::from(slot.0))], self.headers.get(slot));
        Row {
            id: header.map(|header| header.id.0),
            slot: slot.0,
            offset_bytes: self.log.geometry().slot_offset(slot),
            length_blocks: header.map(|header| header.length),
            dirty_blocks: header.map(|header| header.dirty),
            state: State::of(state, &self.recovery),
            closed: header.and_then(Summary::closed),
            time: header.and_then(Summary::time),
            fault: match state {
                SlotState::Invalid { fault, .. } => Some(fault.to_string()),
                _ => None,
            },
            cut_short: matches!(state, SlotState::Valid { cut_short: true, .. }),
        }
    }
}

/// What the scan keeps of the headers. A slot without a header takes no memory.
#[derive(Default)]
pub(crate) struct Summaries(Vec<(Slot, Summary)>);

impl Summaries {
    /// Takes in a slot. Slots must come in ascending order.
    pub(crate) fn visit(&mut self, slot: Slot, content: &SlotContent) {
        self.0.extend(content.header.as_ref().map(|header| (slot, Summary::of(header))));
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Summary> {
        let at = self.0.binary_search_by_key(&slot, |(slot, _)| *slot).ok()?;
        Some(&self.0[at].1)
    }
}

/// What the scan keeps of one header.
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
        // A substitute for a lost segment has no time.
        let since = Duration::from_millis((time > 0).then_some(time)?.min(LAST_SECOND * 1000));
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

/// The place of a slot in log order. A damaged slot takes the place of the segment that belongs
/// there, and an empty one comes last.
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

fn print(rows: impl Iterator<Item = Row>, out: &mut Output) -> Result<()> {
    // On a narrow terminal, the offset is left out: the slot number implies it.
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
        // With fractions of a second, a row would be too wide for 80 columns.
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
