//! Giving a device of the kernel module the extension, in place.

use super::LogError;
use super::create::{write_extension, write_record};
use super::live::live_totals;
use super::salvage::{Plan, Scanned};
use super::scan::{BackingFacts, SlotState};
use crate::device::{Device, DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, EXTENSION_OFFSETS, SECTOR_BYTES, SegmentId, SuperblockExtension, fitting};
use std::time::Duration;
use uuid::Uuid;

/// What is to be written.
#[derive(Clone, Debug)]
pub struct Upgrade {
    /// What is put right in the log before.
    pub repair: Option<Plan>,
    /// The last segment that is known to be written back.
    pub written_back: SegmentId,
    /// Whether the superblock record must be written to say so.
    pub records: bool,
    /// How many blocks are dirty. They stay so.
    pub dirty_blocks: u64,
    /// The new extension.
    pub extension: SuperblockExtension,
}

impl Upgrade {
    /// Plans it for a log that was read. The cache gets a new identity, `created` so long
    /// after the beginning of 1970.
    ///
    /// # Errors
    /// When the device has the extension, its log is corrupt, or it does not fit the backing device.
    pub async fn plan(
        device: &Device,
        scanned: &Scanned,
        backing: &BackingFacts<'_>,
        label: &str,
        created: Duration,
    ) -> Result<Upgrade, LogError> {
        let name = || device.name().to_string();
        if scanned.superblock.extension().is_some() {
            return Err(LogError::Extended { device: name() });
        }
        let repair = scanned.repair(device)?;
        for slot in &scanned.slots {
            if let &SlotState::Valid { id, extension: Some(_), .. } = slot {
                return Err(LogError::ExtensionLost { device: name(), id });
            }
        }
        let recovery = scanned.recovery();
        let live = live_totals(device, scanned.superblock.geometry, &recovery, Some(backing.sectors)).await?;
        if let Some(beyond) = live.beyond.first() {
            let backing_name = backing.name.to_string();
            let (id, sector, sectors) = (beyond.id, beyond.sector, backing.sectors);
            return Err(LogError::BeyondBacking {
                device: name(),
                id,
                sector,
                backing: backing_name,
                sectors,
            });
        }
        let written_back = recovery.live().next().map_or(recovery.point, |first| first.minus(1));
        Ok(Upgrade {
            repair,
            written_back,
            records: written_back > recovery.record,
            dirty_blocks: live.dirty_blocks,
            extension: SuperblockExtension {
                backing_sectors: backing.sectors,
                backing_id: fitting(backing.identity).into(),
                label: fitting(label).into(),
                created: created.as_secs(),
                ..SuperblockExtension::new(Uuid::new_v4(), device.size())
            },
        })
    }

    /// What is written, one thing each.
    pub fn changes(&self) -> Vec<String> {
        let mut changes = self.repair.as_ref().map(Plan::changes).unwrap_or_default();
        if self.records && self.repair.is_none() {
            changes.push(format!(
                "the superblock record: segment {} is the last written back",
                self.written_back
            ));
        }
        changes.push(format!(
            "the superblock extension: a new identity, paired with a backing device of {} sectors",
            self.extension.backing_sectors
        ));
        changes
    }

    /// Carries it out. It is durable afterwards. Interrupted, it leaves a device without the extension, or with it.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn apply(&self, device: &Device) -> Result<(), DeviceError> {
        if let Some(repair) = &self.repair {
            repair.apply(device).await?;
        }
        if self.records {
            write_record(device, self.written_back).await?;
        }
        // The marker is in the first sector of a page. It is written when the rest is there, or a torn page would be
        // taken for a damaged one, and the device refused.
        for (generation, offset) in (0..).zip(EXTENSION_OFFSETS) {
            let page = SuperblockExtension { generation, ..self.extension.clone() };
            let mut block = IoBuf::zeroed(BLOCK_BYTES);
            page.encode(block.block_at_mut(0));
            block[..SECTOR_BYTES].fill(0);
            device.write(offset, block.into()).await?;
        }
        device.flush().await?;
        for generation in [0, 1] {
            let page = SuperblockExtension { generation, ..self.extension.clone() };
            write_extension(device, &page).await?;
            device.flush().await?;
        }
        Ok(())
    }
}
