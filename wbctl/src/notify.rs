//! Messages to systemd; see sd_notify(3). Without systemd, they have no effect.
//!
//! A device that hangs must not keep a system from shutting down, but a large log may take long. So
//! the daemon asks for more time only while the work makes progress.

use libwb::device::Device;
use libwb::runtime::thread;
use sd_notify::NotifyState;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How much more time the daemon asks for, in microseconds, and how often.
const MORE_MICROS: u32 = 60_000_000;
const OFTEN: Duration = Duration::from_secs(20);

fn tell(states: &[NotifyState<'_>]) {
    // The volume does not depend on these messages.
    let _ = sd_notify::notify(states);
}

/// Shows what the volume is doing.
pub(crate) fn status(text: &str) {
    tell(&[NotifyState::Status(text)]);
}

/// The volume can be used.
pub(crate) fn ready(text: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(text)]);
}

/// The daemon is ending.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Work of unknown length, before the daemon is ready or has ended. While this value lives and the
/// work makes progress, the daemon asks systemd for more time again and again.
pub(crate) struct Busy(#[expect(dead_code, reason = "closing it ends the thread")] Sender<()>);

impl Busy {
    /// Begins work, and shows its name. `done` returns a number that changes while the work makes
    /// progress.
    pub(crate) fn with(text: &str, mut done: impl FnMut() -> u64 + Send + 'static) -> Busy {
        status(text);
        let (alive, over) = channel::<()>();
        // Without the thread, systemd gives up earlier.
        let _ = thread("wb-busy").spawn(move || {
            let mut patience = Patience::default();
            loop {
                if patience.is_due(done()) {
                    tell(&[NotifyState::ExtendTimeoutUsec(MORE_MICROS)]);
                }
                if over.recv_timeout(OFTEN) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
        });
        Busy(alive)
    }

    /// Begins work that makes progress as long as the devices answer requests.
    pub(crate) fn while_devices_work(text: &str, devices: &[Device; 2]) -> Busy {
        let devices = devices.clone();
        Busy::with(text, move || devices.iter().map(|device| device.pending().done).sum())
    }
}

/// Decides whether to ask for more time.
#[derive(Default)]
struct Patience {
    /// The number at the last check.
    seen: Option<u64>,
}

impl Patience {
    fn is_due(&mut self, done: u64) -> bool {
        self.seen.replace(done) != Some(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_time_is_asked_for_at_first_and_while_something_gets_done() {
        let mut patience = Patience::default();
        let due: Vec<bool> = [0, 0, 7, 9, 9, 9, 10].map(|done| patience.is_due(done)).into();
        assert_eq!(due, [true, false, true, true, false, false, true]);
    }
}
