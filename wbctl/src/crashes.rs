//! When a server has died: whether another one is started, and what is said.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// A volume whose servers die this often in that time has failed.
const ENOUGH: usize = 5;
const SOON: Duration = Duration::from_secs(60);
/// How much longer each further server has to wait.
const PAUSE: Duration = Duration::from_millis(300);
/// Tests kill servers more often than that.
const VARIABLE: &str = "WB_DEATHS_A_MINUTE";

/// The deaths of the last minute.
pub(crate) struct Crashes {
    enough: usize,
    pause: Duration,
    times: VecDeque<Instant>,
}

impl Crashes {
    pub(crate) fn new() -> Crashes {
        let set = std::env::var(VARIABLE).ok().and_then(|set| set.parse().ok());
        let pause = if set.is_some() { Duration::ZERO } else { PAUSE };
        Crashes { enough: set.unwrap_or(ENOUGH), pause, times: VecDeque::new() }
    }

    /// How long to wait before another server is started; `None` if none is.
    pub(crate) fn pause_after(&mut self, now: Instant) -> Option<Duration> {
        self.times.retain(|time| now.duration_since(*time) < SOON);
        let before = u32::try_from(self.times.len()).unwrap_or(u32::MAX);
        self.times.push_back(now);
        (self.times.len() < self.enough).then(|| self.pause.saturating_mul(before))
    }
}

/// How a server ended, in words.
pub(crate) fn described(status: ExitStatus, last_words: Option<&str>) -> String {
    let mut text = match (status.signal(), status.code()) {
        (Some(signal), _) => match nix::sys::signal::Signal::try_from(signal) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        (None, code) => format!("ended with exit code {}", code.unwrap_or(-1)),
    };
    if let Some(words) = last_words {
        text += &format!(" ({})", words.lines().next().unwrap_or_default());
    }
    if status.core_dumped() {
        text += &format!("; {}", where_cores_go());
    }
    text
}

/// Where the kernel has left a core dump.
fn where_cores_go() -> String {
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    match pattern.trim_end().strip_prefix('|') {
        Some(program) if program.contains("systemd-coredump") => {
            "its core dump: coredumpctl info wbctl".into()
        }
        Some(program) => {
            let program = program.split(' ').next().unwrap_or_default();
            format!("its core dump went to {program}")
        }
        None => {
            let folder = std::env::current_dir().unwrap_or_default();
            format!("its core dump: {}", folder.join(pattern.trim_end()).display())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_dies_again_and_again_is_given_up_and_one_that_dies_seldom_is_not() {
        let mut crashes = Crashes { enough: 5, pause: PAUSE, times: VecDeque::new() };
        let begun = Instant::now();
        let pauses: Vec<_> =
            (0..5).map(|second| crashes.pause_after(begun + Duration::from_secs(second))).collect();
        assert_eq!(pauses[..2], [Some(Duration::ZERO), Some(PAUSE)]);
        assert!(pauses[3] > pauses[2] && pauses[4].is_none());
        let later = crashes.pause_after(begun + Duration::from_secs(500));
        assert_eq!(later, Some(Duration::ZERO));
    }

    #[test]
    fn the_end_of_a_server_is_described() {
        let killed = described(ExitStatus::from_raw(9), None);
        assert_eq!(killed, "was killed by SIGKILL");
        let words = Some("panicked at here\nand so on");
        assert_eq!(
            described(ExitStatus::from_raw(6), words),
            "was killed by SIGABRT (panicked at here)"
        );
        assert_eq!(described(ExitStatus::from_raw(3 << 8), None), "ended with exit code 3");
        assert!(described(ExitStatus::from_raw(6 | 0x80), None).contains("core dump"));
    }
}
