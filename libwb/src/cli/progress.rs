//! The progress of long work.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

/// A progress bar on standard error, with rate and time left. It appears only on a terminal, and
/// only after a second.
pub struct Progress {
    bar: ProgressBar,
    /// Bytes of a unit of work.
    unit: u64,
    hidden_until: Option<Instant>,
}

impl Progress {
    const PATIENCE: Duration = Duration::from_secs(1);

    /// A bar for `total` units of work, each of `unit` bytes.
    pub fn new(what: &'static str, total: u64, unit: usize) -> Progress {
        let unit = crate::format::to_u64(unit);
        let total = total.saturating_mul(unit);
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        let line = "{msg} [{wide_bar}] {percent}% of {binary_total_bytes}, \
                    {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(line) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what);
        let hidden_until = io::stderr().is_terminal().then(|| Instant::now() + Self::PATIENCE);
        Progress { bar, unit, hidden_until }
    }

    /// A bar that never shows.
    pub fn none() -> Progress {
        Progress { bar: ProgressBar::hidden(), unit: 1, hidden_until: None }
    }

    /// Notes that `done` units are done in all.
    pub fn set(&mut self, done: u64) {
        if self.hidden_until.is_some_and(|when| Instant::now() >= when) {
            self.hidden_until = None;
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position(done.saturating_mul(self.unit));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
