//! Signals to the daemon. Two of them end it; none of the others, which terminals and the like
//! send, may take a volume away.

use crate::ending::End;
use crate::logging;
use libwb::cli::{self, Exit};
use nix::sys::signal::{SigSet, Signal, raise};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Sender;

const ENDING: [Signal; 2] = [Signal::SIGTERM, Signal::SIGINT];
/// Those that would end the process, or stop it, though nothing is wrong with it.
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
/// So many signals to end are the business of the volume's end. One more ends the process there and
/// then.
const ENOUGH: u32 = 3;

/// How far the daemon is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// It has touched nothing, and ends at once.
    Opening,
    /// It finishes recovery first. Asked again, it ends at once: recovery can be begun anew.
    Recovering,
    /// It ends in order.
    Serving,
}

/// To be told how far the daemon is.
pub(crate) struct Stages(Arc<AtomicU8>);

impl Stages {
    pub(crate) fn reach(&self, stage: Stage) {
        self.0.store(stage as u8, Ordering::SeqCst);
    }
}

/// Has a thread take all these signals from now on. To be called before other threads are started.
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

/// Ends as if the signal had never been taken.
fn die_of(signal: Signal) {
    logging::finish();
    let _ = SigSet::from(signal).thread_unblock().and_then(|()| raise(signal));
}
