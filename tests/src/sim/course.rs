//! A simulated course of events: a volume is opened, used, and crashed, again and again, as a seed
//! decides.

use super::clients::{Client, Habits};
use super::devices::{fresh_backing, fresh_cache, record_of, spoil_some, trouble};
use super::oracle::Oracle;
use super::rot;
use super::volume::{Engine, Taste, Volume};
use fastrand::Rng;
use futures_channel::oneshot;
use libwb::cache::WriteMode;
use libwb::device::sim::{Crash, Faults, SimDevice, SimRuntime, Simulation, Stop};
use libwb::device::{BlockDevice, Device, IoBuf, MemDevice};
use libwb::format::{BLOCK_BYTES, RECORD_BLOCK_OFFSET, SECTOR_BYTES, Sector, to_u64, to_usize};
use libwb::log::{Use, recovery, scan, superblock};
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

mod handover;

/// How often a drain is tried again once failing devices are sound again.
const DRAIN_TRIES: u32 = 5;

/// What a seed came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// A hash of everything that happened.
    pub trace: u64,
    /// How often the process died or the power failed.
    pub crashes: u32,
}

/// A course that went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What went wrong, with the history.
    pub text: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "seed {} fails: {}", self.seed, self.text)?;
        write!(f, "to repeat it: {}", command(self.seed))
    }
}

fn command(seed: u64) -> String {
    format!("WB_SIM_SEED={seed} cargo test -p wb-tests --test simulator one_seed -- --nocapture")
}

/// Names the seed should the engine panic.
struct Witness(u64);

impl Drop for Witness {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {} panics; to repeat it: {}", self.0, command(self.0));
        }
    }
}

/// Runs the course that a seed decides.
///
/// # Errors
/// When the engine breaks a rule.
pub fn run(engine: &dyn Engine, seed: u64) -> Result<Report, Failure> {
    run_watched(engine, seed, &mut |_, _| ())
}

/// Who is shown the cache device and the backing device as each crash, and each end of the process,
/// leaves them.
pub type Watch<'a> = dyn FnMut(&SimDevice, &SimDevice) + 'a;

/// As [`run`], with somebody who watches.
///
/// # Errors
/// As [`run`].
pub fn run_watched(
    engine: &dyn Engine,
    seed: u64,
    watch: &mut Watch<'_>,
) -> Result<Report, Failure> {
    let _witness = Witness(seed);
    let mut course = Course::new(engine, seed, watch);
    let result = course.run();
    let trace = course.runtime().trace();
    result
        .map(|()| Report { trace, crashes: course.crashes })
        .map_err(|text| Failure { seed, text: format!("{text}\nsettings: {}", course.settings) })
}

struct Course<'a> {
    engine: &'a dyn Engine,
    watch: &'a mut Watch<'a>,
    simulation: Simulation,
    rng: Rng,
    /// Decides what came to the simulator later, so that the courses of seeds without it stay as
    /// they were.
    later: Rng,
    /// Decides what is done with copies of the devices, which changes nothing of the course.
    aside: Rng,
    oracle: Arc<Mutex<Oracle>>,
    cache: Arc<SimDevice>,
    backing: Arc<SimDevice>,
    /// The unit of the volume's I/O, in sectors.
    unit: u64,
    /// Whether devices fail in this course.
    faulty: bool,
    /// Whether the cache device carries the extension, so that rot of its data is noticed.
    extended: bool,
    /// Whether the superblock record is lost now and then. The kernel module hardly ever writes it,
    /// and the log must be recovered without.
    forgetful: bool,
    /// What the tunables may be.
    taste: Taste,
    /// The engine at work, or the last one that was.
    volume: Option<Arc<dyn Volume>>,
    /// The worst crash since the volume was last looked at.
    crashed: Option<Crash>,
    crashes: u32,
    settings: String,
}

/// How one life of the engine went on after a stage of it.
enum Life<T> {
    Goes(T),
    /// It is halted in the middle of something, for a crash.
    Halted,
}

impl<'a> Course<'a> {
    fn new(engine: &'a dyn Engine, seed: u64, watch: &'a mut Watch<'a>) -> Course<'a> {
        let simulation = Simulation::new(seed);
        let runtime = simulation.runtime().clone();
        let mut rng = Rng::with_seed(!seed);
        let segments = match rng.u32(..3) {
            0 => 3,
            1 => rng.u64(1..=14),
            _ => rng.u64(8..=20),
        };
        let unit = if rng.u32(..8) == 0 { 8 } else { 1 };
        let block_size = if rng.u32(..4) == 0 { 4096 } else { 512 };
        let cache_block_size = if rng.u32(..4) == 0 { 4096 } else { 512 };
        let sectors = volume_sectors(&mut rng, block_size);
        let extended = rng.bool();
        let cache =
            SimDevice::new(&runtime, "cache", fresh_cache(segments, extended), cache_block_size);
        let backing = SimDevice::new(&runtime, "backing", fresh_backing(sectors), block_size);
        let slowness = rng.choice([1, 1, 10, 100]).unwrap_or(1);
        backing.set_slowness(slowness);
        let faulty = rng.u32(..5) == 0;
        let forgetful = !extended && rng.u32(..4) == 0;
        // Without its record, the log is written back again from further back.
        let strict = rng.u32(..6) == 0 && !forgetful;
        // Nothing goes around the log there: in strict order it may not, and without its record
        // older versions come back.
        let all_logged = forgetful || strict || !seed.is_multiple_of(4);
        let mode = all_logged.then_some(WriteMode::Back);
        let taste = Taste { strict, mode, ..Taste::default() };
        let mut oracle = Oracle::new(sectors);
        if strict || seed.is_multiple_of(2) {
            oracle.keep_ledger();
        }
        if engine.tears_blocks() {
            oracle.let_blocks_tear();
        }
        let settings = format!(
            "{segments} segments, extended: {extended}, {sectors} sectors, block sizes \
             {cache_block_size} and {block_size}, backing device {slowness} times slower, faulty: \
             {faulty}, forgetful: {forgetful}, strict: {strict}, all through the log: {all_logged}"
        );
        Course {
            engine,
            watch,
            simulation,
            rng,
            later: Rng::with_seed(seed.rotate_left(32)),
            aside: Rng::with_seed(!seed.rotate_left(32)),
            oracle: Arc::new(Mutex::new(oracle)),
            cache: Arc::new(cache),
            backing: Arc::new(backing),
            unit,
            faulty,
            extended,
            forgetful,
            taste,
            volume: None,
            crashed: None,
            crashes: 0,
            settings,
        }
    }

    fn runtime(&self) -> &SimRuntime {
        self.simulation.runtime()
    }

    fn run(&mut self) -> Result<(), String> {
        for life in 0..self.rng.u32(1..8) {
            self.oracle.lock().note(format!("life {life} begins"));
            if let Life::Halted = self.life()? {
                self.crash();
                self.repair_a_copy()?;
            }
        }
        self.last_life()
    }

    /// Opens the volume, looks at it, uses it, and closes it or is halted on the way.
    fn life(&mut self) -> Result<Life<()>, String> {
        if let Some(points) = match self.rng.u32(..10) {
            0..2 => Some(self.rng.u64(1..80)),
            2..8 => Some(1 << self.rng.u32(3..12)).map(|most| self.rng.u64(most / 2..most)),
            _ => None,
        } {
            self.runtime().halt_after_io(points);
        }
        let Life::Goes(volume) = self.open()? else { return Ok(Life::Halted) };
        let Life::Goes(()) = self.look(&volume)? else { return Ok(Life::Halted) };
        let Life::Goes(()) = self.work(&volume)? else { return Ok(Life::Halted) };
        if self.faulty && self.later.u32(..3) == 0 {
            return self.close_in_trouble(volume);
        }
        self.heal();
        // A device that has failed may leave the engine no way but to start again.
        match self.rng.u32(..if self.faulty { 2 } else { 6 }) {
            0..2 => Ok(Life::Halted),
            2 => self.sleep_a_while().map(|()| Life::Halted),
            n => self.close(volume, n == 3),
        }
    }

    fn open(&mut self) -> Result<Life<Arc<dyn Volume>>, String> {
        let (cache, backing): (Device, Device) = (self.cache.clone(), self.backing.clone());
        let taste = Taste { number: self.rng.u64(..), ..self.taste };
        let opening = self.engine.open(cache, backing, Arc::new(self.runtime().clone()), taste);
        Ok(match self.finish("opening", opening)? {
            Life::Goes(Ok(volume)) => {
                self.volume = Some(volume.clone());
                Life::Goes(volume)
            }
            Life::Goes(Err(e)) => return Err(self.failed(&format!("opening failed: {e}"))),
            Life::Halted => Life::Halted,
        })
    }

    /// Reads the whole volume and has the oracle judge it.
    fn look(&mut self, volume: &Arc<dyn Volume>) -> Result<Life<()>, String> {
        let began = self.oracle.lock().read_begins();
        let mut data = Vec::new();
        let chunk = to_u64(SECTOR_BYTES) * self.unit * (1 << self.rng.u32(4..9));
        while to_u64(data.len()) < volume.size() {
            let at = to_u64(data.len());
            let length = chunk.min(volume.size() - at);
            let reading =
                volume.read(Sector(at / to_u64(SECTOR_BYTES)), IoBuf::zeroed(to_usize(length)));
            match self.finish("reading", reading)? {
                Life::Goes(Ok(part)) => data.extend_from_slice(&part),
                Life::Goes(Err(e)) => return Err(self.failed(&format!("reading failed: {e}"))),
                Life::Halted => return Ok(Life::Halted),
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
        self.verdict().map(Life::Goes)
    }

    /// Lets clients loose on the volume.
    fn work(&mut self, volume: &Arc<dyn Volume>) -> Result<Life<()>, String> {
        let mut habits = Habits::any(&mut self.rng, self.unit);
        if self.taste.strict {
            habits.discard_nothing();
        }
        // What a discard has made the log forget, only the record keeps from coming back.
        self.forgetful &= !habits.discards();
        let clients = self.rng.u32(1..=8);
        let operations = 1 << self.rng.u32(0..8);
        let mut ends = Vec::new();
        for _ in 0..clients {
            let client = Client {
                volume: volume.clone(),
                oracle: self.oracle.clone(),
                runtime: self.runtime().clone(),
                rng: self.rng.fork(),
                habits: habits.clone(),
                faulty: self.faulty,
                taste: self.taste,
            };
            let (done, end) = oneshot::channel();
            let operations = self.rng.u32(1..=operations);
            self.runtime().spawn(Box::pin(async move {
                client.run(operations).await;
                let _ = done.send(());
            }));
            ends.push(end);
        }
        if self.faulty && self.later.u32(..3) == 0 {
            spoil_some(&self.backing, &mut self.later);
        }
        if self.faulty {
            let rng = self.rng.fork();
            let devices = [self.cache.clone(), self.backing.clone()];
            let trouble = trouble(self.runtime().clone(), devices, self.extended, rng);
            self.runtime().spawn(Box::pin(trouble));
        }
        let all = futures_util::future::join_all(ends);
        let life = self.finish("the clients' work", all)?;
        Ok(match life {
            Life::Goes(_) => Life::Goes(()),
            Life::Halted => Life::Halted,
        })
    }

    fn close(&mut self, volume: Arc<dyn Volume>, drain: bool) -> Result<Life<()>, String> {
        if drain {
            self.backing.heal_bad();
        }
        if drain && let Life::Halted = self.settle("drain", || volume.drain())? {
            return Ok(Life::Halted);
        }
        // A close erases segments that the record covers, so from now on the log needs its record.
        self.forgetful = false;
        if self.rng.bool() && !self.taste.strict {
            self.discard_meanwhile(&volume);
        }
        if let Life::Halted = self.settle("close", || volume.close())? {
            return Ok(Life::Halted);
        }
        drop(volume);
        self.oracle.lock().note("closed");
        self.end_process(Crash::Kill);
        self.look_as_the_module_does()?;
        Ok(Life::Goes(()))
    }

    /// Discards that come at any moment of the close that follows, and may fail.
    fn discard_meanwhile(&mut self, volume: &Arc<dyn Volume>) {
        let (volume, oracle, runtime) =
            (volume.clone(), self.oracle.clone(), self.runtime().clone());
        let mut rng = self.rng.fork();
        let unit = self.unit;
        self.runtime().spawn(Box::pin(async move {
            let units = volume.size() / (to_u64(SECTOR_BYTES) * unit);
            for _ in 0..rng.u32(1..20) {
                let micros = rng.u64(..2000);
                runtime.sleep(Duration::from_micros(micros)).await;
                let first = rng.u64(..units);
                let (first, count) = (Sector(first * unit), rng.u64(1..=units - first) * unit);
                let discard = oracle.lock().discard_begins(first, count);
                let done = volume.discard(first, count).await;
                oracle.lock().durable_write_ends(discard, first, count, done.is_ok());
            }
        }));
    }

    /// Something that implies a flush. Where devices have failed, it is tried again.
    fn settle(
        &mut self,
        what: &'static str,
        operation: impl Fn() -> super::volume::Outcome<()>,
    ) -> Result<Life<()>, String> {
        for left in (0..DRAIN_TRIES).rev() {
            let began = self.oracle.lock().flush_begins();
            let Life::Goes(result) = self.finish(what, operation())? else {
                return Ok(Life::Halted);
            };
            self.oracle.lock().flush_ends(what, began, result.is_ok());
            match result {
                Ok(()) => return Ok(Life::Goes(())),
                Err(e) if left == 0 || !self.faulty => {
                    return Err(self.failed(&format!("{what} failed: {e}")));
                }
                Err(_) => self.sleep(Duration::from_secs(60))?,
            }
        }
        Ok(Life::Goes(()))
    }

    /// Ends a life in the middle of it.
    fn crash(&mut self) {
        let crash = if self.rng.u32(..3) == 0 { Crash::Kill } else { Crash::PowerCut };
        self.crashes += 1;
        self.oracle.lock().note(format!("{crash:?} at {:?}", self.runtime().now()));
        self.end_process(crash);
        self.flip_bits();
        // What a power cut has left is on the media, and a later kill does not change that.
        if self.crashed != Some(Crash::PowerCut) {
            self.crashed = Some(crash);
        }
    }

    /// At times, bits flip in a copy of the cache device.
    fn flip_bits(&self) {
        // Not the course's own dice: what comes after is the same.
        let mut rng = Rng::with_seed(self.runtime().trace());
        let Some(recover) = self.engine.recovery().filter(|_| self.extended && rng.u32(..3) == 0)
        else {
            return;
        };
        let flips = rot::check(self.cache.content(), self.backing.content(), recover, &mut rng);
        if let Err(text) = flips {
            self.oracle.lock().fail(&text);
        }
    }

    /// Drops all tasks, and leaves the devices as a crash, or the end of a process, does.
    fn end_process(&mut self, crash: Crash) {
        self.simulation.kill_tasks();
        self.judge_backing_alone();
        self.cache = Arc::new(self.cache.crash(crash));
        self.backing = Arc::new(self.backing.crash(crash));
        (self.watch)(&self.cache, &self.backing);
        self.judge_backing_alone();
        if crash == Crash::PowerCut && self.forgetful && self.rng.bool() {
            self.oracle.lock().record_lost();
            let mut content = self.cache.content();
            content[to_usize(RECORD_BLOCK_OFFSET)..][..BLOCK_BYTES].fill(0);
            self.cache =
                Arc::new(SimDevice::new(self.runtime(), "cache", content, self.cache.block_size()));
        }
    }

    /// The backing device must do if the cache device is lost at this moment.
    fn judge_backing_alone(&self) {
        if self.volume.as_ref().is_some_and(|volume| volume.has_moved_blocks()) {
            self.oracle.lock().blocks_moved();
        }
        // Before it is known what the last crash has left, segments may bear the numbers of some
        // that it has lost.
        if self.crashed.is_some() {
            return;
        }
        let written_back = record_of(&self.cache.content());
        let mut oracle = self.oracle.lock();
        if let Err(text) =
            oracle.allows_alone(&self.backing.content(), written_back, self.taste.strict)
        {
            oracle.fail(&text);
        }
    }

    /// Without any more crash: the volume is right, and after a drain the backing device is the
    /// volume.
    fn last_life(&mut self) -> Result<(), String> {
        self.oracle.lock().note("the last life begins");
        self.backing.heal_bad();
        let Life::Goes(volume) = self.open()? else {
            return Err(self.failed("halted for no reason"));
        };
        self.look(&volume)?;
        self.settle("drain", || volume.drain())?;
        self.settle("close", || volume.close())?;
        drop(volume);
        self.end_process(Crash::Kill);
        self.look_as_the_module_does()?;
        self.check_log()?;
        let content = self.backing.durable();
        let mut oracle = self.oracle.lock();
        oracle.note("the durable content of the backing device alone");
        let began = oracle.read_begins();
        oracle.read_ends(began, Sector(0), &content);
        drop(oracle);
        self.verdict()
    }

    /// Whatever the cache device holds, it is nothing that a crash does not explain.
    fn check_log(&self) -> Result<(), String> {
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

    fn heal(&mut self) {
        self.cache.set_faults(Faults::default());
        self.cache.heal_rot();
        self.backing.set_faults(Faults::default());
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
    fn finish<T>(&self, what: &str, future: impl Future<Output = T>) -> Result<Life<T>, String> {
        let result = self.simulation.block_on(future);
        self.verdict()?;
        match result {
            Ok(value) => Ok(Life::Goes(value)),
            Err(Stop::Halted) => Ok(Life::Halted),
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

/// 256 KiB to 4 MiB; at times no whole number of blocks.
fn volume_sectors(rng: &mut Rng, block_size: u32) -> u64 {
    let most = 512 << rng.u32(0..=4);
    let blocks = rng.u64(most / 2..=most) / 8;
    let odd = if block_size == 512 && rng.u32(..4) == 0 { rng.u64(1..8) } else { 0 };
    blocks * 8 + odd
}
