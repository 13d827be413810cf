//! `wbctl restart`: a server makes room for the program that is installed now, and the next one
//! answers the client.

use crate::apart;
use crate::keeping::{CLIENT, REPLACED, VERSION};
use crate::serving::Served;
use crate::{logging, to_keeper};
use anyhow::{Context, Result, bail};
use libwb::cache::Cache;
use libwb::control::{Replies, Reply};
use libwb::reactor::Handle;
use libwb::runtime::thread;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// How long the installed program may take to say that it can go on.
const TO_SAY: Duration = Duration::from_secs(10);
/// How long the log may take to be flushed. What is not flushed is in its head.
const TO_FLUSH: Duration = Duration::from_secs(5);
/// How often a client that waits is told that the daemon is at work.
const WORKING: Duration = Duration::from_secs(2);

/// Refuses a program that cannot go on for this one.
pub(crate) fn refuse_unfit(program: &Path, mut go_on: impl FnMut() -> bool) -> Result<()> {
    let begun = Instant::now();
    let said = apart::ask_program(program, VERSION, || begun.elapsed() < TO_SAY && go_on());
    let goes_on = "the volume goes on with the program that serves it";
    match said {
        Some(Ok(())) => Ok(()),
        Some(Err(e)) => {
            Err(e).with_context(|| format!("{} cannot take over, so {goes_on}", program.display()))
        }
        None => bail!("{} does not say whether it can take over, so {goes_on}", program.display()),
    }
}

/// Ends this process in favour of the installed program. The next server answers the client.
pub(crate) fn make_room(
    device: &Served,
    cache: &Cache,
    runtime: &Handle,
    read_only: bool,
    replies: &Replies,
) -> Result<()> {
    let client = replies.connection().context("cannot keep the client's connection")?;
    to_keeper::keep(CLIENT, client.as_fd()).context("cannot hand over the client")?;
    tracing::info!("making room for the program that is installed now");
    device.hold();
    if !read_only {
        let (begun, cache) = (Instant::now(), cache.clone());
        let flush = async move { cache.flush().await };
        let go_on = || begun.elapsed() < TO_FLUSH;
        match runtime.run_watched(flush, TO_FLUSH / 50, go_on) {
            Some(Ok(())) => {}
            _ => {
                tracing::warn!("the log was not flushed; the next server finds the rest in memory")
            }
        }
    }
    logging::finish();
    std::process::exit(REPLACED)
}

/// A client that waits for the end of a restart.
pub(crate) struct Waiting {
    replies: Replies,
    _alive: Sender<()>,
}

impl Waiting {
    /// Tells the client from now on that the daemon is at work.
    pub(crate) fn on(client: OwnedFd) -> Waiting {
        let replies = Replies::to(client.into());
        let (alive, over) = channel::<()>();
        let mut told = replies.clone();
        // Without the thread, the client loses patience.
        let _ = thread("wb-waiting").spawn(move || {
            let at_work = Reply::Progress { dirty_bytes: 0, left_bytes: None };
            while told.send(&at_work).is_ok()
                && over.recv_timeout(WORKING) == Err(RecvTimeoutError::Timeout)
            {}
        });
        Waiting { replies, _alive: alive }
    }

    /// The volume is served again, by the installed program or not.
    pub(crate) fn done(mut self, is_installed: bool) {
        let reply = match is_installed {
            true => Reply::Done,
            false => Reply::Error {
                message: "the installed program did not go on, and the one before serves the \
                          volume again; the log says why"
                    .into(),
            },
        };
        let _ = self.replies.send(&reply);
        let _ = to_keeper::forget(CLIENT);
    }
}
