//! Figures, and how they are printed.

use serde::Serialize;
use std::fmt;

/// A measurement and what it is compared with.
#[derive(Serialize)]
pub(crate) struct Table {
    /// What was measured, where.
    pub(crate) title: String,
    /// The unit of the figures.
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
    /// What the ratio must be.
    pub(crate) goal: Goal,
    pub(crate) reached: bool,
    pub(crate) rounds: Vec<Round>,
}

/// What a ratio must be.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    /// It is only shown.
    None,
}

impl Goal {
    fn is_reached_by(self, ratio: f64) -> bool {
        match self {
            Goal::AtLeast(goal) => ratio >= goal,
            Goal::AtMost(goal) => ratio <= goal,
            Goal::None => true,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Goal::AtLeast(goal) => write!(f, ">= {goal:.3}"),
            Goal::AtMost(goal) => write!(f, "<= {goal:.3}"),
            Goal::None => Ok(()),
        }
    }
}

/// The two figures of one round, taken one right after the other.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Round {
    pub(crate) baseline: f64,
    pub(crate) cache: f64,
}

impl Row {
    /// Summarizes rounds.
    pub(crate) fn new(workload: &'static str, goal: Goal, rounds: Vec<Round>) -> Row {
        let ratio = median(rounds.iter().map(|round| round.cache / round.baseline));
        Row {
            workload,
            baseline: median(rounds.iter().map(|round| round.baseline)),
            cache: median(rounds.iter().map(|round| round.cache)),
            ratio,
            goal,
            reached: goal.is_reached_by(ratio),
            rounds,
        }
    }
}

/// The middle figure, or the mean of the two middle ones.
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
        writeln!(
            f,
            "{}\nfigures are {}; the baseline is {}\n",
            self.title, self.unit, self.baseline
        )?;
        writeln!(
            f,
            "{:<36} {:>10} {:>10} {:>7}  {:<16} each round",
            "", "baseline", "wb", "ratio", "must be"
        )?;
        for row in &self.rows {
            let ratios: Vec<_> =
                row.rounds.iter().map(|r| format!("{:.2}", r.cache / r.baseline)).collect();
            let goal = match (row.goal, row.reached) {
                (Goal::None, _) => String::new(),
                (goal, true) => goal.to_string(),
                (goal, false) => format!("{goal} MISSED"),
            };
            let (baseline, cache) = (figure(row.baseline), figure(row.cache));
            writeln!(
                f,
                "{:<36} {baseline:>10} {cache:>10} {:>7.3}  {goal:<16} {}",
                row.workload,
                row.ratio,
                ratios.join(" ")
            )?;
        }
        Ok(())
    }
}

/// A figure with as many digits as are useful.
fn figure(value: f64) -> String {
    if value.abs() < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_the_median_of_the_rounds() {
        let rounds = [(10.0, 5.0), (20.0, 18.0), (100.0, 10.0), (10.0, 7.0)];
        let rounds = rounds.map(|(baseline, cache)| Round { baseline, cache }).to_vec();
        let row = Row::new("w", Goal::AtMost(0.7), rounds);
        assert_eq!((row.baseline, row.cache), (15.0, 8.5));
        assert!((row.ratio - 0.6).abs() < 1e-9 && row.reached);
    }
}
