//! A cache device to show, and how it is read.

use anyhow::Result;
use libwb::cli::{self, Io, Progress};
use libwb::device::Device;
use libwb::device::probe::{Access, OpenError};
use libwb::format::{Geometry, SEGMENT_BYTES, Slot, to_usize};
use libwb::log::Use;
use libwb::log::recovery::{Recovery, explained, recover};
use libwb::log::scan::{SlotContent, SlotState, read_slot, scan, scan_trusting};
use libwb::log::superblock::{RawSuperblock, examine_damaged_superblock};
use std::path::Path;

/// An open cache device.
pub(crate) struct Log {
    pub(crate) io: Io,
    pub(crate) device: Device,
    pub(crate) superblock: RawSuperblock,
}

impl Log {
    pub(crate) fn open(path: &Path) -> Result<Log> {
        let io = Io::start()?;
        let device = match io.open(path, Access::Read) {
            Err(OpenError::InUse { .. }) => {
                cli::complain(
                    "wbdump",
                    format_args!("warning: {} is in use and may change meanwhile", path.display()),
                );
                io.open(path, Access::ReadUnlocked)?
            }
            other => other?,
        };
        let (superblock, [no_magic, no_record]) =
            io.block_on(examine_damaged_superblock(&device))?;
        for (unread, wrong) in
            [(no_magic, superblock.magic.err()), (no_record, superblock.record.err())]
        {
            match (unread, wrong) {
                (Some(error), _) => cli::complain("wbdump", format_args!("warning: {error}")),
                (None, Some(fault)) => {
                    cli::complain("wbdump", format_args!("warning: {}: {fault}", path.display()));
                }
                (None, None) => {}
            }
        }
        if let Err(error) = superblock.check_extension(&device, Use::Read) {
            cli::complain("wbdump", format_args!("warning: {error}"));
        }
        let torn = if superblock.has_torn_copy() { ", torn by a power cut" } else { "" };
        for fault in superblock.pages.iter().filter_map(|page| page.as_ref().err()) {
            if superblock.extension().is_some() {
                let which = format_args!("{}: one copy of two{torn}", path.display());
                cli::complain("wbdump", format_args!("warning: {which}: {fault}"));
            }
        }
        Ok(Log { io, device, superblock })
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.superblock.geometry
    }

    /// Reads every slot.
    pub(crate) fn scan(
        &self,
        mut visit: impl FnMut(Slot, &SlotContent),
    ) -> (Vec<SlotState>, Recovery) {
        let mut progress = Progress::new("reading", self.geometry().lap(), SEGMENT_BYTES);
        let slots = self.io.block_on(scan(&self.device, self.geometry(), |slot, content| {
            progress.set(u64::from(slot.0));
            visit(slot, content);
        }));
        let superblock = self.superblock.or_no_record();
        // A slot is shown as recovery sees it.
        let slots = explained(&superblock, &slots).into_owned();
        let recovery = recover(&superblock, &slots);
        (slots, recovery)
    }

    /// Reads one slot whole, and the others as attaching reads them. Returns the slot's contents,
    /// and the verdict on it in view of the others.
    pub(crate) fn examine(&self, slot: Slot) -> (SlotContent, SlotState, Recovery) {
        let mut progress = Progress::new("reading", self.geometry().lap(), SEGMENT_BYTES);
        let visit = |slot: Slot, _: &SlotContent| progress.set(u64::from(slot.0));
        let superblock = self.superblock.or_no_record();
        let mut slots = self.io.block_on(scan_trusting(&self.device, &superblock, visit));
        let content = self.io.block_on(read_slot(&self.device, self.geometry(), slot));
        let place = to_usize(u64::from(slot.0));
        slots[place] = content.state.clone();
        let recovery = recover(&superblock, &slots);
        (content, explained(&superblock, &slots)[place].clone(), recovery)
    }

    /// Warns that the output stops where the log is corrupt.
    pub(crate) fn warn_of(&self, recovery: &Recovery) {
        for corruption in &recovery.corruption {
            let point = recovery.point;
            cli::complain(
                "wbdump",
                format_args!(
                    "warning: {corruption}; the log is shown up to segment {point}, see wbcheck"
                ),
            );
        }
    }
}
