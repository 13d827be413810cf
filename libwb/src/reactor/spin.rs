//! When the reactor looks for news for a moment before it sleeps.
//!
//! To sleep and to be woken takes longer than many a device, most of all in a virtual machine whose
//! processor goes idle meanwhile. So a reactor that has had short waits of late spins first. An
//! idle volume has none. On a busy machine, others have the processor now and then, and waits are
//! long. Where there is but one processor, whoever brings the news could not run meanwhile.

use std::num::NonZero;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

/// How long it spins at most, and which waits count as short. A flush of a disk often takes over
/// 100 µs.
const LIMIT: Duration = Duration::from_micros(200);
/// How many waits in a row may be longer before it spins no more.
const TRIES: u8 = 4;

pub(super) struct Spin {
    tries: u8,
    has_processors: bool,
}

impl Spin {
    pub(super) fn new() -> Spin {
        let processors = available_parallelism().map_or(1, NonZero::get);
        Spin { tries: 0, has_processors: processors > 1 }
    }

    /// Whether the next wait may be short.
    pub(super) fn is_worth_it(&self) -> bool {
        self.has_processors && self.tries > 0
    }

    /// Looks for news for a moment. Returns whether there is any.
    pub(super) fn look(&self, begun: Instant, mut is_there_news: impl FnMut() -> bool) -> bool {
        while !is_there_news() {
            if begun.elapsed() > LIMIT {
                return false;
            }
            std::hint::spin_loop();
        }
        true
    }

    /// Notes how long a wait has taken, with or without sleep.
    pub(super) fn waited(&mut self, time: Duration) {
        self.tries = if time <= LIMIT { TRIES } else { self.tries.saturating_sub(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_only_after_short_waits_and_not_for_long() {
        let mut spin = Spin { tries: 0, has_processors: true };
        assert!(!spin.is_worth_it(), "nothing is known");
        spin.waited(LIMIT);
        for _ in 0..TRIES {
            assert!(spin.is_worth_it());
            spin.waited(LIMIT * 2);
        }
        assert!(!spin.is_worth_it(), "all of late were long");
        spin.waited(LIMIT / 2);
        assert!(spin.is_worth_it());
        assert!(spin.look(Instant::now(), || true));
        assert!(!spin.look(Instant::now(), || false), "there is no news");
        assert!(!Spin { has_processors: false, ..spin }.is_worth_it());
    }
}
