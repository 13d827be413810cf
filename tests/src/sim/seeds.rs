//! Which seeds a test runs: its own, or those that the environment names.

use super::scenario::{Failure, SeedReport};
use std::ops::Range;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|e| panic!("{variable}={text}: {e}")))
}

/// Runs the seed in `WB_SIM_SEED`, or else the seed 1, and prints the report.
///
/// # Panics
/// When the seed fails.
pub fn run_one(run: impl Fn(u64) -> Result<SeedReport, Failure>) {
    let seed = number("WB_SIM_SEED").unwrap_or(1);
    match run(seed) {
        Ok(report) => println!("seed {seed}: {report:?}"),
        Err(failure) => panic!("{failure}"),
    }
}

/// As many seeds as `WB_SIM_SEEDS` says, or else `default`, from `WB_SIM_FIRST_SEED` on.
///
/// # Panics
/// When a variable is no number.
pub fn chosen(default: u64) -> Range<u64> {
    let first = number("WB_SIM_FIRST_SEED").unwrap_or(0);
    first..first + number("WB_SIM_SEEDS").unwrap_or(default)
}
