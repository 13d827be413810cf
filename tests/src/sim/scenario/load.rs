//! The clients of a scenario.

use super::{Scenario, Stage};
use crate::sim::clients::{Client, Habits};
use crate::sim::devices::{spoil_some, trouble};
use crate::sim::engine::{EngineConfig, EngineVolume};
use crate::sim::unanswered::{Asked, Change};
use futures_channel::oneshot;
use libwb::format::{SECTOR_BYTES, Sector, to_u64};
use libwb::runtime::Runtime;
use std::sync::Arc;
use std::time::Duration;

impl Scenario<'_> {
    /// Runs random clients on the volume.
    pub(super) fn run_clients(
        &mut self,
        volume: &Arc<dyn EngineVolume>,
    ) -> Result<Stage<()>, String> {
        if self.config.impatient {
            volume.tune(EngineConfig { seed: self.rng.u64(..), ..self.config });
        }
        let mut habits = Habits::any(&mut self.rng, self.unit);
        if self.config.strict {
            habits.discard_nothing();
        }
        // After a discard, only the record keeps the discarded data from coming back.
        self.forgetful &= !habits.discards();
        let clients = self.rng.u32(1..=8);
        let operations = 1 << self.rng.u32(0..8);
        let mut ends = std::mem::take(&mut self.coming_again);
        for _ in 0..clients {
            let client = Client {
                served: self.served(volume),
                rng: self.rng.fork(),
                habits: habits.clone(),
                faulty: self.faulty,
                config: self.config,
            };
            let (done, end) = oneshot::channel();
            let operations = self.rng.u32(1..=operations);
            self.runtime().spawn(Box::pin(async move {
                client.run(operations).await;
                let _ = done.send(());
            }));
            ends.push(end);
        }
        if self.faulty && self.later_rng.u32(..3) == 0 {
            spoil_some(&self.backing.disk(), &mut self.later_rng);
        }
        if self.faulty {
            let rng = self.rng.fork();
            let devices = [self.cache.clone(), self.backing.disk()];
            let trouble = trouble(self.runtime().clone(), devices, self.extended, rng);
            self.runtime().spawn(Box::pin(trouble));
        }
        let all = futures_util::future::join_all(ends);
        let life = self.finish("the clients' work", all)?;
        Ok(match life {
            Stage::Done(_) => Stage::Done(()),
            Stage::Halted => Stage::Halted,
        })
    }

    /// Starts discards that run during the close that follows and may fail.
    pub(super) fn discard_meanwhile(&mut self, volume: &Arc<dyn EngineVolume>) {
        let (served, runtime) = (self.served(volume), self.runtime().clone());
        let mut rng = self.rng.fork();
        let unit = self.unit;
        self.runtime().spawn(Box::pin(async move {
            let units = served.volume.size() / (to_u64(SECTOR_BYTES) * unit);
            for _ in 0..rng.u32(1..20) {
                let micros = rng.u64(..2000);
                runtime.sleep(Duration::from_micros(micros)).await;
                let first = rng.u64(..units);
                let (first, count) = (Sector(first * unit), rng.u64(1..=units - first) * unit);
                let _ = served.begin(Asked { change: Change::Discard, first, count }).await;
            }
        }));
    }
}
