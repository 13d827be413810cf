//! Every crash of a short script: the power fails before every change on a device, and of what is
//! not durable then every combination of writes survives, and the newest write in parts.
//!
//! A crash that leaves what an earlier one has left is recovered only once. Nothing changes between
//! two changes on the devices but what has been acknowledged, which only grows; so just before each
//! change, the most is asked.

use super::devices::{fresh_backing, fresh_cache, record_of};
use super::engine::{Engine, EngineConfig, EngineFuture, EngineVolume};
use super::module;
use super::oracle::Oracle;
use super::stamp;
use fastrand::Rng;
use futures_util::FutureExt;
use libwb::cache::WriteMode;
use libwb::device::sim::{SimDevice, Simulation, Snapshot};
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{BLOCK_BYTES, SECTOR_BYTES, Sector, SegmentId, crc32c, to_u64, to_usize};
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// Up to so many writes that are not durable, all their combinations are tried; of more, a choice.
const MAX_COMBINED: usize = 8;
/// Random combinations where there are more.
const RANDOM_COMBINATIONS: u32 = 64;
/// Of so many crashes, about one is also repaired for the kernel module.
const REPAIRED_ONE_IN: u32 = 16;
/// The block size of the simulated devices.
const UNIT: u32 = 512;

/// One step of a script.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Writes so many sectors from the first on.
    Write(u64, u64),
    /// Discards so many sectors from the first on.
    Discard(u64, u64),
    /// Begins to discard. The steps that follow do not wait for it.
    DiscardBehind(u64, u64),
    /// Writes so many sectors from the first on, durably.
    WriteFua(u64, u64),
    /// Reads so many sectors from the first on.
    Read(u64, u64),
    /// Flushes, and waits for it.
    Flush,
    /// Begins to flush. The steps that follow do not wait for it.
    FlushBehind,
    /// Writes back all that is dirty.
    Drain,
    /// From now on, writes go there first.
    Mode(WriteMode),
    /// From now on, whole blocks that are read twice are cached, with so many on their way at a
    /// time.
    Caching(u32),
    /// From now on, so many segments are written back at a time.
    Batch(u32),
    /// Lets milliseconds pass.
    Sleep(u64),
    /// Makes the backing device so many times slower.
    Slow(u32),
    /// Closes the volume and opens it again.
    Reopen,
    /// The power fails, and of what is not durable only this is left; the volume is opened again.
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
    /// What is done.
    pub steps: &'static [Step],
}

/// What a script came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Moments at which the power failed.
    pub moments: u64,
    /// Crashes: moments, and what of the writes survived.
    pub crashes: u64,
    /// Of them those that left different devices.
    pub recoveries: u64,
}

/// Runs a script on an engine, with every crash.
///
/// # Errors
/// When a crash breaks a rule.
pub fn explore(
    engine: &Arc<dyn Engine>,
    script: &Script,
    extended: bool,
    seed: u64,
) -> Result<Tally, String> {
    let mut run = Run::new(engine.clone(), script, extended, seed);
    let result = run.steps(script.steps);
    let tally = run.explorer.tally.lock();
    result.map(|()| *tally).map_err(|text| {
        format!(
            "{}: {} segments, extended: {extended}, seed {seed}: {text}",
            script.name, script.segments
        )
    })
}

/// What of the writes that are not durable survives.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Survivors {
    /// For the cache and the backing device, for each write whether any of it is there. No `false`
    /// at the end.
    writes: [Vec<bool>; 2],
    torn: Option<Torn>,
}

/// A write that survives in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Torn {
    device: usize,
    number: usize,
    /// In sectors from its first.
    cut: usize,
    /// What is before the cut survives, else what is after it.
    front: bool,
}

impl Survivors {
    fn has(&self, device: usize, number: usize, sector: usize) -> bool {
        match self.torn {
            Some(torn) if (torn.device, torn.number) == (device, number) => {
                (sector < torn.cut) == torn.front
            }
            _ => self.writes[device].get(number).is_some_and(|&kept| kept),
        }
    }

    fn images(&self, moment: &[Snapshot; 2]) -> [Vec<u8>; 2] {
        let image =
            |device: usize| moment[device].image(|number, sector| self.has(device, number, sector));
        [image(0), image(1)]
    }
}

/// All that a power cut at a moment may leave, or a choice of it where that is too much.
fn outcomes(moment: &[Snapshot; 2], rng: &mut Rng) -> Vec<Survivors> {
    let undurable: Vec<(usize, usize)> = (0..2)
        .flat_map(|device| {
            moment[device].undurable().iter().map(move |write| (device, write.number))
        })
        .collect();
    let survivors = |kept: &dyn Fn(usize) -> bool, torn| {
        let mut writes = [0, 1].map(|device: usize| vec![true; moment[device].submitted()]);
        for (nth, &(device, number)) in undurable.iter().enumerate() {
            let in_part = matches!(torn, Some(Torn { device: d, number: n, .. }) if (d, n) == (device, number));
            writes[device][number] = kept(nth) || in_part;
        }
        for device in &mut writes {
            device.truncate(device.iter().rposition(|&kept| kept).map_or(0, |last| last + 1));
        }
        Survivors { writes, torn }
    };
    let mut outcomes: Vec<Survivors> = combinations(undurable.len(), rng)
        .iter()
        .map(|kept| survivors(&|nth| kept[nth], None))
        .collect();
    for torn in (0..2).flat_map(|device| tears(device, &moment[device])) {
        outcomes.extend([true, false].map(|others| survivors(&|_| others, Some(torn))));
    }
    outcomes
}

/// Which of `count` writes survive.
fn combinations(count: usize, rng: &mut Rng) -> Vec<Vec<bool>> {
    let of = |kept: &dyn Fn(usize) -> bool| (0..count).map(kept).collect::<Vec<bool>>();
    if count <= MAX_COMBINED {
        return (0..1 << count).map(|mask: u32| of(&|nth| mask >> nth & 1 == 1)).collect();
    }
    let mut chosen = vec![of(&|_| true), of(&|_| false)];
    for one in 0..count {
        chosen.extend([
            of(&|nth| nth == one),
            of(&|nth| nth != one),
            of(&|nth| nth < one),
            of(&|nth| nth > one),
        ]);
    }
    chosen.extend(
        (0..RANDOM_COMBINATIONS).map(|_| (0..count).map(|_| rng.bool()).collect::<Vec<bool>>()),
    );
    chosen
}

/// The ways to tear the newest write to a device: near its ends, at its first block's end, and in
/// the middle.
fn tears(device: usize, moment: &Snapshot) -> Vec<Torn> {
    let Some(newest) = moment.undurable().last() else { return Vec::new() };
    let mut cuts = vec![
        1,
        2,
        BLOCK_BYTES / SECTOR_BYTES,
        newest.sectors / 2,
        newest.sectors.saturating_sub(1),
    ];
    cuts.sort_unstable();
    cuts.dedup();
    cuts.retain(|cut| (1..newest.sectors).contains(cut));
    let both = |cut| [true, false].map(|front| Torn { device, number: newest.number, cut, front });
    cuts.into_iter().flat_map(both).collect()
}

/// Crashes at every moment that it is shown.
struct Explorer {
    engine: Arc<dyn Engine>,
    oracle: Arc<Mutex<Oracle>>,
    /// What each crash so far has left.
    seen: Mutex<HashMap<Survivors, After>>,
    /// What devices and volumes held after those crashes. Most held the same, so that each content
    /// is kept once.
    contents: Mutex<HashSet<Content>>,
    tally: Mutex<Tally>,
    rng: Mutex<Rng>,
    failure: Mutex<Option<String>>,
}

impl Explorer {
    fn crash_now(&self, devices: &[Arc<SimDevice>; 2]) {
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
        let recovered = recover(engine, images).map(|data| kept(&data));
        After { recovered, backing, written_back }
    }

    fn judge(&self, oracle: &Oracle) -> Result<(), String> {
        oracle.allows(self.recovered.as_ref().map_err(Clone::clone)?)?;
        oracle.allows_alone(&self.backing, self.written_back, false)
    }
}

/// What a volume reads as after a crash that left these devices. After a drain, the backing device
/// is the same.
fn recover(engine: &dyn Engine, [cache, backing]: [Vec<u8>; 2]) -> Result<Vec<u8>, String> {
    let simulation = Simulation::new(1);
    // A repair takes far longer than all else, so some of them do, whichever.
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

/// A script under way.
struct Run {
    simulation: Simulation,
    explorer: Arc<Explorer>,
    devices: [Arc<SimDevice>; 2],
}

impl Run {
    fn new(engine: Arc<dyn Engine>, script: &Script, extended: bool, seed: u64) -> Run {
        let simulation = Simulation::new(seed);
        let sectors = script.blocks * to_u64(BLOCK_BYTES / SECTOR_BYTES);
        let devices =
            devices(&simulation, [fresh_cache(script.segments, extended), fresh_backing(sectors)]);
        let mut oracle = Oracle::new(sectors);
        oracle.keep_backing_history();
        let explorer = Explorer {
            engine,
            oracle: Arc::new(Mutex::new(oracle)),
            seen: Mutex::default(),
            contents: Mutex::default(),
            tally: Mutex::default(),
            rng: Mutex::new(Rng::with_seed(seed)),
            failure: Mutex::default(),
        };
        Run { simulation, explorer: Arc::new(explorer), devices }
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
        closed.and_then(|()| self.verdict())
    }

    fn open(&self) -> Result<Arc<dyn EngineVolume>, String> {
        let (explorer, devices) = (self.explorer.clone(), self.devices.clone());
        self.simulation.runtime().observe(move || explorer.crash_now(&devices));
        let [cache, backing] = self.devices.clone();
        let runtime = Arc::new(self.simulation.runtime().clone());
        self.finish(self.explorer.engine.open(cache, backing, runtime, config(WriteMode::Back)))
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
        self.verdict()?;
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
        // From here on this is the state, and a crash in the midst of recovery does not change it.
        let data = recover(&*self.explorer.engine, images.clone())?;
        self.explorer.oracle.lock().recovered(libwb::device::sim::Crash::PowerCut, &data);
        self.verdict()?;
        self.explorer.seen.lock().clear();
        self.explorer.contents.lock().clear();
        self.devices = devices(&self.simulation, images);
        self.open()
    }

    fn step(&self, volume: &Arc<dyn EngineVolume>, step: Step) -> Result<(), String> {
        let oracle = &self.explorer.oracle;
        match step {
            Step::Write(first, count) => {
                let write = oracle.lock().write_begins(Sector(first), count);
                let mut data = vec![0; to_usize(count) * SECTOR_BYTES];
                stamp::fill(&mut data, Sector(first), write);
                self.finish(volume.write(Sector(first), data))?;
                let newest = volume.newest();
                let mut oracle = oracle.lock();
                oracle.write_ends(write, Sector(first), count, true);
                oracle.logged(write, Sector(first), count, newest);
            }
            Step::WriteFua(first, count) => {
                let write = oracle.lock().write_begins(Sector(first), count);
                let mut data = vec![0; to_usize(count) * SECTOR_BYTES];
                stamp::fill(&mut data, Sector(first), write);
                self.finish(volume.write_fua(Sector(first), data))?;
                oracle.lock().durable_write_ends(write, Sector(first), count, true);
            }
            Step::Discard(first, count) => {
                self.finish(discard(oracle.clone(), volume.clone(), Sector(first), count))?;
            }
            Step::DiscardBehind(first, count) => {
                let discarding = discard(oracle.clone(), volume.clone(), Sector(first), count);
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
                let flushing = flush(oracle.clone(), volume.clone(), matches!(step, Step::Drain));
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
        self.verdict()
    }

    fn finish<T>(&self, future: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        let done = self.simulation.block_on(future).unwrap_or_else(|stop| Err(stop.to_string()));
        self.verdict()?;
        done
    }

    fn verdict(&self) -> Result<(), String> {
        if let Some(text) = &*self.explorer.failure.lock() {
            return Err(text.clone());
        }
        self.explorer.oracle.lock().failure().map_or(Ok(()), |text| Err(text.to_string()))
    }
}

/// Tunables that are the same each time, but for the mode.
fn config(mode: WriteMode) -> EngineConfig {
    EngineConfig { seed: 1, mode: Some(mode), ..EngineConfig::default() }
}

fn discard(
    oracle: Arc<Mutex<Oracle>>,
    volume: Arc<dyn EngineVolume>,
    first: Sector,
    count: u64,
) -> EngineFuture<()> {
    Box::pin(async move {
        let discard = oracle.lock().discard_begins(first, count);
        let result = volume.discard(first, count).await;
        oracle.lock().durable_write_ends(discard, first, count, result.is_ok());
        result
    })
}

fn flush(
    oracle: Arc<Mutex<Oracle>>,
    volume: Arc<dyn EngineVolume>,
    drain: bool,
) -> EngineFuture<()> {
    Box::pin(async move {
        let began = oracle.lock().flush_begins();
        let result = if drain { volume.drain().await } else { volume.flush().await };
        oracle.lock().flush_ends(if drain { "drain" } else { "flush" }, began, result.is_ok());
        result
    })
}

fn devices(simulation: &Simulation, [cache, backing]: [Vec<u8>; 2]) -> [Arc<SimDevice>; 2] {
    let device =
        |name, content| Arc::new(SimDevice::new(simulation.runtime(), name, content, UNIT));
    [device("cache", cache), device("backing", backing)]
}
