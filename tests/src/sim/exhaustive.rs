//! Every crash of a short script. The power fails before each change to a device. Of the writes
//! that are not durable then, every combination survives, and the newest write survives in parts.
//!
//! If two crashes leave the same devices, only the first is recovered. Between two changes to the
//! devices, only the acknowledged writes grow. So the moment just before a change demands the most.

use super::clients::flush;
use super::devices::{fresh_backing, fresh_cache};
use super::engine::{Engine, EngineConfig, EngineFuture, EngineVolume};
use super::oracle::Oracle;
use super::unanswered::{Asked, Change, Served};
use explorer::{Explorer, config, recover};
use futures_util::FutureExt;
use libwb::cache::WriteMode;
use libwb::device::IoBuf;
use libwb::device::sim::{Crash, SimDevice, Simulation};
use libwb::format::{BLOCK_BYTES, SECTOR_BYTES, Sector, to_u64, to_usize};
use libwb::runtime::Runtime;
use std::sync::Arc;
use std::time::Duration;

mod explorer;
mod survivors;

pub use explorer::Tally;

/// The block size of the simulated devices.
const UNIT: u32 = 512;

/// One step of a script.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Writes a number of sectors from the first on.
    Write(u64, u64),
    /// Discards a number of sectors from the first on.
    Discard(u64, u64),
    /// Starts a discard. The next steps do not wait for it.
    DiscardBehind(u64, u64),
    /// Writes a number of sectors from the first on, durably.
    WriteFua(u64, u64),
    /// Reads a number of sectors from the first on.
    Read(u64, u64),
    /// Flushes, and waits for it.
    Flush,
    /// Starts a flush. The next steps do not wait for it.
    FlushBehind,
    /// Writes back all dirty data.
    Drain,
    /// Sends writes there first from now on.
    Mode(WriteMode),
    /// Caches whole blocks that are read twice from now on, with this many cells.
    Caching(u32),
    /// Writes back this many segments at a time from now on.
    Batch(u32),
    /// Lets milliseconds pass.
    Sleep(u64),
    /// Makes the backing device slower by this factor.
    Slow(u32),
    /// Closes the volume and opens it again.
    Reopen,
    /// Cuts the power, leaves only this of what is not durable, and opens the volume again.
    Cut(Left),
}

/// What a power cut within a script leaves.
#[derive(Clone, Copy, Debug)]
pub enum Left {
    /// Nothing that is not durable.
    Nothing,
    /// All but the oldest write to the cache device.
    AllButOldest,
    /// All but the newest write to the cache device, and of that the first sectors.
    NewestTorn,
}

/// A short piece of work on a small cache.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    /// What it is about.
    pub name: &'static str,
    /// How many segments the cache has.
    pub segments: u64,
    /// How many blocks the volume has.
    pub blocks: u64,
    /// What it does.
    pub steps: &'static [Step],
}

/// Runs a script on an engine and crashes it in every way.
///
/// # Errors
/// When a crash breaks a rule.
pub fn explore(
    engine: &Arc<dyn Engine>,
    script: &Script,
    extended: bool,
    seed: u64,
) -> Result<Tally, String> {
    let mut run = ScriptRun::new(engine.clone(), script, extended, seed);
    let result = run.steps(script.steps);
    let tally = run.explorer.tally();
    result.map(|()| tally).map_err(|text| {
        format!(
            "{}: {} segments, extended: {extended}, seed {seed}: {text}",
            script.name, script.segments
        )
    })
}
/// A script under way.
struct ScriptRun {
    simulation: Simulation,
    explorer: Arc<Explorer>,
    devices: [Arc<SimDevice>; 2],
    /// Whether the cache device prefers durable writes.
    durable_writes: bool,
}

impl ScriptRun {
    fn new(engine: Arc<dyn Engine>, script: &Script, extended: bool, seed: u64) -> ScriptRun {
        let simulation = Simulation::new(seed);
        let sectors = script.blocks * to_u64(BLOCK_BYTES / SECTOR_BYTES);
        let contents = [fresh_cache(script.segments, extended), fresh_backing(sectors)];
        let durable_writes = !seed.is_multiple_of(2);
        let devices = devices(&simulation, contents, durable_writes);
        let mut oracle = Oracle::new(sectors);
        oracle.keep_backing_history();
        let explorer = Explorer::new(engine, oracle, seed);
        ScriptRun { simulation, explorer: Arc::new(explorer), devices, durable_writes }
    }

    fn steps(&mut self, steps: &[Step]) -> Result<(), String> {
        let mut volume = self.open()?;
        for (nth, &step) in steps.iter().enumerate() {
            let done = match step {
                Step::Reopen => self.reopen(volume),
                Step::Cut(left) => self.cut(volume, left),
                step => self.step(&volume, step).map(|()| volume),
            };
            volume = done.map_err(|text| format!("in step {nth}, {step:?}: {text}"))?;
        }
        let closed = self.finish(volume.close());
        self.explorer.crash_now(&self.devices);
        closed.and_then(|()| self.explorer.verdict())
    }

    fn open(&self) -> Result<Arc<dyn EngineVolume>, String> {
        let (explorer, devices) = (self.explorer.clone(), self.devices.clone());
        self.simulation.runtime().observe(move || explorer.crash_now(&devices));
        let [cache, backing] = self.devices.clone();
        let runtime = Arc::new(self.simulation.runtime().clone());
        self.finish(self.explorer.engine.open(
            cache,
            backing,
            runtime,
            config(WriteMode::Back),
            None,
        ))
    }

    fn end(&self, volume: Arc<dyn EngineVolume>) {
        self.simulation.runtime().observe_no_more();
        drop(volume);
        self.simulation.kill_tasks();
    }

    fn reopen(&mut self, volume: Arc<dyn EngineVolume>) -> Result<Arc<dyn EngineVolume>, String> {
        self.finish(volume.close())?;
        self.end(volume);
        self.open()
    }

    fn cut(
        &mut self,
        volume: Arc<dyn EngineVolume>,
        left: Left,
    ) -> Result<Arc<dyn EngineVolume>, String> {
        self.explorer.crash_now(&self.devices);
        self.explorer.verdict()?;
        self.end(volume);
        let [cache, backing] = [0, 1].map(|device: usize| self.devices[device].snapshot());
        let numbers: Vec<usize> = cache.undurable().iter().map(|write| write.number).collect();
        let images = [
            cache.image(|number, sector| match left {
                Left::Nothing => false,
                Left::AllButOldest => numbers.first() != Some(&number),
                Left::NewestTorn => numbers.last() != Some(&number) || sector < 4,
            }),
            backing.image(|_, _| !matches!(left, Left::Nothing)),
        ];
        // This is the state from now on. A crash during recovery does not change it.
        let data = recover(&*self.explorer.engine, images.clone(), None)?;
        self.explorer.oracle.lock().recovered(Crash::PowerCut, &data);
        self.explorer.verdict()?;
        self.explorer.start_over();
        self.devices = devices(&self.simulation, images, self.durable_writes);
        self.open()
    }

    fn step(&self, volume: &Arc<dyn EngineVolume>, step: Step) -> Result<(), String> {
        let oracle = &self.explorer.oracle;
        match step {
            Step::Write(first, count) => {
                self.finish(self.change(volume, Change::Write, first, count))?;
            }
            Step::WriteFua(first, count) => {
                self.finish(self.change(volume, Change::WriteFua, first, count))?;
            }
            Step::Discard(first, count) => {
                self.finish(self.change(volume, Change::Discard, first, count))?;
            }
            Step::DiscardBehind(first, count) => {
                let discarding = self.change(volume, Change::Discard, first, count);
                self.simulation.runtime().spawn(Box::pin(async move {
                    let _ = discarding.await;
                }));
            }
            Step::Read(first, count) => {
                let began = oracle.lock().read_begins();
                let read =
                    volume.read(Sector(first), IoBuf::zeroed(to_usize(count) * SECTOR_BYTES));
                let data = self.finish(read)?;
                oracle.lock().read_ends(began, Sector(first), &data);
            }
            Step::Flush | Step::FlushBehind | Step::Drain => {
                let flushing = flush(self.served(volume), matches!(step, Step::Drain));
                match step {
                    Step::FlushBehind => self.simulation.runtime().spawn(Box::pin(async move {
                        let _ = flushing.await;
                    })),
                    _ => self.finish(flushing)?,
                }
            }
            Step::Mode(mode) => volume.tune(config(mode)),
            Step::Batch(segments) => {
                volume.tune(EngineConfig { batch: Some(segments), ..config(WriteMode::Back) });
            }
            Step::Caching(cells) => {
                volume.tune(EngineConfig { cells: Some(cells), ..config(WriteMode::Back) })
            }
            Step::Slow(factor) => self.devices[1].set_slowness(factor),
            Step::Sleep(millis) => {
                let sleep = self.simulation.runtime().sleep(Duration::from_millis(millis));
                self.finish(sleep.map(Ok))?;
            }
            Step::Reopen | Step::Cut(_) => {}
        }
        self.explorer.verdict()
    }

    fn served(&self, volume: &Arc<dyn EngineVolume>) -> Served {
        Served {
            volume: volume.clone(),
            oracle: self.explorer.oracle.clone(),
            runtime: self.simulation.runtime().clone(),
            unanswered: Default::default(),
        }
    }

    fn change(
        &self,
        volume: &Arc<dyn EngineVolume>,
        change: Change,
        first: u64,
        count: u64,
    ) -> EngineFuture<()> {
        let served = self.served(volume);
        let asked = Asked { change, first: Sector(first), count };
        Box::pin(async move { served.begin(asked).await })
    }

    fn finish<T>(&self, future: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        let done = self.simulation.block_on(future).unwrap_or_else(|stop| Err(stop.to_string()));
        self.explorer.verdict()?;
        done
    }
}

fn devices(
    simulation: &Simulation,
    [cache, backing]: [Vec<u8>; 2],
    durable_writes: bool,
) -> [Arc<SimDevice>; 2] {
    let device = |name, content| SimDevice::new(simulation.runtime(), name, content, UNIT);
    let cache = device("cache", cache).preferring_durable_writes(durable_writes);
    [cache, device("backing", backing)].map(Arc::new)
}
