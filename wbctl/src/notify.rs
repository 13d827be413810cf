//! What systemd is told, as sd_notify(3) has it. Without systemd, none of it does anything.
//!
//! A device that hangs must not keep a system from shutting down, but a large log may take long. So
//! more time is asked for as long as something gets done, and no longer.

use libwb::device::Device;
use sd_notify::NotifyState;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How much more time is asked for, in microseconds, and how often.
const MORE_MICROS: u32 = 60_000_000;
const OFTEN: Duration = Duration::from_secs(20);

fn tell(states: &[NotifyState<'_>]) {
    // Nothing that the volume depends on.
    let _ = sd_notify::notify(states);
}

/// What the volume is doing.
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

/// Work of unknown length before the daemon is ready or has ended. As long as this value lives and
/// the work gets on, systemd is asked for more time again and again.
pub(crate) struct Busy(#[expect(dead_code, reason = "closing it ends the thread")] Sender<()>);

impl Busy {
    /// Begins work, and says what it is. `done` is a number that changes while the work gets on.
    pub(crate) fn with(text: &str, mut done: impl FnMut() -> u64 + Send + 'static) -> Busy {
        status(text);
        let (alive, over) = channel::<()>();
        std::thread::spawn(move || {
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

    /// Begins work that gets on as long as the devices answer requests.
    pub(crate) fn while_devices_work(text: &str, devices: &[Device; 2]) -> Busy {
        let devices = devices.clone();
        Busy::with(text, move || devices.iter().map(|device| device.pending().done).sum())
    }
}

/// Tells whether more time is to be asked for.
#[derive(Default)]
struct Patience {
    /// What was done when it was looked last.
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
