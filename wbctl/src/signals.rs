//! Signals to the daemon. Two of them end it. The others, which terminals and timers send, must not
//! take a volume away.

use crate::ending::End;
use crate::logging;
use libwb::cli::{self, Exit};
use nix::sys::signal::{SigSet, Signal, raise};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Sender;

const ENDING: [Signal; 2] = [Signal::SIGTERM, Signal::SIGINT];
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
const ENOUGH: u32 = 3;

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

/// Records the stage that the daemon has reached.
pub(crate) struct Stages(Arc<AtomicU8>);

impl Stages {
    pub(crate) fn reach(&self, stage: Stage) {
        self.0.store(stage as u8, Ordering::SeqCst);
    }
}

/// Starts a thread that takes all these signals. Call it before other threads start.
///
/// # Errors
/// When the system has no room for a thread.
pub(crate) fn take(end: Sender<End>) -> io::Result<Stages> {
    let stage = Arc::new(AtomicU8::new(Stage::Opening as u8));
    let (reached, mut told) = (stage.clone(), 0);
    cli::on_signals(ENDING.into_iter().chain(IGNORED), move |signal| {
        if !ENDING.contains(&signal) {
            tracing::debug!("{signal}: ignored");
            return;
        }
        told += 1;
        let stage = reached.load(Ordering::SeqCst);
        if stage == Stage::Opening as u8 || stage == Stage::Recovering as u8 && told > 1 {
            die_of(signal);
        }
        if told > ENOUGH {
            std::process::exit(Exit::Failed as i32);
        }
        let _ = end.send(End::Signal(signal));
    })?;
    Ok(Stages(stage))
}

/// Ends the process as the signal would by default.
fn die_of(signal: Signal) {
    logging::finish();
    let _ = SigSet::from(signal).thread_unblock().and_then(|()| raise(signal));
}
