//! A scenario that a seed decides: open a volume, use it, crash it, and begin again.

use super::engine::{Engine, EngineConfig, EngineVolume};
use super::oracle::Oracle;
use super::unanswered::Unanswered;
use backing::Backing;
use death::Heads;
use fastrand::Rng;
use futures_channel::oneshot;
use libwb::device::sim::{Crash, Faults, SimDevice, SimRuntime, Simulation, Stop};
use libwb::device::{BlockDevice, Device};
use libwb::format::{BLOCK_BYTES, RECORD_BLOCK_OFFSET, Sector, to_usize};
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

mod backing;
mod checks;
mod death;
mod kernel_compat;
mod load;
mod setup;

/// How many times to try a drain once the failing devices work again.
const DRAIN_TRIES: u32 = 5;

/// The result of one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeedReport {
    /// A hash of everything that happened.
    pub trace: u64,
    /// How often the process died or the power failed.
    pub crashes: u32,
}

/// A scenario in which the engine broke a rule.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    location: Location,
    /// What went wrong, with the history.
    pub text: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "seed {} fails: {}", self.seed, self.text)?;
        write!(f, "to repeat it: {}", command(self.seed, self.location))
    }
}

fn command(seed: u64, location: Location) -> String {
    let test = match location {
        Location::Here => "simulator",
        Location::Server => "cache_over_network",
    };
    format!("WB_SIM_SEED={seed} cargo test -p wb-tests --test {test} one_seed -- --nocapture")
}

/// Prints the seed if the engine panics.
struct SeedOnPanic(u64, Location);

impl Drop for SeedOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {} panics; to repeat it: {}", self.0, command(self.0, self.1));
        }
    }
}

/// Runs the scenario that a seed decides.
///
/// # Errors
/// When the engine breaks a rule.
pub fn run(engine: &dyn Engine, seed: u64) -> Result<SeedReport, Failure> {
    run_watched(engine, seed, &mut |_, _| ())
}

/// Called with the cache device and the backing device after each crash and each end of the
/// process.
pub type Watch<'a> = dyn FnMut(&SimDevice, &SimDevice) + 'a;

/// As [`run`], with an observer.
///
/// # Errors
/// As [`run`].
pub fn run_watched(
    engine: &dyn Engine,
    seed: u64,
    watch: &mut Watch<'_>,
) -> Result<SeedReport, Failure> {
    run_at(engine, seed, Location::Here, watch)
}

/// As [`run`], with the backing device on a server, over a network. Requests are slow and change
/// places, connections break, and the server hangs, dies and comes back with what it has flushed.
///
/// # Errors
/// As [`run`].
pub fn run_over_network(engine: &dyn Engine, seed: u64) -> Result<SeedReport, Failure> {
    run_at(engine, seed, Location::Server, &mut |_, _| ())
}

fn run_at(
    engine: &dyn Engine,
    seed: u64,
    location: Location,
    watch: &mut Watch<'_>,
) -> Result<SeedReport, Failure> {
    let _witness = SeedOnPanic(seed, location);
    let mut scenario = Scenario::new(engine, seed, location, watch);
    let result = scenario.run();
    let trace = scenario.runtime().trace();
    result.map(|()| SeedReport { trace, crashes: scenario.crashes }).map_err(|text| Failure {
        seed,
        location,
        text: format!("{text}\nsettings: {}", scenario.settings),
    })
}

/// Where the backing device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Location {
    Here,
    Server,
}

struct Scenario<'a> {
    engine: &'a dyn Engine,
    watch: &'a mut Watch<'a>,
    simulation: Simulation,
    rng: Rng,
    /// Decides what the simulator learned later. Drawing from `rng` would change the scenario of
    /// every seed.
    later_rng: Rng,
    /// Decides what happens to copies of the devices. The scenario itself does not depend on it.
    copy_rng: Rng,
    oracle: Arc<Mutex<Oracle>>,
    cache: Arc<SimDevice>,
    backing: Backing,
    /// The unit of the volume's I/O, in sectors.
    unit: u64,
    /// Whether devices fail in this scenario.
    faulty: bool,
    /// Whether the cache device carries the extension, which reveals rotten data.
    extended: bool,
    /// Whether the scenario loses the superblock record now and then. The kernel module hardly ever
    /// writes it, so recovery must do without it.
    forgetful: bool,
    /// What the tunables are chosen by.
    config: EngineConfig,
    /// The open volume, or the last one that was open.
    volume: Option<Arc<dyn EngineVolume>>,
    /// The worst crash since the volume was last verified.
    crashed: Option<Crash>,
    crashes: u32,
    heads: Heads,
    unanswered: Unanswered,
    /// The ends of requests that were handed out again.
    coming_again: Vec<oneshot::Receiver<()>>,
    settings: String,
}

/// How one stage of a process ended.
enum Stage<T> {
    Done(T),
    /// A crash halted the process during the stage.
    Halted,
}

impl Scenario<'_> {
    fn runtime(&self) -> &SimRuntime {
        self.simulation.runtime()
    }

    fn run(&mut self) -> Result<(), String> {
        for life in 0..self.rng.u32(1..8) {
            self.oracle.lock().note(format!("life {life} begins"));
            if let Stage::Halted = self.run_process()? {
                self.crash();
                self.repair_a_copy()?;
            }
        }
        self.run_last_process()
    }

    /// Opens the volume, verifies it, uses it, and closes it, unless a crash halts the process
    /// first.
    fn run_process(&mut self) -> Result<Stage<()>, String> {
        if let Some(points) = match self.rng.u32(..10) {
            0..2 => Some(self.rng.u64(1..80)),
            2..8 => Some(1 << self.rng.u32(3..12)).map(|most| self.rng.u64(most / 2..most)),
            _ => None,
        } {
            self.runtime().halt_after_io(points);
        }
        let Stage::Done(volume) = self.open()? else { return Ok(Stage::Halted) };
        self.hand_out_again(&volume);
        let Stage::Done(()) = self.verify_all(&volume)? else { return Ok(Stage::Halted) };
        let Stage::Done(()) = self.run_clients(&volume)? else { return Ok(Stage::Halted) };
        if self.faulty && self.later_rng.u32(..3) == 0 {
            return self.close_in_trouble(volume);
        }
        self.heal();
        if self.config.impatient {
            volume.tune(EngineConfig { impatient: false, ..self.config });
        }
        // After a device failure, a restart may be the engine's only way to recover.
        match self.rng.u32(..if self.faulty { 2 } else { 6 }) {
            0..2 => Ok(Stage::Halted),
            2 => self.sleep_a_while().map(|()| Stage::Halted),
            n => self.close(volume, n == 3),
        }
    }

    fn open(&mut self) -> Result<Stage<Arc<dyn EngineVolume>>, String> {
        let cache: Device = self.cache.clone();
        let config = EngineConfig { seed: self.rng.u64(..), impatient: false, ..self.config };
        let (runtime, head) = (Arc::new(self.runtime().clone()), self.head()?);
        let (engine, connecting) = (self.engine, self.backing.open());
        let opening = async { engine.open(cache, connecting.await?, runtime, config, head).await };
        Ok(match self.finish("opening", opening)? {
            Stage::Done(Ok(volume)) => {
                self.volume = Some(volume.clone());
                Stage::Done(volume)
            }
            Stage::Done(Err(e)) => return Err(self.failed(&format!("opening failed: {e}"))),
            Stage::Halted => Stage::Halted,
        })
    }

    fn close(&mut self, volume: Arc<dyn EngineVolume>, drain: bool) -> Result<Stage<()>, String> {
        self.heads.forget();
        if drain {
            self.backing.disk().heal_bad();
        }
        if drain && let Stage::Halted = self.settle("drain", || volume.drain())? {
            return Ok(Stage::Halted);
        }
        // A close erases segments that the record covers, so the log needs its record from now on.
        self.forgetful = false;
        if self.rng.bool() && !self.config.strict {
            self.discard_meanwhile(&volume);
        }
        if let Stage::Halted = self.settle("close", || volume.close())? {
            return Ok(Stage::Halted);
        }
        drop(volume);
        self.oracle.lock().note("closed");
        self.end_process(Crash::Kill);
        self.verify_as_kernel_module()?;
        Ok(Stage::Done(()))
    }

    /// Runs an operation that implies a flush, and repeats it after device failures.
    fn settle(
        &mut self,
        what: &'static str,
        operation: impl Fn() -> super::engine::EngineFuture<()>,
    ) -> Result<Stage<()>, String> {
        for left in (0..DRAIN_TRIES).rev() {
            let began = self.oracle.lock().flush_begins();
            let Stage::Done(result) = self.finish(what, operation())? else {
                return Ok(Stage::Halted);
            };
            self.oracle.lock().flush_ends(what, began, result.is_ok());
            match result {
                Ok(()) => return Ok(Stage::Done(())),
                Err(e) if left == 0 || !self.faulty => {
                    return Err(self.failed(&format!("{what} failed: {e}")));
                }
                Err(_) => self.sleep(Duration::from_secs(60))?,
            }
        }
        Ok(Stage::Done(()))
    }

    /// Ends the process without warning.
    fn crash(&mut self) {
        let crash = match self.rng.u32(..3) {
            0 => Crash::Kill,
            _ if self.heads.died_within() => Crash::Kill,
            _ => Crash::PowerCut,
        };
        self.crashes += 1;
        if crash == Crash::Kill && self.heads.is_left() {
            let now = self.runtime().now();
            self.oracle.lock().note(format!("the process alone dies at {now:?}"));
            return self.end_process(crash);
        }
        self.heads.forget();
        self.unanswered.lock().clear();
        self.oracle.lock().note(format!("{crash:?} at {:?}", self.runtime().now()));
        self.end_process(crash);
        self.flip_bits();
        // A later kill does not change what a power cut left on the media.
        if self.crashed != Some(Crash::PowerCut) {
            self.crashed = Some(crash);
        }
    }

    /// Drops all tasks, and leaves the devices as a crash or the end of a process does.
    fn end_process(&mut self, crash: Crash) {
        self.simulation.kill_tasks();
        self.coming_again.clear();
        self.judge_backing_alone();
        self.cache = Arc::new(self.cache.crash(crash));
        self.backing.crash(crash);
        (self.watch)(&self.cache, &self.backing.disk());
        self.judge_backing_alone();
        if crash == Crash::PowerCut && self.forgetful && self.rng.bool() {
            self.oracle.lock().record_lost();
            let mut content = self.cache.content();
            content[to_usize(RECORD_BLOCK_OFFSET)..][..BLOCK_BYTES].fill(0);
            self.cache =
                Arc::new(SimDevice::new(self.runtime(), "cache", content, self.cache.block_size()));
        }
    }

    /// Without another crash, the volume must be right, and a drain must make the backing device
    /// equal to it.
    fn run_last_process(&mut self) -> Result<(), String> {
        self.oracle.lock().note("the last life begins");
        self.backing.disk().heal_bad();
        self.heads.live_on();
        let Stage::Done(volume) = self.open()? else {
            return Err(self.failed("halted for no reason"));
        };
        self.hand_out_again(&volume);
        self.verify_all(&volume)?;
        self.await_what_came_again()?;
        self.settle("drain", || volume.drain())?;
        self.settle("close", || volume.close())?;
        drop(volume);
        self.end_process(Crash::Kill);
        self.verify_as_kernel_module()?;
        self.check_log()?;
        let content = self.backing.disk().durable();
        let mut oracle = self.oracle.lock();
        oracle.note("the durable content of the backing device alone");
        let began = oracle.read_begins();
        oracle.read_ends(began, Sector(0), &content);
        drop(oracle);
        self.verdict()
    }

    fn heal(&mut self) {
        self.cache.set_faults(Faults::default());
        self.cache.heal_rot();
        self.backing.disk().set_faults(Faults::default());
    }

    fn sleep_a_while(&mut self) -> Result<(), String> {
        let millis = self.rng.u64(..20_000);
        self.sleep(Duration::from_millis(millis))
    }

    fn sleep(&mut self, time: Duration) -> Result<(), String> {
        let sleep = self.runtime().sleep(time);
        self.finish("sleeping", sleep).map(|_| ())
    }

    /// Runs everything until `future` is done.
    fn finish<T>(&self, what: &str, future: impl Future<Output = T>) -> Result<Stage<T>, String> {
        let result = self.simulation.block_on(future);
        self.verdict()?;
        match result {
            Ok(value) => Ok(Stage::Done(value)),
            Err(Stop::Halted) => Ok(Stage::Halted),
            Err(stop) => Err(self.failed(&format!("{what}: {stop}"))),
        }
    }

    fn verdict(&self) -> Result<(), String> {
        self.oracle.lock().failure().map_or(Ok(()), |text| Err(text.to_string()))
    }

    fn failed(&self, text: &str) -> String {
        let mut oracle = self.oracle.lock();
        oracle.fail(text);
        oracle.failure().unwrap_or(text).to_string()
    }
}
