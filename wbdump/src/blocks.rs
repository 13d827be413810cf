//! `wbdump blocks`: lists the blocks of live segments that are not written back.

use crate::log::Log;
use crate::segment::dirty_sectors;
use crate::version::StoredVersion;
use anyhow::{Context, Result};
use libwb::cli::{Output, table};
use libwb::format::{BlockNo, DirtyBits, Place};
use libwb::log::LogError;
use libwb::log::live::visit_headers;
use libwb::log::recovery::Recovery;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;

/// The newest live version of a dirty block.
pub(crate) struct Newest {
    id: u64,
    place: Place,
    dirty: DirtyBits,
    /// The number of live versions of the block, including this one.
    versions: u64,
}

/// The dirty blocks of a log.
pub(crate) struct DirtyBlocks {
    pub(crate) newest: BTreeMap<BlockNo, Newest>,
    /// Why the list may be incomplete, if it may.
    pub(crate) stopped: Option<LogError>,
}

impl DirtyBlocks {
    pub(crate) fn find(log: &Log, recovery: &Recovery) -> DirtyBlocks {
        let geometry = log.geometry();
        let mut newest: BTreeMap<BlockNo, Newest> = BTreeMap::new();
        let (live, cut_short) = (recovery.live(), recovery.cut_short());
        let visited =
            log.io.block_on(visit_headers(&log.device, geometry, live, cut_short, |header| {
                let slot = geometry.slot_of(header.id);
                for (entry, index) in header.metablocks.iter().zip(0..) {
                    if !entry.dirty.is_clean() {
                        let versions =
                            newest.get(&entry.block).map_or(1, |older| older.versions + 1);
                        let place = Place { slot, index };
                        newest.insert(
                            entry.block,
                            Newest { id: header.id.0, place, dirty: entry.dirty, versions },
                        );
                    }
                }
            }));
        DirtyBlocks { newest, stopped: visited.err() }
    }
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    stored: StoredVersion,
    versions: u64,
}

pub(crate) fn list(log: &Log, json: bool, out: &mut Output) -> Result<()> {
    let (_, recovery) = log.scan(|_, _| ());
    log.warn_of(&recovery);
    let DirtyBlocks { newest, stopped } = DirtyBlocks::find(log, &recovery);
    if json {
        for (block, newest) in &newest {
            out.json(&Row {
                stored: StoredVersion::new(
                    log.geometry(),
                    *block,
                    newest.id,
                    newest.place,
                    newest.dirty,
                ),
                versions: newest.versions,
            })?;
        }
    } else if newest.is_empty() {
        writeln!(out, "no dirty blocks")?;
    } else {
        let header = ["BLOCK", "SECTOR", "SEGMENT", "SLOT", "INDEX", "DIRTY SECTORS", "VERSIONS"];
        let mut table = table(header, &["DIRTY SECTORS"]);
        for (block, newest) in &newest {
            table.row([
                block.to_string(),
                block.sector().to_string(),
                newest.id.to_string(),
                newest.place.slot.to_string(),
                newest.place.index.to_string(),
                dirty_sectors(newest.dirty),
                newest.versions.to_string(),
            ]);
        }
        writeln!(out, "{table}")?;
    }
    stopped.map_or(Ok(()), |error| Err(error).context("the list stops here"))
}
