//! `wbdump block`: shows every version of one block.

use crate::log::Log;
use crate::segment::dirty_sectors;
use crate::segments::State;
use crate::version::StoredVersion;
use anyhow::{Context, Result};
use libwb::cli::{Output, Table, table};
use libwb::format::{BLOCK_BYTES, BlockNo, to_usize};
use libwb::log::history::{History, Version, read_version};
use libwb::log::recovery::Recovery;
use libwb::log::scan::SlotState;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write;

/// The versions of a block, oldest first.
pub(crate) struct Versions<'a> {
    log: &'a Log,
    block: BlockNo,
    found: Vec<(Version, State)>,
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    stored: StoredVersion,
    state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_hex: Option<String>,
}

impl Versions<'_> {
    pub(crate) fn find(log: &Log, block: BlockNo) -> Versions<'_> {
        let mut history = History::of(block);
        let (slots, recovery) = log.scan(|slot, content| history.visit(slot, content));
        let found = history
            .into_versions()
            .into_iter()
            .map(|v| (v, state(&v, &slots, &recovery)))
            .collect();
        Versions { log, block, found }
    }

    /// The bytes of the newest version that recovery does not drop.
    pub(crate) fn write_newest(&self, out: &mut Output) -> Result<()> {
        let kept = |state: State| matches!(state, State::Live | State::WrittenBack);
        let newest = self.found.iter().rev().find(|(_, state)| kept(*state));
        let (version, _) =
            newest.with_context(|| format!("{}: {}", self.log.device.name(), self.none()))?;
        out.write_all(&self.read(version)?)?;
        Ok(())
    }

    fn none(&self) -> String {
        format!("the log holds no version of block {}", self.block)
    }

    fn read(&self, version: &Version) -> Result<impl std::ops::Deref<Target = [u8]> + use<>> {
        Ok(self.log.io.block_on(read_version(&self.log.device, self.log.geometry(), version))?)
    }

    pub(crate) fn list(&self, data: bool, json: bool, out: &mut Output) -> Result<()> {
        if json {
            return self.list_json(data, out);
        }
        if self.found.is_empty() {
            writeln!(out, "{}", self.none())?;
            return Ok(());
        }
        if !data {
            writeln!(out, "{}", self.rows(&self.found))?;
            return Ok(());
        }
        for version in &self.found {
            writeln!(out, "{}", self.rows(std::slice::from_ref(version)))?;
            hex_dump(&self.read(&version.0)?, out)?;
            writeln!(out)?;
        }
        Ok(())
    }

    fn rows(&self, versions: &[(Version, State)]) -> Table {
        let mut table = table(
            ["SEGMENT", "SLOT", "INDEX", "DATA AT BYTE", "DIRTY SECTORS", "STATE"],
            &["DIRTY SECTORS", "STATE"],
        );
        for (version, state) in versions {
            table.row([
                version.id.to_string(),
                version.place.slot.to_string(),
                version.place.index.to_string(),
                self.log.geometry().place_offset(version.place).to_string(),
                dirty_sectors(version.dirty),
                state.name().to_string(),
            ]);
        }
        table
    }

    fn list_json(&self, data: bool, out: &mut Output) -> Result<()> {
        for (version, state) in &self.found {
            let row = Row {
                stored: StoredVersion::new(
                    self.log.geometry(),
                    self.block,
                    version.id.0,
                    version.place,
                    version.dirty,
                ),
                state: *state,
                data_hex: if data { Some(hex(&self.read(version)?)) } else { None },
            };
            out.json(&row)?;
        }
        Ok(())
    }
}

fn state(version: &Version, slots: &[SlotState], recovery: &Recovery) -> State {
    State::of(&slots[to_usize(u64::from(version.place.slot.0))], recovery)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Prints sixteen bytes per line, in hexadecimal and as text. One "*" replaces lines that repeat
/// the previous one.
fn hex_dump(bytes: &[u8], out: &mut Output) -> Result<()> {
    const LINE: usize = 16;
    let mut above: Option<&[u8]> = None;
    let mut repeats = false;
    for (at, line) in (0..).step_by(LINE).zip(bytes.chunks(LINE)) {
        if above == Some(line) {
            if !std::mem::replace(&mut repeats, true) {
                writeln!(out, "*")?;
            }
            continue;
        }
        (above, repeats) = (Some(line), false);
        let numbers: Vec<String> = line.chunks(2).map(hex).collect();
        let text: String = line
            .iter()
            .map(|&b| if b.is_ascii_graphic() || b == b' ' { char::from(b) } else { '.' })
            .collect();
        writeln!(out, "{at:04x}  {:<39}  {text}", numbers.join(" "))?;
    }
    writeln!(out, "{BLOCK_BYTES:04x}")?;
    Ok(())
}
