//! Crashes at one moment, and what recovery makes of each.

use super::survivors::{Survivors, outcomes};
use crate::sim::devices::record_of;
use crate::sim::engine::{Engine, EngineConfig};
use crate::sim::module;
use crate::sim::oracle::Oracle;
use fastrand::Rng;
use libwb::cache::{Head, WriteMode};
use libwb::device::sim::{SimDevice, Simulation};
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{Sector, SegmentId, crc32c, to_usize};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// About one in this many crashes is also repaired for the kernel module.
const REPAIRED_ONE_IN: u32 = 16;

/// The result of a script.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Moments at which the power failed.
    pub moments: u64,
    /// Crashes: one for each moment and each set of surviving writes.
    pub crashes: u64,
    /// Crashes that left different devices. Each device was recovered.
    pub recoveries: u64,
}

/// Crashes the devices at every moment that it is shown.
pub(super) struct Explorer {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) oracle: Arc<Mutex<Oracle>>,
    /// What each crash so far has left.
    seen: Mutex<HashMap<Survivors, After>>,
    /// What devices and volumes held after those crashes. Most held the same, so each content is
    /// kept once.
    contents: Mutex<HashSet<Content>>,
    tally: Mutex<Tally>,
    rng: Mutex<Rng>,
    failure: Mutex<Option<String>>,
}

impl Explorer {
    pub(super) fn new(engine: Arc<dyn Engine>, oracle: Oracle, seed: u64) -> Explorer {
        Explorer {
            engine,
            oracle: Arc::new(Mutex::new(oracle)),
            seen: Mutex::default(),
            contents: Mutex::default(),
            tally: Mutex::default(),
            rng: Mutex::new(Rng::with_seed(seed)),
            failure: Mutex::default(),
        }
    }

    pub(super) fn tally(&self) -> Tally {
        *self.tally.lock()
    }

    /// The first rule that a crash broke, or that a read broke meanwhile.
    pub(super) fn verdict(&self) -> Result<(), String> {
        if let Some(text) = &*self.failure.lock() {
            return Err(text.clone());
        }
        self.oracle.lock().failure().map_or(Ok(()), |text| Err(text.to_string()))
    }

    /// The devices are others from now on.
    pub(super) fn start_over(&self) {
        self.seen.lock().clear();
        self.contents.lock().clear();
    }

    /// Crashes in every way, and recovers each time.
    pub(super) fn crash_now(&self, devices: &[Arc<SimDevice>; 2]) {
        if self.failure.lock().is_some() {
            return;
        }
        let moment = [devices[0].snapshot(), devices[1].snapshot()];
        self.tally.lock().moments += 1;
        for survivors in outcomes(&moment, &mut self.rng.lock()) {
            self.tally.lock().crashes += 1;
            let mut seen = self.seen.lock();
            let after = seen.entry(survivors.clone()).or_insert_with(|| {
                self.tally.lock().recoveries += 1;
                After::of(&*self.engine, survivors.images(&moment), &mut self.contents.lock())
            });
            let judged = after.judge(&self.oracle.lock());
            if let Err(text) = judged {
                *self.failure.lock() = Some(format!("{survivors:?} survive: {text}"));
                return;
            }
        }
    }
}

type Content = Arc<[u8]>;

/// What a crash has left.
struct After {
    recovered: Result<Content, String>,
    /// The backing device alone.
    backing: Content,
    written_back: SegmentId,
}

impl After {
    fn of(engine: &dyn Engine, images: [Vec<u8>; 2], contents: &mut HashSet<Content>) -> After {
        let mut kept = |content: &[u8]| -> Content {
            if let Some(same) = contents.get(content) {
                return same.clone();
            }
            let content = Content::from(content);
            contents.insert(content.clone());
            content
        };
        let (backing, written_back) = (kept(&images[1]), record_of(&images[0]));
        let recovered = recover(engine, images, None).map(|data| kept(&data));
        After { recovered, backing, written_back }
    }

    fn judge(&self, oracle: &Oracle) -> Result<(), String> {
        oracle.allows(self.recovered.as_ref().map_err(Clone::clone)?)?;
        oracle.allows_alone(&self.backing, self.written_back, false)
    }
}

/// What a volume reads as after a crash that left these devices. Checks that a drain makes the
/// backing device equal to it.
pub(super) fn recover(
    engine: &dyn Engine,
    [cache, backing]: [Vec<u8>; 2],
    head: Option<Head>,
) -> Result<Vec<u8>, String> {
    let simulation = Simulation::new(1);
    // A repair takes far longer than the rest, so only a sample is repaired.
    let is_repaired = crc32c(&cache).is_multiple_of(REPAIRED_ONE_IN);
    let for_module = is_repaired
        .then(|| module::volume_after_repair(cache.clone(), backing.clone()))
        .transpose()?;
    let backing = Arc::new(MemDevice::with_content("backing", backing));
    let cache: Device = Arc::new(MemDevice::with_content("cache", cache));
    let opening = engine.open(
        cache,
        backing.clone(),
        Arc::new(simulation.runtime().clone()),
        config(WriteMode::Back),
        head,
    );
    let recovering = async {
        let volume = opening.await?;
        let data = volume.read(Sector(0), IoBuf::zeroed(to_usize(volume.size()))).await?;
        volume.drain().await?;
        volume.close().await?;
        Ok(data.to_vec())
    };
    let data = simulation.block_on(recovering).unwrap_or_else(|stop| Err(stop.to_string()))?;
    if backing.content() != data {
        return Err("after recovery and a drain, the backing device differs from the volume".into());
    }
    match for_module {
        Some(shown) if shown != data => {
            Err("after a repair, the kernel module shows something else than we do".into())
        }
        _ => Ok(data),
    }
}

/// The same tunables each time, apart from the mode.
pub(super) fn config(mode: WriteMode) -> EngineConfig {
    EngineConfig { seed: 1, mode: Some(mode), ..EngineConfig::default() }
}
