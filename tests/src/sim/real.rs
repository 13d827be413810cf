//! The real engine, with tunables that a seed chooses.

use super::engine::{Engine, EngineConfig, EngineFuture, EngineVolume};
use crate::recovered_view::Recover;
use fastrand::Rng;
use libwb::cache::{Cache, Head, OpenOptions, Tunables, WriteMode, WritebackOrder};
use libwb::device::{Device, IoBuf};
use libwb::format::{HeaderFault, SECTOR_BYTES, Sector, SegmentId, to_u64};
use libwb::log::recovery::{Recovery, recover};
use libwb::log::scan::{SlotFault, SlotState};
use libwb::log::superblock::Superblock;
use libwb::rules::{Rule, Rules};
use libwb::runtime::Runtime;
use std::sync::Arc;

/// Opens caches.
#[derive(Clone, Copy, Debug)]
pub struct WriteCache {
    rules: Rules,
    recover: Recover,
}

impl Default for WriteCache {
    fn default() -> WriteCache {
        WriteCache { rules: Rules::default(), recover }
    }
}

impl WriteCache {
    /// Opens caches that break a rule.
    pub fn with(rule: Rule) -> WriteCache {
        let recover = if rule == Rule::RotIsNoPowerCut { recover_forgiving } else { recover };
        WriteCache { rules: Rules::breaking(rule), recover }
    }
}

/// A recovery that mistakes any damage for the work of a power cut.
fn recover_forgiving(superblock: &Superblock, slots: &[SlotState]) -> Recovery {
    let forgiven = |state: &SlotState| match state {
        SlotState::Invalid {
            fault: SlotFault::Header(HeaderFault::FirstSector { id, .. }),
            proved,
            ..
        } => {
            let fault = HeaderFault::FirstSector { id: *id, may_be_torn: true }.into();
            SlotState::Invalid { fault, proved: *proved, stray: None }
        }
        SlotState::Invalid { fault: SlotFault::Commit { id, .. }, proved, .. } => {
            SlotState::Invalid {
                fault: SlotFault::Checksum { id: *id },
                proved: *proved,
                stray: None,
            }
        }
        other => other.clone(),
    };
    recover(superblock, &slots.iter().map(forgiven).collect::<Vec<_>>())
}

impl Engine for WriteCache {
    fn has_head(&self) -> bool {
        true
    }

    fn rules(&self) -> Rules {
        self.rules
    }

    fn open(
        &self,
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        config: EngineConfig,
        head: Option<Head>,
    ) -> EngineFuture<Arc<dyn EngineVolume>> {
        let tunables = tunables(config);
        let rules = self.rules;
        Box::pin(async move {
            let options = OpenOptions::serve().tunables(tunables).rules(rules);
            let options = match head {
                Some(head) => options.head(head),
                None => options,
            };
            let opened = Cache::open(cache, backing, runtime, options).await;
            opened
                .map(|cache| Arc::new(Open(cache)) as Arc<dyn EngineVolume>)
                .map_err(|e| e.to_string())
        })
    }

    fn recovery(&self) -> Option<Recover> {
        Some(self.recover)
    }
}

fn tunables(config: EngineConfig) -> Tunables {
    let mut rng = Rng::with_seed(config.seed);
    let mut tunables = Tunables {
        nr_max_batched_writeback: rng.choice([1, 2, 4, 32]).unwrap_or(32),
        writeback_threshold: rng.choice([0, 70, 70, 100]).unwrap_or(70),
        sync_data_interval: rng.choice([0, 0, 1, 5]).unwrap_or(0),
        writeback_order: if config.strict {
            WritebackOrder::Strict
        } else {
            WritebackOrder::Sorted
        },
        read_cache_threshold: rng.choice([0, 0, 1, 8, 127]).unwrap_or(0),
        nr_read_cache_cells: rng.choice([1, 8, 40, 2048]).unwrap_or(2048),
        write_mode: config.mode.unwrap_or_else(|| write_mode(&mut rng)),
        sequential_cutoff: match config.mode {
            Some(_) => 0,
            None => rng.choice([0, 0, 0, 0, 128, 1024]).unwrap_or(0),
        },
        ..Tunables::default()
    };
    if let Some(batch) = config.batch {
        tunables.nr_max_batched_writeback = batch;
    }
    if let Some(cells) = config.cells {
        (tunables.read_cache_threshold, tunables.nr_read_cache_cells) = (127, cells);
    }
    if config.impatient {
        tunables.backing_timeout = rng.choice([0, 1, 5, 60]).unwrap_or(0);
    }
    tunables
}

fn write_mode(rng: &mut Rng) -> WriteMode {
    match rng.u32(..8) {
        0 => WriteMode::Through,
        1 => WriteMode::Around,
        _ => WriteMode::Back,
    }
}

struct Open(Cache);

impl EngineVolume for Open {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn newest(&self) -> SegmentId {
        self.0.status().newest
    }

    fn has_moved_blocks(&self) -> bool {
        self.0.status().statistics.counters.moved_blocks > 0
    }

    fn read(&self, sector: Sector, buf: IoBuf) -> EngineFuture<IoBuf> {
        let cache = self.0.clone();
        Box::pin(async move { cache.read(sector, buf).await.map_err(|e| e.to_string()) })
    }

    fn write(&self, sector: Sector, data: Vec<u8>) -> EngineFuture<()> {
        let cache = self.0.clone();
        Box::pin(async move { cache.write(sector, &data).await.map_err(|e| e.to_string()) })
    }

    fn write_fua(&self, sector: Sector, data: Vec<u8>) -> EngineFuture<()> {
        let cache = self.0.clone();
        Box::pin(async move { cache.write_fua(sector, &data).await.map_err(|e| e.to_string()) })
    }

    fn discard(&self, sector: Sector, count: u64) -> EngineFuture<()> {
        let cache = self.0.clone();
        let length = count * to_u64(SECTOR_BYTES);
        Box::pin(async move { cache.discard(sector, length).await.map_err(|e| e.to_string()) })
    }

    fn tune(&self, config: EngineConfig) {
        if config.seed.is_multiple_of(8) {
            self.0.pause();
        } else {
            self.0.resume();
        }
        self.0.set_tunables(tunables(config));
    }

    fn flush(&self) -> EngineFuture<()> {
        let cache = self.0.clone();
        Box::pin(async move { cache.flush().await.map_err(|e| e.to_string()) })
    }

    fn drain(&self) -> EngineFuture<()> {
        let cache = self.0.clone();
        Box::pin(async move { cache.drain().await.map_err(|e| e.to_string()) })
    }

    fn close(&self) -> EngineFuture<()> {
        let cache = self.0.clone();
        Box::pin(async move { cache.close().await.map_err(|e| e.to_string()) })
    }
}
