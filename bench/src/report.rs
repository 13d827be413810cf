//! Figures, and how they are printed.

use serde::Serialize;
use std::fmt;

/// A measurement and what it is compared with.
#[derive(Serialize)]
pub(crate) struct Table {
    /// What was measured, where.
    pub(crate) title: String,
    /// Of what the figures are a count.
    pub(crate) unit: &'static str,
    /// What the baseline is.
    pub(crate) baseline: &'static str,
    pub(crate) rows: Vec<Row>,
}

/// One workload.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) workload: &'static str,
    /// Medians over the rounds.
    pub(crate) baseline: f64,
    pub(crate) cache: f64,
    /// The median of the rounds' ratios, which is not the ratio of the medians.
    pub(crate) ratio: f64,
    pub(crate) rounds: Vec<Round>,
}

/// The two figures of one round, taken one right after the other.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Round {
    pub(crate) baseline: f64,
    pub(crate) cache: f64,
}

impl Row {
    /// Sums rounds up.
    pub(crate) fn new(workload: &'static str, rounds: Vec<Round>) -> Row {
        Row {
            workload,
            baseline: median(rounds.iter().map(|round| round.baseline)),
            cache: median(rounds.iter().map(|round| round.cache)),
            ratio: median(rounds.iter().map(|round| round.cache / round.baseline)),
            rounds,
        }
    }
}

/// The middle one; of an even number, the mean of the two in the middle.
fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    match figures.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => figures[n / 2],
        n => (figures[n / 2 - 1] + figures[n / 2]) / 2.0,
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\nfigures are {}; the baseline is {}\n", self.title, self.unit, self.baseline)?;
        writeln!(f, "{:<34} {:>10} {:>10} {:>7}   ratio of each round", "", "baseline", "wb", "ratio")?;
        for row in &self.rows {
            let ratios: Vec<_> = row.rounds.iter().map(|r| format!("{:.2}", r.cache / r.baseline)).collect();
            let (baseline, cache) = (row.baseline, row.cache);
            writeln!(
                f,
                "{:<34} {baseline:>10.0} {cache:>10.0} {:>7.2}   {}",
                row.workload,
                row.ratio,
                ratios.join(" ")
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_the_median_of_the_rounds() {
        let rounds = [(10.0, 5.0), (20.0, 18.0), (100.0, 10.0), (10.0, 7.0)];
        let row = Row::new("w", rounds.map(|(baseline, cache)| Round { baseline, cache }).to_vec());
        assert_eq!((row.baseline, row.cache), (15.0, 8.5));
        assert!((row.ratio - 0.6).abs() < 1e-9);
    }
}
