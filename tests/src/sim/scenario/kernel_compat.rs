//! Checks that the kernel module could take over the devices.

use super::{Scenario, Stage};
use crate::sim::devices::closing_trouble;
use crate::sim::engine::EngineVolume;
use crate::sim::{module, stamp};
use libwb::device::sim::{Crash, SimDevice, Simulation};
use libwb::device::{BlockDevice, Device, IoBuf, MemDevice};
use libwb::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use libwb::runtime::Runtime;
use std::sync::Arc;

impl Scenario<'_> {
    /// Closes the volume while the cache device fails. A close that reports success must have
    /// succeeded.
    pub(super) fn close_in_trouble(
        &mut self,
        volume: Arc<dyn EngineVolume>,
    ) -> Result<Stage<()>, String> {
        self.heads.forget();
        // A close erases segments that the record covers, so from now on the log needs its record.
        self.forgetful = false;
        if self.later_rng.bool() && !self.config.strict {
            self.discard_meanwhile(&volume);
        }
        let trouble =
            closing_trouble(self.runtime().clone(), self.cache.clone(), self.later_rng.fork());
        self.runtime().spawn(Box::pin(trouble));
        let began = self.oracle.lock().flush_begins();
        let Stage::Done(closed) = self.finish("close", volume.close())? else {
            return Ok(Stage::Halted);
        };
        self.oracle.lock().flush_ends("close", began, closed.is_ok());
        self.heal();
        if closed.is_err() {
            return Ok(Stage::Halted);
        }
        drop(volume);
        let crash = if self.later_rng.bool() { Crash::Kill } else { Crash::PowerCut };
        self.oracle.lock().note(format!("closed; {crash:?}"));
        self.end_process(crash);
        self.crashed = Some(crash).filter(|crash| *crash == Crash::PowerCut);
        self.verify_as_kernel_module()?;
        Ok(Stage::Done(()))
    }

    /// Checks that the kernel module would show the same volume after a close.
    pub(super) fn verify_as_kernel_module(&self) -> Result<(), String> {
        let shown = module::volume(&self.cache.content(), self.backing.disk().content());
        let volume = shown.map_err(|text| self.failed(&text))?;
        let mut oracle = self.oracle.lock();
        oracle.note("as the kernel module would show it");
        let began = oracle.read_begins();
        oracle.read_ends(began, Sector(0), &volume);
        drop(oracle);
        self.verdict()
    }
    /// Repairs a copy of a crashed cache for the kernel module, with a second attempt if a power
    /// cut ends the first. The module must then show the volume that we would recover.
    pub(super) fn repair_a_copy(&mut self) -> Result<(), String> {
        if self.copy_rng.u32(..16) != 0 {
            return Ok(());
        }
        let simulation = Simulation::new(self.copy_rng.u64(..));
        let ours = self.recovered_aside(&simulation)?;
        let (content, unit) = (self.cache.content(), self.cache.block_size());
        let cache = Arc::new(SimDevice::new(simulation.runtime(), "cache", content, unit));
        if self.copy_rng.bool() {
            simulation.runtime().halt_after_io(self.copy_rng.u64(..100));
        }
        let device: Device = cache.clone();
        let attempt = simulation.block_on(module::repair(&device));
        let left = match attempt {
            Ok(repaired) => repaired.map(|()| cache.content()).map_err(|e| e.to_string()),
            Err(_) => Ok(cache.crash(Crash::PowerCut).content()),
        };
        let shown =
            left.and_then(|left| module::volume_after_repair(left, self.backing.disk().content()));
        let shown = shown.map_err(|text| self.failed(&format!("repaired: {text}")))?;
        let sectors = shown.chunks(SECTOR_BYTES).zip(ours.chunks(SECTOR_BYTES));
        match sectors.enumerate().find(|(_, (module, ours))| module != ours) {
            None => Ok(()),
            Some((sector, (module, ours))) => {
                let [module, ours] =
                    [module, ours].map(|bytes| stamp::decode(bytes, Sector(to_u64(sector))));
                let text = format!(
                    "after a repair, the module shows {module:?} in sector {sector}, and we \
                     {ours:?}"
                );
                Err(self.failed(&text))
            }
        }
    }

    /// The volume that we recover from copies of the devices.
    fn recovered_aside(&self, simulation: &Simulation) -> Result<Vec<u8>, String> {
        let copy = |name, content| -> Device { Arc::new(MemDevice::with_content(name, content)) };
        let devices =
            [copy("cache", self.cache.content()), copy("backing", self.backing.disk().content())];
        let [cache, backing] = devices;
        let runtime = Arc::new(simulation.runtime().clone());
        let opening = self.engine.open(cache, backing, runtime, self.config, None);
        let reading = async {
            let volume = opening.await?;
            volume.read(Sector(0), IoBuf::zeroed(to_usize(volume.size()))).await
        };
        let read = simulation.block_on(reading).unwrap_or_else(|stop| Err(stop.to_string()));
        simulation.kill_tasks();
        read.map(|data| data.to_vec()).map_err(|text| self.failed(&format!("on a copy: {text}")))
    }
}
