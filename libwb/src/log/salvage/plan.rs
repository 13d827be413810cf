//! What a salvage or a repair writes, and what it gives up.

use super::mode::SalvageMode;
use super::slot_plan::{Change, Found, LostSegment, SlotPlan};
use super::surviving_blocks::SurvivingBlocks;
use crate::device::{Device, DeviceError, Operation, all};
use crate::format::{
    BLOCK_BYTES, BlockNo, Geometry, Record, SegmentId, Slot, SuperblockExtension, fitting, to_u64,
};
use crate::log::kernel_compat::{Emptied, emptied};
use crate::log::live::{totals, visit_headers};
use crate::log::pairing::{BackingFacts, check_pairing};
use crate::log::reach::Reach;
use crate::log::scan::read_slot_header;
use crate::log::segment_writes::{close_segment, write_extension, write_filler, write_record};
use crate::log::superblock::RawSuperblock;
use crate::log::{LogError, refuse_older};
use futures_util::{StreamExt, stream};
use nix::errno::Errno;
use std::collections::{HashMap, HashSet};

/// Slots to rewrite at once.
const WRITE_DEPTH: usize = 32;

/// A segment that a plan gives up, whole or in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenUp {
    /// Its slot.
    pub slot: Slot,
    /// Its id; [`SegmentId::NONE`] if that is unknown.
    pub id: SegmentId,
    /// The dirty blocks that the plan gives up.
    pub blocks: Vec<BlockNo>,
    /// How certain these blocks are.
    pub certainty: Certainty,
    /// How many of its dirty blocks the plan keeps.
    pub kept: u64,
}

/// How certain the content of a segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// Its header is sound.
    Sure,
    /// Its header is readable, but may be wrong.
    Perhaps,
    /// Its content is unknown.
    Unknown,
}

/// What to write to a cache device, and what that gives up.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The mode of the salvage; none for a repair.
    pub mode: Option<SalvageMode>,
    /// The last segment of the log afterwards.
    pub point: SegmentId,
    /// What the plan gives up, in the order of the log.
    pub given_up: Vec<GivenUp>,
    /// The superblock record, if the log contradicts it. The plan rejects it then.
    pub rejected_record: Option<SegmentId>,
    /// Sound written-back segments to empty. From them the kernel module would take old data for
    /// new.
    pub misleading: Vec<SegmentId>,
    pub(super) geometry: Geometry,
    pub(super) extension: Option<SuperblockExtension>,
    pub(super) slot_plan: SlotPlan,
    /// The new superblock record, if it must change.
    pub(super) record: Option<Record>,
    /// The page of the superblock extension that distinguishes the log from an older, longer copy.
    /// It is written before the plan gives anything up.
    pub(super) newer_page: Option<SuperblockExtension>,
    /// The pages of the superblock extension to write last.
    pub(super) pages: Vec<SuperblockExtension>,
    /// What is wrong with the copy that a page replaces, if anything.
    pub(super) bad_copy: Option<&'static str>,
    /// The device has lost its superblock extension, and gets a new one.
    pub(super) pairs_anew: bool,
}

impl Plan {
    /// `superblock` has a new extension if the device has lost its own.
    pub(super) fn new(
        was_paired: bool,
        superblock: RawSuperblock,
        mode: Option<SalvageMode>,
        slot_plan: SlotPlan,
    ) -> Plan {
        let extension = superblock.extension().cloned();
        let bad_copy = match (superblock.has_damaged_copy(), superblock.has_torn_copy()) {
            (true, _) => Some("damaged"),
            (false, true) => Some("torn"),
            (false, false) => None,
        };
        let pairs_anew = extension.is_some() && !was_paired;
        let newer_page = extension
            .as_ref()
            .filter(|_| mode.is_some() && !pairs_anew)
            .map(SuperblockExtension::next);
        let page = |page: &SuperblockExtension| SuperblockExtension {
            clean: page.clean.filter(|_| !slot_plan.clear_clean_mark),
            ..page.next()
        };
        let needed =
            slot_plan.clear_clean_mark || pairs_anew || newer_page.is_none() && bad_copy.is_some();
        let newest = newer_page.as_ref().or(extension.as_ref());
        let mut pages: Vec<_> = newest.filter(|_| needed).map(page).into_iter().collect();
        if pairs_anew {
            pages.extend(pages.first().map(SuperblockExtension::next));
        }
        let digest = extension.as_ref().map(SuperblockExtension::digest);
        Plan {
            mode,
            point: slot_plan.point,
            given_up: Vec::new(),
            rejected_record: slot_plan.rejected_record,
            geometry: superblock.geometry,
            record: Some(slot_plan.written_back)
                .filter(|&id| superblock.record != Ok(id))
                .map(|id| Record { id, digest }),
            misleading: Vec::new(),
            extension,
            slot_plan,
            newer_page,
            pages,
            bad_copy,
            pairs_anew,
        }
    }

    /// Refuses an older copy of a cache. Only the written-back segments are compared, because a
    /// salvage may give up later ones.
    ///
    /// # Errors
    /// [`LogErrorKind::Older`](crate::log::LogErrorKind::Older).
    pub fn refuse_older(&self, device: &Device, known: Reach) -> Result<(), LogError> {
        let found = Reach { durable: self.point, written_back: self.slot_plan.written_back };
        refuse_older(device, found, known.shortened())
    }

    /// Pairs the cache with a backing device, if it has lost its pairing.
    pub fn pair(&mut self, backing: &BackingFacts<'_>) {
        for page in self.pages.iter_mut().filter(|_| self.pairs_anew) {
            page.backing_sectors = backing.sectors;
            page.backing_id = fitting(backing.identity).into();
        }
    }

    /// Checks that the kept data belongs to a backing device and fits on it.
    ///
    /// # Errors
    /// When it does not, or the cache device fails.
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
            totals(device, self.geometry, self.kept(), self.slot_plan.cut_short, sectors).await?;
        held.beyond.first().map_or(Ok(()), |beyond| Err(backing.refuse_beyond(device, *beyond)))
    }

    /// The live segments that do not change.
    fn kept(&self) -> impl Iterator<Item = SegmentId> {
        let changed: HashSet<Slot> =
            self.slot_plan.all_changes().map(|change| change.slot).collect();
        let first = self.slot_plan.written_back.max(self.point.minus(self.geometry.lap())).next();
        let geometry = self.geometry;
        (first.0..=self.point.0)
            .map(SegmentId)
            .filter(move |&id| !changed.contains(&geometry.slot_of(id)))
    }

    /// Carries the plan out, and makes it durable. After an interruption at any point, a new plan
    /// completes it.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn apply(&self, device: &Device) -> Result<(), DeviceError> {
        // A daemon that was killed may have left segments in the device's volatile cache.
        device.flush().await?;
        if let Some(page) = &self.newer_page {
            write_extension(device, page).await?;
            device.flush().await?;
        }
        if let Some(record) = self.record {
            write_record(device, record).await?;
            device.flush().await?;
        }
        for changes in [
            &self.slot_plan.changes[..],
            self.slot_plan.commit_change.as_slice(),
            &self.slot_plan.final_changes,
        ] {
            let writes = changes.iter().map(|change| self.change(device, *change));
            all(stream::iter(writes).buffer_unordered(WRITE_DEPTH)).await?;
            device.flush().await?;
        }
        if let Some(id) = self.slot_plan.cut_short {
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
        let known = [id, self.slot_plan.point];
        let Emptied { block, .. } =
            emptied(device, self.geometry, known, self.extension.as_ref()).await?;
        device.write(self.geometry.slot_offset(self.geometry.slot_of(id)), block.into()).await
    }

    async fn change(&self, device: &Device, change: Change) -> Result<(), DeviceError> {
        let Change { slot, id, live } = change;
        if live {
            let surviving = self.surviving_blocks(device, id).await;
            let planned = self
                .given_up
                .iter()
                .find(|given_up| given_up.id == id)
                .map_or(0, |given_up| given_up.kept);
            if surviving.as_ref().map_or(0, SurvivingBlocks::kept) < planned {
                return Err(read_less(device, self.geometry.slot_offset(slot)));
            }
            if let Some(surviving) = surviving {
                return surviving.write(device, self.geometry).await;
            }
        }
        write_filler(
            device,
            self.geometry,
            slot,
            (id, self.slot_plan.durable),
            self.extension.as_ref(),
        )
        .await
    }

    async fn surviving_blocks(&self, device: &Device, id: SegmentId) -> Option<SurvivingBlocks> {
        let digest = self.extension.as_ref().map(SuperblockExtension::digest);
        SurvivingBlocks::find(device, self.geometry, id, digest).await
    }

    /// Finds what the plan gives up. A block of a lost segment does not count if a later segment
    /// holds it: the later version has every sector that is not written back.
    pub(super) async fn find_given_up(&self, device: &Device) -> Result<Vec<GivenUp>, LogError> {
        let mut given_up = Vec::with_capacity(self.slot_plan.lost.len());
        for lost in &self.slot_plan.lost {
            given_up.push(self.given_up_of(device, lost).await);
        }
        let mut newest: HashMap<BlockNo, SegmentId> = HashMap::new();
        for lost in &given_up {
            newest.extend(lost.blocks.iter().map(|&block| (block, SegmentId::NONE)));
        }
        if !newest.is_empty() {
            visit_headers(device, self.geometry, self.kept(), self.slot_plan.cut_short, |header| {
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

    async fn given_up_of(&self, device: &Device, lost: &LostSegment) -> GivenUp {
        let &LostSegment { slot, id, found } = lost;
        let none = GivenUp { slot, id, blocks: Vec::new(), certainty: Certainty::Unknown, kept: 0 };
        if found == Found::Nothing {
            return none;
        }
        let stays = self.slot_plan.all_changes().any(|change| change.slot == slot && change.live);
        if stays && let Some(surviving) = self.surviving_blocks(device, id).await {
            return GivenUp {
                blocks: surviving.lost(),
                certainty: Certainty::Sure,
                kept: surviving.kept(),
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

/// The error for a device that reads less now than when the plan was made. Nothing is given up that
/// the plan does not name.
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
