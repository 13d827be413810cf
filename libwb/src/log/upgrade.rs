//! Adding the extension to a device of the kernel module, in place.

use super::live::live_totals;
use super::pairing::BackingFacts;
use super::salvage::{Plan, Scanned};
use super::segment_writes::{write_extension, write_record};
use super::{LogError, LogErrorKind};
use crate::device::{Device, DeviceError, IoBuf};
use crate::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, Record, SECTOR_BYTES, SegmentId, SuperblockExtension, fitting,
};
use std::time::Duration;
use uuid::Uuid;

/// What an upgrade writes.
#[derive(Clone, Debug)]
pub struct Upgrade {
    /// The repair of the log that comes first, if it needs one.
    pub repair: Option<Plan>,
    /// The last segment that is known to be written back.
    pub written_back: SegmentId,
    /// The last such segment according to the superblock record.
    pub recorded: SegmentId,
    /// The number of dirty blocks. They stay dirty.
    pub dirty_blocks: u64,
    /// The new extension.
    pub extension: SuperblockExtension,
}

impl Upgrade {
    /// Plans the upgrade of a log that was read. The cache gets a new identity, with the creation
    /// time `created` since the beginning of 1970 (UTC).
    ///
    /// # Errors
    /// - The device has the extension, or has lost it.
    /// - Its log is corrupt.
    /// - The log holds data beyond the end of the backing device.
    /// - The device fails.
    pub async fn plan(
        device: &Device,
        scanned: &Scanned,
        backing: &BackingFacts<'_>,
        label: &str,
        created: Duration,
    ) -> Result<Upgrade, LogError> {
        if scanned.superblock.extension().is_some() {
            return Err(LogError::new(device, LogErrorKind::Extended));
        }
        // If the device has lost its extension, a repair would add a new one.
        let recovery = scanned.recovery().refuse_corrupt(device)?;
        let repair = scanned.repair(device).await?;
        let live =
            live_totals(device, scanned.superblock.geometry, &recovery, Some(backing.sectors))
                .await?;
        if let Some(beyond) = live.beyond.first() {
            return Err(backing.refuse_beyond(device, *beyond));
        }
        let written_back = recovery.live().next().map_or(recovery.point, |first| first.minus(1));
        Ok(Upgrade {
            repair,
            written_back,
            recorded: recovery.record,
            dirty_blocks: live.dirty_blocks,
            extension: SuperblockExtension {
                label: fitting(label).into(),
                created: created.as_secs(),
                ..SuperblockExtension::new(Uuid::new_v4(), device.size())
                    .paired(backing.sectors, backing.identity)
            },
        })
    }

    /// What the upgrade writes, one item each.
    pub fn changes(&self) -> Vec<String> {
        let mut changes = self.repair.as_ref().map(Plan::changes).unwrap_or_default();
        if self.written_back > self.recorded && self.repair.is_none() {
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

    /// Carries the upgrade out, and makes it durable. If it is interrupted, the device has the
    /// whole extension or none.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn apply(&self, device: &Device) -> Result<(), DeviceError> {
        if let Some(repair) = &self.repair {
            repair.apply(device).await?;
        }
        if self.written_back > self.recorded {
            write_record(device, Record { id: self.written_back, digest: None }).await?;
        }
        // The marker is in the first sector of a page, and is written last. Otherwise a torn page
        // would count as damaged, and wb would refuse the device.
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
        // This record comes last: on a device without the extension, it would show that the
        // extension was lost.
        let digest = Some(self.extension.digest());
        write_record(device, Record { id: self.written_back.max(self.recorded), digest }).await?;
        device.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::to_usize;
    use crate::log::pairing::check_pairing;
    use crate::log::test_log::{MASKS, TestLog, after_power_cut, in_sectors, read, volume};
    use futures_lite::future::block_on;

    const BACKING: BackingFacts<'_> =
        BackingFacts { name: "backing", sectors: 80_000, identity: "serial" };

    fn plan(device: &Device) -> Result<Upgrade, LogError> {
        block_on(Upgrade::plan(device, &read(device), &BACKING, "data", Duration::ZERO))
    }

    /// Logs of the kernel module: whole, with a torn end, with the oldest segment under overwrite.
    fn logs() -> [TestLog; 3] {
        let [whole, mut torn, mut overwrite] =
            [TestLog::new(20, false), TestLog::new(9, false), TestLog::new(20, false)];
        torn.garble(8);
        overwrite.rot(7, 1);
        [whole, torn, overwrite]
    }

    #[test]
    fn an_upgrade_keeps_the_volume_and_pairs_the_cache() {
        for log in logs() {
            let recorder = log.device();
            let device: Device = recorder.clone();
            block_on(plan(&device).unwrap().apply(&device)).unwrap();
            assert_eq!(volume(&recorder.memory.content()), volume(&log.image));
            let after = read(&device);
            assert!(block_on(after.repair(&device)).unwrap().is_none());
            assert!(after.recovery().skipped.is_empty());
            let page = after.superblock.extension().unwrap();
            assert_eq!((page.label.as_str(), page.backing_id.as_str()), ("data", "serial"));
            assert!(check_pairing(&device, page, &BackingFacts { sectors: 1, ..BACKING }).is_err());
            assert!(matches!(plan(&device), Err(LogError { kind: LogErrorKind::Extended, .. })));
        }
    }

    #[test]
    fn a_power_cut_in_an_upgrade_leaves_a_device_with_the_extension_or_without() {
        for log in logs() {
            let recorder = log.device();
            let device: Device = recorder.clone();
            block_on(plan(&device).unwrap().apply(&device)).unwrap();
            let sectors = in_sectors(&recorder.writes.lock());
            for flushes in 0..=*recorder.flushes.lock() {
                for any in MASKS {
                    let cut = after_power_cut(&log, &sectors, flushes, any);
                    assert_eq!(
                        volume(&cut.image),
                        volume(&log.image),
                        "flush {flushes}, mask {any:#x}"
                    );
                    let device: Device = cut.device();
                    match plan(&device) {
                        Ok(again) => block_on(again.apply(&device)).unwrap(),
                        Err(error) => {
                            assert!(
                                matches!(error, LogError { kind: LogErrorKind::Extended, .. }),
                                "{error}"
                            )
                        }
                    }
                    assert!(read(&device).superblock.extension().is_some());
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_upgraded_is_refused() {
        let mut corrupt = TestLog::new(9, false);
        corrupt.rot(3, 0);
        let mut lost = TestLog::new(3, true);
        lost.image[to_usize(EXTENSION_OFFSETS[0])..][..8].fill(0);
        lost.image[to_usize(EXTENSION_OFFSETS[1])..][..8].fill(0);
        let refused = |log: &TestLog| plan(&(log.device() as Device)).expect_err("a refusal");
        assert!(refused(&corrupt).is_corruption());
        assert!(refused(&lost).is_corruption());
        let device: Device = TestLog::new(9, false).device();
        let small = BackingFacts { sectors: 800 * 8, ..BACKING };
        let plan = block_on(Upgrade::plan(&device, &read(&device), &small, "", Duration::ZERO));
        assert!(matches!(plan, Err(LogError { kind: LogErrorKind::BeyondBacking { .. }, .. })));
    }
}
