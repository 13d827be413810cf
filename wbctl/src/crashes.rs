//! When a server has died: whether another one is started, and what is said.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// A volume whose servers die this often in that time of service has failed. Time between two
/// servers does not count: a request that kills each server may come again after a slow recovery.
const ENOUGH: usize = 5;
const SOON: Duration = Duration::from_secs(60);
/// How much longer each further server has to wait.
const PAUSE: Duration = Duration::from_millis(300);
/// Tests kill servers more often than that.
const VARIABLE: &str = "WB_DEATHS_A_MINUTE";

/// The deaths of the last minute of service.
pub(crate) struct Crashes {
    enough: usize,
    pause: Duration,
    /// How long the volume was served, by all servers.
    served: Duration,
    /// The same at each death.
    times: VecDeque<Duration>,
}

impl Crashes {
    pub(crate) fn new() -> Crashes {
        let set = std::env::var(VARIABLE).ok().and_then(|set| set.parse().ok());
        let pause = if set.is_some() { Duration::ZERO } else { PAUSE };
        let enough = set.unwrap_or(ENOUGH);
        Crashes { enough, pause, served: Duration::ZERO, times: VecDeque::new() }
    }

    /// How long to wait after a server that has `served` for some time, before another one is
    /// started; `None` if none is.
    pub(crate) fn pause_after(&mut self, served: Duration) -> Option<Duration> {
        self.served += served;
        let now = self.served;
        self.times.retain(|time| now - *time < SOON);
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
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_dies_again_and_again_is_given_up_and_one_that_dies_seldom_is_not() {
        let mut crashes =
            Crashes { enough: 5, pause: PAUSE, served: Duration::ZERO, times: VecDeque::new() };
        let pauses: Vec<_> =
            (0..5).map(|seconds| crashes.pause_after(Duration::from_secs(seconds))).collect();
        assert_eq!(pauses[..2], [Some(Duration::ZERO), Some(PAUSE)]);
        assert!(pauses[3] > pauses[2] && pauses[4].is_none());
        let later = crashes.pause_after(Duration::from_secs(500));
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
    }
}
