//! Going on with a corrupt log, and repairing one that is not.
//!
//! Both work on the cache device alone and end with a log that recovery accepts as it is. A way on
//! gives something up, so it is taken only when it is asked for by name; a repair gives up nothing.
//! A slot that must change becomes an empty segment (length 0, which the kernel module takes as
//! well) with the id that belongs there, holds what is left of that segment, or is erased where the
//! log has not reached.
//!
//! The order of the writes makes an interruption harmless: until the last of them the log is
//! refused as before, and a second attempt finds the same; or recovery already makes of it what it
//! would make of it in the end. First comes a page of the superblock extension that tells the log
//! from an older copy of it; then the record of what is written back, since it follows from
//! segments that may go. When the log is sound, and what it covers is durable, those segments go
//! that would mislead the kernel module. The clean mark comes last.

mod draft;
mod remains;
#[cfg(test)]
mod tests;
mod words;

pub use words::{Summary, number_of_ways, segments, ways_on};

use super::create::{close_segment, write_extension, write_filler, write_record};
use super::handover::{Emptied, emptied, segments_to_empty};
use super::live::{totals, visit_headers};
use super::reach::Reach;
use super::recovery::{Corruption, Recovery, explained, proved, recover, slot_index, valid};
use super::scan::{
    BackingFacts, RawSuperblock, SlotFault, SlotState, check_pairing, examine_superblock,
    read_slot_header, scan,
};
use super::{LogError, Use};
use crate::device::{Device, DeviceError, Operation, all};
use crate::format::{
    BLOCK_BYTES, BlockNo, Geometry, Record, SegmentId, Slot, SuperblockExtension, fitting, to_u64,
    uuid_of_digest,
};
use draft::{Change, Doomed, Draft, Found};
use futures_util::{StreamExt, stream};
use nix::errno::Errno;
use remains::Remains;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// Slots that are rewritten at the same time.
const WRITE_DEPTH: usize = 32;

/// How to go on with a corrupt log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Keep every valid segment. The blocks of one that is lost fall back to older versions, so the
    /// volume may be in a state in which it never was.
    Skip,
    /// Go back to the last consistent point. Valid segments after it are given up, and the volume
    /// is in a state in which it has been.
    Stop,
}

impl Way {
    /// Both.
    pub const ALL: [Way; 2] = [Way::Skip, Way::Stop];
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Way, String> {
        let way = Way::ALL.into_iter().find(|way| way.to_string() == text);
        way.ok_or_else(|| "must be skip or stop".into())
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Skip => "skip",
            Way::Stop => "stop",
        })
    }
}

/// A segment that is given up, whole or in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenUp {
    /// Where it lies, or ought to.
    pub slot: Slot,
    /// Which it is; [`SegmentId::NONE`] where that cannot be told.
    pub id: SegmentId,
    /// The dirty blocks that are given up.
    pub blocks: Vec<BlockNo>,
    /// How well they are known.
    pub certainty: Certainty,
    /// How many of its dirty blocks are kept.
    pub kept: u64,
}

/// How well it is known what a segment held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// Its header is sound.
    Sure,
    /// Its header can be read, but may be wrong.
    Perhaps,
    /// Not at all.
    Unknown,
}

/// A device whose log was read, sound or not.
#[derive(Clone, Debug)]
pub struct Scanned {
    /// What the superblock region says.
    pub superblock: RawSuperblock,
    /// One verdict for each slot.
    pub slots: Vec<SlotState>,
}

impl Scanned {
    /// Reads the whole log of a device, and shows each slot's number to `progress`.
    ///
    /// # Errors
    /// When the device cannot be read, or is no cache device that this version may use.
    pub async fn read(
        device: &Device,
        wanted: Use,
        mut progress: impl FnMut(Slot),
    ) -> Result<Scanned, LogError> {
        let superblock = examine_superblock(device).await?;
        let fault = |fault| LogError::Superblock { device: device.name().to_string(), fault };
        superblock.magic.map_err(fault)?;
        superblock.check_extension(device, wanted)?;
        let slots = scan(device, superblock.geometry, |slot, _| progress(slot)).await;
        Ok(Scanned::of(superblock, &slots))
    }

    /// The verdicts of a scan, seen together.
    pub fn of(superblock: RawSuperblock, slots: &[SlotState]) -> Scanned {
        let slots = explained(&superblock.or_no_record(), slots).into_owned();
        Scanned { superblock, slots }
    }

    /// What recovery makes of it.
    pub fn recovery(&self) -> Recovery {
        recover(&self.superblock.or_no_record(), &self.slots)
    }

    /// Whether recovery refuses it.
    pub fn is_corrupt(&self) -> bool {
        self.superblock.record.is_err() || !self.recovery().corruption.is_empty()
    }

    /// Whether most of what the device holds is sound but lies where it cannot have been written on
    /// a device of this size. In a few slots alone, a damaged id looks the same.
    pub fn is_resized(&self) -> bool {
        let misplaced = |slot: &&SlotState| {
            matches!(
                slot,
                SlotState::Invalid { fault: SlotFault::WrongSlot { sound: true, .. }, .. }
            )
        };
        let misplaced = self.slots.iter().filter(misplaced).count();
        let all = self.slots.iter().filter(|slot| !matches!(slot, SlotState::Empty)).count();
        misplaced > 1 && misplaced * 2 > all
    }

    /// Plans a way on with a corrupt log. `None` when it is not corrupt.
    ///
    /// # Errors
    /// When the device fails, or there is no way on.
    pub async fn salvage(&self, device: &Device, way: Way) -> Result<Option<Plan>, LogError> {
        if !self.is_corrupt() {
            return Ok(None);
        }
        if self.is_resized() {
            return Err(LogError::Misplaced { device: device.name().to_string() });
        }
        let superblock = self.with_extension(device.size());
        let draft = Draft::new(&superblock, &self.slots, Some(way));
        let draft =
            draft.ok_or_else(|| LogError::Unsalvageable { device: device.name().to_string() })?;
        let mut plan = Plan::of(self, superblock, Some(way), draft);
        plan.given_up = plan.look(device).await?;
        plan.misleading = self.misleading(device, &plan.draft).await;
        Ok(Some(plan))
    }

    /// Plans all ways on that there are with a corrupt log; none when it is not corrupt. Where
    /// nothing of the log is given up, the two are one.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn ways(&self, device: &Device) -> Result<Vec<Plan>, LogError> {
        let mut ways: Vec<Plan> = Vec::new();
        for way in Way::ALL {
            match self.salvage(device, way).await {
                Ok(plan) => ways.extend(plan),
                Err(LogError::Misplaced { .. } | LogError::Unsalvageable { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if self.lost_nothing_but_the_pairing() {
            ways.truncate(1);
        }
        Ok(ways)
    }

    /// Plans the repair of a log that is not corrupt, or only in that its superblock extension is
    /// lost. Afterwards the kernel module reads the same as we do. `None` when there is nothing to
    /// repair.
    ///
    /// # Errors
    /// When the log is corrupt, or there is no repair that recovery would accept.
    pub async fn repair(&self, device: &Device) -> Result<Option<Plan>, LogError> {
        let name = || device.name().to_string();
        if let Err(fault) = self.superblock.record {
            return Err(LogError::Superblock { device: name(), fault });
        }
        let superblock = self.with_extension(device.size());
        let recovery = recover(&superblock.or_no_record(), &self.slots).refuse_corrupt(device)?;
        let draft = Draft::new(&superblock, &self.slots, None);
        let draft = draft.ok_or_else(|| LogError::Unsalvageable { device: name() })?;
        let mut plan = Plan::of(self, superblock, None, draft);
        plan.misleading = self.misleading(device, &plan.draft).await;
        let is_sound =
            plan.draft.is_empty() && recovery.skipped.is_empty() && plan.pages.is_empty();
        Ok((!is_sound || !plan.misleading.is_empty()).then_some(plan))
    }

    /// The written-back segments that would mislead the kernel module once all else is written.
    async fn misleading(&self, device: &Device, draft: &Draft) -> Vec<SegmentId> {
        let (geometry, superblock) = (self.superblock.geometry, self.superblock.or_no_record());
        let rewritten: HashSet<Slot> = draft.all_changes().map(|change| change.slot).collect();
        let is_rewritten = |id| rewritten.contains(&geometry.slot_of(id));
        let stands = |id| {
            let found = valid(&self.slots[slot_index(geometry.slot_of(id))], &superblock);
            found.is_some_and(|(found, _)| found == id)
        };
        let up_to = [draft.written_back, draft.point];
        let is_damaged = |id| is_rewritten(id) || !stands(id);
        let mut misleading = segments_to_empty(device, geometry, up_to, is_damaged).await;
        misleading.retain(|&id| !is_rewritten(id));
        misleading
    }

    /// Whether the log is sound, but for a superblock extension that is lost.
    pub fn lost_nothing_but_the_pairing(&self) -> bool {
        self.superblock.record.is_ok() && self.recovery().corruption == [Corruption::PairingLost]
    }

    /// What the superblock region says; with an extension made up that the segments belong to,
    /// where it is lost.
    fn with_extension(&self, cache_bytes: u64) -> RawSuperblock {
        let mut superblock = self.superblock.clone();
        let known = superblock.or_no_record();
        if !recover(&known, &self.slots).corruption.contains(&Corruption::PairingLost) {
            return superblock;
        }
        let headers = self.slots.iter().filter_map(|state| proved(state, &known));
        let newest = headers.max_by_key(|(id, _)| *id).map(|(_, extension)| extension.digest);
        let digest = newest.or(superblock.record_digest);
        let uuid = digest.map_or_else(Uuid::new_v4, uuid_of_digest);
        let page = SuperblockExtension::new(uuid, cache_bytes);
        superblock.pages = [Ok(page.clone()), Ok(page)];
        superblock
    }
}

/// What is to be written to a cache device, and what is given up by that.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The way on; none for a repair.
    pub way: Option<Way>,
    /// Where the log is to end.
    pub point: SegmentId,
    /// What is given up, in the order of the log.
    pub given_up: Vec<GivenUp>,
    /// What the superblock record says although the log does not bear it out. It is not believed.
    pub disbelieved: Option<SegmentId>,
    /// Segments that are written back and sound, and are emptied, or the kernel module would take
    /// old data from them for new.
    pub misleading: Vec<SegmentId>,
    geometry: Geometry,
    extension: Option<SuperblockExtension>,
    draft: Draft,
    /// The superblock record, where it must change.
    record: Option<Record>,
    /// The page of the superblock extension that tells the log from an older copy, which may be
    /// longer. It must be there before anything is given up.
    newer: Option<SuperblockExtension>,
    /// Pages of the superblock extension that must be written in the end.
    pages: Vec<SuperblockExtension>,
    /// What is wrong with the copy that is written, where something is.
    bad_copy: Option<&'static str>,
    /// The superblock extension was lost, and the pages are new ones.
    pairs_anew: bool,
}

impl Plan {
    /// `superblock` has an extension that is made up, if it was lost.
    fn of(scanned: &Scanned, superblock: RawSuperblock, way: Option<Way>, draft: Draft) -> Plan {
        let extension = superblock.extension().cloned();
        let bad_copy = match (superblock.has_damaged_copy(), superblock.has_torn_copy()) {
            (true, _) => Some("damaged"),
            (false, true) => Some("torn"),
            (false, false) => None,
        };
        let pairs_anew = extension.is_some() && scanned.superblock.extension().is_none();
        let newer = extension
            .as_ref()
            .filter(|_| way.is_some() && !pairs_anew)
            .map(SuperblockExtension::next);
        let page = |page: &SuperblockExtension| SuperblockExtension {
            clean: page.clean.filter(|_| !draft.unmark),
            ..page.next()
        };
        let needed = draft.unmark || pairs_anew || newer.is_none() && bad_copy.is_some();
        let newest = newer.as_ref().or(extension.as_ref());
        let mut pages: Vec<_> = newest.filter(|_| needed).map(page).into_iter().collect();
        if pairs_anew {
            pages.extend(pages.first().map(SuperblockExtension::next));
        }
        let digest = extension.as_ref().map(SuperblockExtension::digest);
        Plan {
            way,
            point: draft.point,
            given_up: Vec::new(),
            disbelieved: draft.disbelieved,
            geometry: superblock.geometry,
            record: Some(draft.written_back)
                .filter(|&id| superblock.record != Ok(id))
                .map(|id| Record { id, digest }),
            misleading: Vec::new(),
            extension,
            draft,
            newer,
            pages,
            bad_copy,
            pairs_anew,
        }
    }

    /// Refuses an older copy of a cache. What is written back tells, for a salvage may give up what
    /// is not.
    ///
    /// # Errors
    /// [`LogError::Older`].
    pub fn refuse_older(&self, device: &Device, known: Reach) -> Result<(), LogError> {
        let found = Reach { durable: self.point, written_back: self.draft.written_back };
        known.shortened().refuse_older(device, found)
    }

    /// If the cache has lost to which backing device it belongs, it is to be this one.
    pub fn pair(&mut self, backing: &BackingFacts<'_>) {
        for page in self.pages.iter_mut().filter(|_| self.pairs_anew) {
            page.backing_sectors = backing.sectors;
            page.backing_id = fitting(backing.identity).into();
        }
    }

    /// Whether what is kept belongs to a backing device and fits on it.
    ///
    /// # Errors
    /// When not, or the cache device fails.
    pub async fn check_backing(
        &self,
        device: &Device,
        backing: &BackingFacts<'_>,
    ) -> Result<(), LogError> {
        if let Some(extension) = &self.extension {
            check_pairing(device, extension, backing)?;
        }
        let sectors = Some(backing.sectors);
        let held =
            totals(device, self.geometry, self.kept(), self.draft.cut_short, sectors).await?;
        held.beyond.first().map_or(Ok(()), |beyond| Err(beyond.refuse(device, backing)))
    }

    /// The live segments that stay as they are.
    fn kept(&self) -> impl Iterator<Item = SegmentId> {
        let changed: HashSet<Slot> = self.draft.all_changes().map(|change| change.slot).collect();
        let first = self.draft.written_back.max(self.point.minus(self.geometry.lap())).next();
        let geometry = self.geometry;
        (first.0..=self.point.0)
            .map(SegmentId)
            .filter(move |&id| !changed.contains(&geometry.slot_of(id)))
    }

    /// Carries it out. It is durable afterwards. Can be interrupted at any time, planned again, and
    /// carried out.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn apply(&self, device: &Device) -> Result<(), DeviceError> {
        // A daemon that was killed may have left segments in the device's volatile cache.
        device.flush().await?;
        if let Some(page) = &self.newer {
            write_extension(device, page).await?;
            device.flush().await?;
        }
        if let Some(record) = self.record {
            write_record(device, record).await?;
            device.flush().await?;
        }
        for changes in [&self.draft.changes[..], self.draft.decisive.as_slice(), &self.draft.later]
        {
            let writes = changes.iter().map(|change| self.change(device, *change));
            all(stream::iter(writes).buffer_unordered(WRITE_DEPTH)).await?;
            device.flush().await?;
        }
        if let Some(id) = self.draft.cut_short {
            close_segment(device, self.geometry, id).await?;
            device.flush().await?;
        }
        if !self.misleading.is_empty() {
            let emptied = self.misleading.iter().map(|&id| self.empty(device, id));
            all(stream::iter(emptied).buffer_unordered(WRITE_DEPTH)).await?;
            device.flush().await?;
        }
        for page in &self.pages {
            write_extension(device, page).await?;
            device.flush().await?;
        }
        Ok(())
    }

    async fn empty(&self, device: &Device, id: SegmentId) -> Result<(), DeviceError> {
        let known = [id, self.draft.point];
        let Emptied { block, .. } =
            emptied(device, self.geometry, known, self.extension.as_ref()).await?;
        device.write(self.geometry.slot_offset(self.geometry.slot_of(id)), block.into()).await
    }

    async fn change(&self, device: &Device, change: Change) -> Result<(), DeviceError> {
        let Change { slot, id, live } = change;
        if live {
            let remains = self.remains(device, id).await;
            let planned = self
                .given_up
                .iter()
                .find(|given_up| given_up.id == id)
                .map_or(0, |given_up| given_up.kept);
            if remains.as_ref().map_or(0, Remains::kept) < planned {
                return Err(read_less(device, self.geometry.slot_offset(slot)));
            }
            if let Some(remains) = remains {
                return remains.write(device, self.geometry).await;
            }
        }
        write_filler(device, self.geometry, slot, (id, self.draft.durable), self.extension.as_ref())
            .await
    }

    async fn remains(&self, device: &Device, id: SegmentId) -> Option<Remains> {
        let digest = self.extension.as_ref().map(SuperblockExtension::digest);
        Remains::find(device, self.geometry, id, digest).await
    }

    /// Looks what is given up. Of the blocks of lost segments, those do not count that a later
    /// segment holds, too: that carries every sector that is not written back.
    async fn look(&self, device: &Device) -> Result<Vec<GivenUp>, LogError> {
        let mut given_up = Vec::with_capacity(self.draft.doomed.len());
        for doomed in &self.draft.doomed {
            given_up.push(self.look_at(device, doomed).await);
        }
        let mut newest: HashMap<BlockNo, SegmentId> = HashMap::new();
        for lost in &given_up {
            newest.extend(lost.blocks.iter().map(|&block| (block, SegmentId::NONE)));
        }
        if !newest.is_empty() {
            visit_headers(device, self.geometry, self.kept(), self.draft.cut_short, |header| {
                for entry in header.metablocks.iter().filter(|entry| !entry.dirty.is_clean()) {
                    if let Some(id) = newest.get_mut(&entry.block) {
                        *id = header.id;
                    }
                }
            })
            .await?;
        }
        for lost in given_up.iter_mut().filter(|lost| lost.id != SegmentId::NONE) {
            lost.blocks.retain(|block| newest.get(block).is_none_or(|&id| id < lost.id));
        }
        Ok(given_up)
    }

    async fn look_at(&self, device: &Device, doomed: &Doomed) -> GivenUp {
        let &Doomed { slot, id, found } = doomed;
        let none = GivenUp { slot, id, blocks: Vec::new(), certainty: Certainty::Unknown, kept: 0 };
        if found == Found::Nothing {
            return none;
        }
        let stays = self.draft.all_changes().any(|change| change.slot == slot && change.live);
        if stays && let Some(remains) = self.remains(device, id).await {
            return GivenUp {
                blocks: remains.lost(),
                certainty: Certainty::Sure,
                kept: remains.kept(),
                ..none
            };
        }
        let Some(header) = read_slot_header(device, self.geometry, slot).await.header else {
            return none;
        };
        let proved = found == Found::Sound || header.extension.is_some() && header.id == id;
        let dirty = header.metablocks.iter().filter(|entry| !entry.dirty.is_clean());
        let mut blocks: Vec<_> = dirty.map(|entry| entry.block).collect();
        blocks.sort_unstable();
        blocks.dedup();
        GivenUp {
            blocks,
            certainty: if proved { Certainty::Sure } else { Certainty::Perhaps },
            ..none
        }
    }
}

/// A device that gives less now than when the plan was made. Nothing is given up that the plan does
/// not name.
fn read_less(device: &Device, offset: u64) -> DeviceError {
    let device = device.name().clone();
    DeviceError {
        device,
        operation: Operation::Read,
        offset,
        length: to_u64(BLOCK_BYTES),
        cause: Errno::EIO,
    }
}
