//! Clients that read and write a volume at random and tell the oracle what they did.

use super::engine::{EngineConfig, EngineFuture};
use super::unanswered::{Asked, Change, Served};
use fastrand::Rng;
use libwb::device::IoBuf;
use libwb::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use libwb::runtime::Runtime;
use std::time::Duration;

/// The largest I/O, in sectors: 1 MiB.
const MAX_SECTORS: u64 = 2048;

/// How the clients of one run behave.
#[derive(Clone, Debug)]
pub struct Habits {
    /// The unit of I/O, in sectors.
    unit: u64,
    /// Out of 100 operations, how many write.
    writes: u32,
    /// Out of 100 writes, how many are durable once acknowledged (FUA).
    fua: u32,
    /// Out of 100 operations, how many discard.
    discards: u32,
    /// Out of 1000 operations, how many change the tunables.
    tunes: u32,
    /// Out of 100 operations, how many flush.
    flushes: u32,
    /// Out of 1000 operations, how many drain.
    drains: u32,
    /// Out of 100 operations, how many a pause precedes.
    pauses: u32,
    /// Most I/O is at most 2 to this power units long.
    size_bits: u32,
    /// Out of 100 operations, how many go to the hot spot.
    hot: u32,
    /// The hot spot, in units.
    hot_units: u64,
    /// Out of 100 operations, how many continue where the last one ended.
    sequential: u32,
}

impl Habits {
    /// Turns discards off. The engine refuses them in strict order.
    pub fn discard_nothing(&mut self) {
        self.discards = 0;
    }

    /// Whether anything is discarded.
    pub fn discards(&self) -> bool {
        self.discards > 0
    }

    /// Random habits for a volume whose unit of I/O is `unit` sectors.
    pub fn any(rng: &mut Rng, unit: u64) -> Habits {
        let often =
            |rng: &mut Rng, choices: &[u32]| rng.choice(choices.iter().copied()).unwrap_or(0);
        Habits {
            unit,
            writes: often(rng, &[30, 50, 70, 90]),
            fua: often(rng, &[0, 0, 2, 20]),
            discards: often(rng, &[0, 0, 2, 20]),
            tunes: often(rng, &[0, 10]),
            flushes: often(rng, &[0, 1, 5, 15, 40]),
            drains: often(rng, &[0, 0, 0, 5, 30]),
            pauses: often(rng, &[0, 1, 10, 50]),
            size_bits: often(rng, &[0, 2, 3, 4, 6, 8, 11]),
            hot: often(rng, &[0, 30, 90]),
            hot_units: rng.u64(1..200),
            sequential: often(rng, &[0, 20, 80]),
        }
    }
}

/// Flushes or drains, and tells the oracle.
pub(super) fn flush(served: Served, drain: bool) -> EngineFuture<()> {
    Box::pin(async move {
        let Served { volume, oracle, .. } = &served;
        let began = oracle.lock().flush_begins();
        let result = if drain { volume.drain().await } else { volume.flush().await };
        served.unless_dead().await;
        oracle.lock().flush_ends(if drain { "drain" } else { "flush" }, began, result.is_ok());
        result
    })
}

/// One client.
pub struct Client {
    /// What it works on, and whom it tells.
    pub served: Served,
    /// How it decides.
    pub rng: Rng,
    /// How it behaves.
    pub habits: Habits,
    /// Whether operations may fail.
    pub faulty: bool,
    /// What the tunables are chosen by.
    pub config: EngineConfig,
}

impl Client {
    /// Does some operations, one after the other.
    pub async fn run(mut self, operations: u32) {
        let mut next = 0;
        for _ in 0..operations {
            if self.rng.u32(..100) < self.habits.pauses {
                let millis = self.rng.choice([0, 1, 10, 100, 3000]).unwrap_or(0);
                self.served.runtime.sleep(Duration::from_millis(millis)).await;
            }
            let habits = self.habits.clone();
            if self.rng.u32(..1000) < habits.tunes {
                self.served.volume.tune(EngineConfig { seed: self.rng.u64(..), ..self.config });
            }
            if self.rng.u32(..1000) < habits.drains {
                self.flush(true).await;
            } else if self.rng.u32(..100) < habits.flushes {
                self.flush(false).await;
            } else {
                let (first, count) = self.range(next);
                next = first + count;
                if self.rng.u32(..100) < habits.discards {
                    self.discard(Sector(first), count).await;
                } else if self.rng.u32(..100) < habits.writes {
                    let fua = self.rng.u32(..100) < habits.fua;
                    self.write(Sector(first), count, fua).await;
                } else {
                    self.read(Sector(first), count).await;
                }
            }
            if self.served.oracle.lock().failure().is_some() {
                return self.served.runtime.halt();
            }
        }
    }

    /// Where to read or write next, in sectors: (first, count).
    fn range(&mut self, next: u64) -> (u64, u64) {
        let (habits, rng) = (&self.habits, &mut self.rng);
        let units = self.served.volume.size() / (to_u64(SECTOR_BYTES) * habits.unit);
        let bits = if rng.u32(..20) == 0 { 11 } else { rng.u32(..=habits.size_bits) };
        let most = (1u64 << bits).min(MAX_SECTORS / habits.unit).min(units);
        let count = if rng.bool() { most } else { rng.u64(1..=most) };
        let first = match rng.u32(..100) {
            n if n < habits.sequential => next / habits.unit,
            _ if rng.u32(..100) < habits.hot => rng.u64(..habits.hot_units),
            _ => rng.u64(..units),
        };
        // Half of the requests that can hold a block begin at one.
        let first = if count >= 8 && rng.bool() { first / 8 * 8 } else { first };
        let first = first.min(units - count);
        (first * habits.unit, count * habits.unit)
    }

    async fn discard(&self, first: Sector, count: u64) {
        let result = self.served.begin(Asked { change: Change::Discard, first, count }).await;
        self.judge("a discard", result.err());
    }

    async fn write(&self, first: Sector, count: u64, fua: bool) {
        let change = if fua { Change::WriteFua } else { Change::Write };
        let result = self.served.begin(Asked { change, first, count }).await;
        self.judge("a write", result.err());
    }

    async fn read(&self, first: Sector, count: u64) {
        let began = self.served.oracle.lock().read_begins();
        let buf = IoBuf::zeroed(to_usize(count) * SECTOR_BYTES);
        let result = self.served.volume.read(first, buf).await;
        self.served.unless_dead().await;
        let mut oracle = self.served.oracle.lock();
        match result {
            Ok(data) => oracle.read_ends(began, first, &data),
            Err(e) => {
                oracle.read_fails(began);
                drop(oracle);
                self.judge("a read", Some(e));
            }
        }
    }

    async fn flush(&self, drain: bool) {
        let result = flush(self.served.clone(), drain).await;
        let what = if drain { "drain" } else { "flush" };
        self.judge(what, result.err());
    }

    fn judge(&self, what: &str, error: Option<String>) {
        let Some(error) = error else { return };
        let mut oracle = self.served.oracle.lock();
        if self.faulty {
            oracle.note(format!("{what} failed: {error}"));
        } else {
            oracle.fail(&format!("{what} failed though the devices are sound: {error}"));
        }
    }
}
