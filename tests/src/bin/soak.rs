//! Runs the simulator over many seeds, on all cores: `soak SEEDS [FIRST]`.
//!
//! Shows its progress, and at the end how many seeds ran and how often they crashed. Fails if any
//! seed fails.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};
use wb_tests::sim::real::WriteCache;
use wb_tests::sim::{Failure, SeedReport, run, run_over_network};

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(5);
/// After this many failures, no more seeds start.
const ENOUGH: u64 = 5;
/// One seed in this many also runs with the backing device on a server.
const OVER_NETWORK: u64 = 4;

#[derive(Default)]
struct Counts {
    begun: AtomicU64,
    done: AtomicU64,
    crashes: AtomicU64,
    failures: AtomicU64,
}

impl Counts {
    fn work(&self, first: u64, seeds: u64) {
        while self.failures.load(Ordering::Relaxed) < ENOUGH {
            let nth = self.begun.fetch_add(1, Ordering::Relaxed);
            if nth >= seeds {
                break;
            }
            let seed = first + nth;
            self.count(run(&WriteCache::default(), seed));
            if seed.is_multiple_of(OVER_NETWORK) {
                self.count(run_over_network(&WriteCache::default(), seed));
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn count(&self, result: Result<SeedReport, Failure>) {
        match result {
            Ok(report) => {
                self.crashes.fetch_add(u64::from(report.crashes), Ordering::Relaxed);
            }
            Err(failure) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                println!("{failure}\n");
            }
        }
    }

    fn line(&self, started: Instant) -> String {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (done, crashes, failures) =
            (count(&self.done), count(&self.crashes), count(&self.failures));
        let seconds = started.elapsed().as_secs_f64();
        format!("{done} seeds, {crashes} crashes, {failures} failures in {seconds:.0} s")
    }
}

/// Runs `seeds` seeds from `first` on; returns whether all passed.
fn soak(first: u64, seeds: u64) -> bool {
    let started = Instant::now();
    let counts = Counts::default();
    let threads = available_parallelism().map_or(1, |cores| cores.get());
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| counts.work(first, seeds))).collect();
        let mut shown = Instant::now();
        while workers.iter().any(|worker| !worker.is_finished()) {
            sleep(Duration::from_millis(50));
            if shown.elapsed() >= PROGRESS {
                shown = Instant::now();
                eprintln!("… {} of {seeds}", counts.line(started));
            }
        }
    });
    println!("{}, from seed {first} on", counts.line(started));
    counts.failures.load(Ordering::Relaxed) == 0
}

fn main() -> ExitCode {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u64>());
    match (numbers.next(), numbers.next().unwrap_or(Ok(0)), numbers.next()) {
        (Some(Ok(seeds)), Ok(first), None) if soak(first, seeds) => ExitCode::SUCCESS,
        (Some(Ok(_)), Ok(_), None) => ExitCode::FAILURE,
        _ => {
            eprintln!("usage: soak SEEDS [FIRST]");
            ExitCode::from(2)
        }
    }
}
