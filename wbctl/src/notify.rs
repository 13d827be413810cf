//! What systemd is told, as sd_notify(3) has it. Without systemd, none of it does anything.

use sd_notify::NotifyState;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How much more time is asked for, in microseconds, and how often.
const MORE_MICROS: u32 = 60_000_000;
const OFTEN: Duration = Duration::from_secs(20);
/// And how many times at most, an hour in all: a backing device that is gone must not keep a system from shutting down.
const TIMES: u32 = 180;

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

/// Work of unknown length before the daemon is ready or has ended. As long as this value lives, systemd is asked for
/// more time again and again.
pub(crate) struct Busy(#[expect(dead_code, reason = "closing it ends the thread")] Sender<()>);

impl Busy {
    /// Begins work, and says what it is.
    pub(crate) fn with(text: &str) -> Busy {
        status(text);
        let (alive, over) = channel::<()>();
        std::thread::spawn(move || {
            for _ in 0..TIMES {
                tell(&[NotifyState::ExtendTimeoutUsec(MORE_MICROS)]);
                if over.recv_timeout(OFTEN) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
        });
        Busy(alive)
    }
}
