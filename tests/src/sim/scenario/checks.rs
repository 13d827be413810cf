//! The checks of a scenario that come in addition to the oracle's check of every read.

use super::{Scenario, Stage};
use crate::sim::bit_flips;
use crate::sim::devices::record_of;
use crate::sim::engine::EngineVolume;
use fastrand::Rng;
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use libwb::log::{Use, recovery, scan, superblock};
use std::sync::Arc;

impl Scenario<'_> {
    /// Reads the whole volume and asks the oracle to judge it.
    pub(super) fn verify_all(
        &mut self,
        volume: &Arc<dyn EngineVolume>,
    ) -> Result<Stage<()>, String> {
        let began = self.oracle.lock().read_begins();
        let mut data = Vec::new();
        let chunk = to_u64(SECTOR_BYTES) * self.unit * (1 << self.rng.u32(4..9));
        while to_u64(data.len()) < volume.size() {
            let at = to_u64(data.len());
            let length = chunk.min(volume.size() - at);
            let reading =
                volume.read(Sector(at / to_u64(SECTOR_BYTES)), IoBuf::zeroed(to_usize(length)));
            match self.finish("reading", reading)? {
                Stage::Done(Ok(part)) => data.extend_from_slice(&part),
                Stage::Done(Err(e)) => return Err(self.failed(&format!("reading failed: {e}"))),
                Stage::Halted => return Ok(Stage::Halted),
            }
        }
        let mut oracle = self.oracle.lock();
        match self.crashed.take() {
            Some(crash) => {
                oracle.read_fails(began);
                oracle.recovered(crash, &data);
            }
            None => oracle.read_ends(began, Sector(0), &data),
        }
        drop(oracle);
        self.verdict().map(Stage::Done)
    }

    /// Now and then, flips bits in a copy of the cache device.
    pub(super) fn flip_bits(&self) {
        // A separate generator leaves the rest of the scenario unchanged.
        let mut rng = Rng::with_seed(self.runtime().trace());
        let Some(recover) = self.engine.recovery().filter(|_| self.extended && rng.u32(..3) == 0)
        else {
            return;
        };
        let flips = bit_flips::check(
            self.cache.content(),
            self.backing.disk().content(),
            recover,
            &mut rng,
        );
        if let Err(text) = flips {
            self.oracle.lock().fail(&text);
        }
    }

    /// Checks what users would be left with if the cache device were lost now.
    pub(super) fn judge_backing_alone(&self) {
        if self.volume.as_ref().is_some_and(|volume| volume.has_moved_blocks()) {
            self.oracle.lock().blocks_moved();
        }
        // Until the volume is verified after a crash, new segments may reuse the ids of lost ones.
        if self.crashed.is_some() {
            return;
        }
        let written_back = record_of(&self.cache.content());
        let mut oracle = self.oracle.lock();
        if let Err(text) =
            oracle.allows_alone(&self.backing.disk().content(), written_back, self.config.strict)
        {
            oracle.fail(&text);
        }
    }

    /// A crash must explain everything that the cache device holds.
    pub(super) fn check_log(&self) -> Result<(), String> {
        let device: Device = Arc::new(MemDevice::with_content("cache", self.cache.content()));
        let checked = self.simulation.block_on(async {
            let superblock = superblock::read_superblock(&device, Use::Write)
                .await
                .map_err(|e| e.to_string())?;
            let slots = scan::scan(&device, superblock.geometry, |_, _| ()).await;
            let recovery = recovery::recover(&superblock, &slots);
            match recovery.corruption.is_empty() {
                true => Ok(()),
                false => Err(format!("the log is corrupt: {recovery:#?}")),
            }
        });
        match checked {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(self.failed(&e)),
            Err(stop) => Err(self.failed(&format!("scanning the log: {stop}"))),
        }
    }
}
