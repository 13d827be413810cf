//! Signals to a volume. Two of them end it. The others, which terminals and timers send, must not
//! take a volume away. The keeper gets them, and passes on those that end. A server ignores all.

use crate::ending::End;
use crate::logging;
use libwb::cli::{self, Exit};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

pub(crate) const ENDING: [Signal; 2] = [Signal::SIGTERM, Signal::SIGINT];
/// Signals that would end or stop the process though nothing is wrong with it.
const IGNORED: [Signal; 15] = [
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGSTKFLT,
    Signal::SIGXCPU,
    Signal::SIGXFSZ,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
];
/// The shutdown handles this many signals. One more ends the process immediately.
pub(crate) const ENOUGH: usize = 3;

/// The stage that the daemon has reached.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// It has changed nothing, and ends at once.
    Opening,
    /// It finishes recovery first. At a second signal, it ends at once: recovery can start again.
    Recovering,
    /// It ends in order.
    Serving,
}

/// The stage that the daemon has reached, and what it was told.
pub(crate) struct Stages {
    stage: AtomicU8,
    told: AtomicUsize,
    end: Sender<End>,
}

impl Stages {
    pub(crate) fn new(end: Sender<End>) -> Stages {
        Stages { stage: AtomicU8::new(Stage::Opening as u8), told: AtomicUsize::new(0), end }
    }

    pub(crate) fn reach(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::SeqCst);
    }

    /// Takes a signal that the keeper has got.
    pub(crate) fn take(&self, signal: Signal) {
        if !ENDING.contains(&signal) {
            return;
        }
        let told = self.told.fetch_add(1, Ordering::SeqCst) + 1;
        let stage = self.stage.load(Ordering::SeqCst);
        if stage == Stage::Opening as u8 || stage == Stage::Recovering as u8 && told > 1 {
            die_of(signal);
        }
        if told > ENOUGH {
            std::process::exit(Exit::Failed as i32);
        }
        let _ = self.end.send(End::Signal(signal));
    }
}

/// Has all these signals wait for a keeper to read them. Call it before other threads start.
///
/// # Errors
/// When the system refuses.
pub(crate) fn to_read() -> io::Result<SignalFd> {
    let all: SigSet = ENDING.into_iter().chain(IGNORED).collect();
    all.thread_block()?;
    Ok(SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Ignores all these signals in a server. Call it before other threads start.
///
/// # Errors
/// When the system has no room for a thread.
pub(crate) fn ignore() -> io::Result<()> {
    cli::on_signals(ENDING.into_iter().chain(IGNORED), |signal| {
        tracing::debug!("{signal}: ignored")
    })
}

/// Ends the process as the signal would by default.
pub(crate) fn die_of(signal: Signal) {
    logging::finish();
    let _ = SigSet::from(signal).thread_unblock().and_then(|()| raise(signal));
}
