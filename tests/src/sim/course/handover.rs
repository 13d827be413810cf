//! What the kernel module would make of the devices, when it may have them.

use super::{Course, Life};
use crate::sim::devices::closing_trouble;
use crate::sim::module;
use crate::sim::volume::Volume;
use libwb::device::sim::Crash;
use libwb::format::Sector;
use libwb::runtime::Runtime;
use std::sync::Arc;

impl Course<'_> {
    /// Closes the volume while the cache device fails. If the close says that it has gone well, that must be true.
    pub(super) fn close_in_trouble(&mut self, volume: Arc<dyn Volume>) -> Result<Life<()>, String> {
        // A close erases segments that the record covers, so from now on the log needs its record.
        self.forgetful = false;
        if self.later.bool() && !self.taste.strict {
            self.discard_meanwhile(&volume);
        }
        let trouble = closing_trouble(self.runtime().clone(), self.cache.clone(), self.later.fork());
        self.runtime().spawn(Box::pin(trouble));
        let began = self.oracle.lock().flush_begins();
        let Life::Goes(closed) = self.finish("close", volume.close())? else { return Ok(Life::Halted) };
        self.oracle.lock().flush_ends("close", began, closed.is_ok());
        self.heal();
        if closed.is_err() {
            return Ok(Life::Halted);
        }
        drop(volume);
        let crash = if self.later.bool() { Crash::Kill } else { Crash::PowerCut };
        self.oracle.lock().note(format!("closed; {crash:?}"));
        self.end_process(crash);
        self.crashed = Some(crash).filter(|crash| *crash == Crash::PowerCut);
        self.look_as_the_module_does()?;
        Ok(Life::Goes(()))
    }

    /// The kernel module may have a cache that was closed.
    pub(super) fn look_as_the_module_does(&self) -> Result<(), String> {
        let shown = module::volume(&self.cache.content(), self.backing.content());
        let volume = shown.map_err(|text| self.failed(&text))?;
        let mut oracle = self.oracle.lock();
        oracle.note("as the kernel module would show it");
        let began = oracle.read_begins();
        oracle.read_ends(began, Sector(0), &volume);
        drop(oracle);
        self.verdict()
    }
}
