//! Messages to systemd; see sd_notify(3). Without systemd, they have no effect.
//!
//! A device that hangs must not keep a system from shutting down, but a large log may take long. So
//! the daemon asks for more time only while the work makes progress.
//!
//! systemd listens to the keeper alone, which relays what the server says.

use crate::to_keeper;
use libwb::device::Device;
use libwb::runtime::thread;
use sd_notify::NotifyState;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

/// How much more time the daemon asks for, in microseconds, and how often.
const MORE_MICROS: u32 = 60_000_000;
const OFTEN: Duration = Duration::from_secs(20);

/// How many messages may wait for systemd. Further ones are dropped.
const ROOM: usize = 64;

fn tell(states: &[NotifyState<'_>]) {
    let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
    to_keeper::notify(lines.join("\n"));
}

/// Passes messages on, and keeps nobody waiting.
pub(crate) struct Relay(SyncSender<String>);

impl Relay {
    pub(crate) fn start() -> io::Result<Relay> {
        let (messages, waiting) = sync_channel::<String>(ROOM);
        thread("wb-notify").spawn(move || {
            for text in waiting {
                // The volume does not depend on these messages.
                let _ = sd_notify::notify(&[NotifyState::Custom(&text)]);
            }
        })?;
        Ok(Relay(messages))
    }

    pub(crate) fn send(&self, text: String) {
        let _ = self.0.try_send(text);
    }
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
