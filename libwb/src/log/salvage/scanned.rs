//! A scanned log: what recovery makes of it, and plans to salvage or repair it.

use super::mode::SalvageMode;
use super::plan::Plan;
use super::slot_plan::SlotPlan;
use crate::device::Device;
use crate::format::{SegmentId, Slot, SuperblockExtension, uuid_of_digest};
use crate::log::kernel_compat::segments_to_empty;
use crate::log::recovery::{Corruption, Recovery, explained, recover};
use crate::log::scan::{SlotFault, SlotState, scan};
use crate::log::superblock::{RawSuperblock, examine_superblock};
use crate::log::verdict::{proved, slot_index, valid};
use crate::log::{LogError, LogErrorKind, Use};
use std::collections::HashSet;
use uuid::Uuid;

/// A device whose log was scanned, sound or not.
#[derive(Clone, Debug)]
pub struct Scanned {
    /// What the superblock region says.
    pub superblock: RawSuperblock,
    /// One verdict for each slot.
    pub slots: Vec<SlotState>,
}

impl Scanned {
    /// Scans the whole log of a device. Calls `progress` with each slot.
    ///
    /// # Errors
    /// When the device cannot be read, or is no cache device that this version of wb may use.
    pub async fn read(
        device: &Device,
        wanted: Use,
        mut progress: impl FnMut(Slot),
    ) -> Result<Scanned, LogError> {
        let superblock = examine_superblock(device).await?;
        let fault = |fault| LogError::new(device, LogErrorKind::Superblock { fault });
        superblock.magic.map_err(fault)?;
        superblock.check_extension(device, wanted)?;
        let slots = scan(device, superblock.geometry, |slot, _| progress(slot)).await;
        Ok(Scanned::of(superblock, &slots))
    }

    /// The verdicts of a scan, corrected by [`explained`].
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

    /// Whether the device was resized: most segments are sound, but lie where wb cannot have
    /// written them on a device of this size. A few such slots may just have damaged ids.
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

    /// Plans a salvage. `None` if the log is not corrupt.
    ///
    /// # Errors
    /// When the device fails, or the log cannot be salvaged.
    pub async fn salvage(
        &self,
        device: &Device,
        mode: SalvageMode,
    ) -> Result<Option<Plan>, LogError> {
        if !self.is_corrupt() {
            return Ok(None);
        }
        if self.is_resized() {
            return Err(LogError::new(device, LogErrorKind::Misplaced));
        }
        let superblock = self.with_extension(device.size());
        let slot_plan = SlotPlan::new(&superblock, &self.slots, Some(mode));
        let slot_plan =
            slot_plan.ok_or_else(|| LogError::new(device, LogErrorKind::Unsalvageable))?;
        let was_paired = self.superblock.extension().is_some();
        let mut plan = Plan::new(was_paired, superblock, Some(mode), slot_plan);
        plan.given_up = plan.find_given_up(device).await?;
        plan.misleading = self.misleading(device, &plan.slot_plan).await;
        Ok(Some(plan))
    }

    /// Plans a salvage in every possible mode; none if the log is not corrupt. If only the pairing
    /// is lost, both modes do the same, and one plan is returned.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn salvage_plans(&self, device: &Device) -> Result<Vec<Plan>, LogError> {
        let mut plans: Vec<Plan> = Vec::new();
        for mode in SalvageMode::ALL {
            match self.salvage(device, mode).await {
                Ok(plan) => plans.extend(plan),
                Err(LogError {
                    kind: LogErrorKind::Misplaced | LogErrorKind::Unsalvageable,
                    ..
                }) => {}
                Err(error) => return Err(error),
            }
        }
        if self.lost_nothing_but_the_pairing() {
            plans.truncate(1);
        }
        Ok(plans)
    }

    /// Plans a repair of a sound log. Afterwards the kernel module reads the same volume as wb.
    /// `None` if there is nothing to repair.
    ///
    /// # Errors
    /// When the log is corrupt, or no repair makes a log that recovery accepts. A lost superblock
    /// extension alone is no reason.
    pub async fn repair(&self, device: &Device) -> Result<Option<Plan>, LogError> {
        if let Err(fault) = self.superblock.record {
            return Err(LogError::new(device, LogErrorKind::Superblock { fault }));
        }
        let superblock = self.with_extension(device.size());
        let recovery = recover(&superblock.or_no_record(), &self.slots).refuse_corrupt(device)?;
        let slot_plan = SlotPlan::new(&superblock, &self.slots, None);
        let slot_plan =
            slot_plan.ok_or_else(|| LogError::new(device, LogErrorKind::Unsalvageable))?;
        let was_paired = self.superblock.extension().is_some();
        let mut plan = Plan::new(was_paired, superblock, None, slot_plan);
        plan.misleading = self.misleading(device, &plan.slot_plan).await;
        let is_sound =
            plan.slot_plan.is_empty() && recovery.skipped.is_empty() && plan.pages.is_empty();
        Ok((!is_sound || !plan.misleading.is_empty()).then_some(plan))
    }

    /// The written-back segments that would mislead the kernel module after all other writes.
    async fn misleading(&self, device: &Device, slot_plan: &SlotPlan) -> Vec<SegmentId> {
        let (geometry, superblock) = (self.superblock.geometry, self.superblock.or_no_record());
        let rewritten: HashSet<Slot> = slot_plan.all_changes().map(|change| change.slot).collect();
        let is_rewritten = |id| rewritten.contains(&geometry.slot_of(id));
        let stands = |id| {
            let found = valid(&self.slots[slot_index(geometry.slot_of(id))], &superblock);
            found.is_some_and(|(found, _)| found == id)
        };
        let up_to = [slot_plan.written_back, slot_plan.point];
        let is_damaged = |id| is_rewritten(id) || !stands(id);
        let mut misleading = segments_to_empty(device, geometry, up_to, is_damaged).await;
        misleading.retain(|&id| !is_rewritten(id));
        misleading
    }

    /// Whether the log is sound except for a lost superblock extension.
    pub fn lost_nothing_but_the_pairing(&self) -> bool {
        self.superblock.record.is_ok() && self.recovery().corruption == [Corruption::PairingLost]
    }

    /// What the superblock region says. If the extension is lost, it has a new one that fits the
    /// segments.
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
