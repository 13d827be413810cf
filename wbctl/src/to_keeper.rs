//! A server's words to its keeper.

use crate::keeping::{Given, Link, Message};
use anyhow::{Context, Result, bail};
use libwb::runtime::thread;
use libwb::serve::loopdev::Reserved;
use nix::sys::signal::{Signal, raise};
use rustix::process::set_parent_process_death_signal;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::process::parent_id;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock};

static KEEPER: OnceLock<ToKeeper> = OnceLock::new();

struct ToKeeper {
    link: Link,
    /// The keeper's process.
    process: u32,
    done: Sender<io::Result<()>>,
    /// Its answers. Held while one is waited for.
    answers: Mutex<Receiver<io::Result<()>>>,
}

/// Takes all that the keeper has to give. From now on, this process ends when the keeper does.
pub(crate) fn meet(link: Link, reserved: Reserved) -> Result<Given> {
    // Even if this process is stopped, or hangs.
    set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .context("cannot ask to be ended with the keeper")?;
    let process = parent_id();
    link.send(&Message::Hello, None).context("cannot reach the keeper")?;
    let given = Given::take(&link, reserved)?;
    let (done, answers) = channel();
    let _ = KEEPER.set(ToKeeper { link, process, done, answers: Mutex::new(answers) });
    Ok(given)
}

/// Passes signals of the keeper on: those that it got `before`, and all later ones.
pub(crate) fn listen(before: &[i32], signal: impl Fn(Signal) + Send + 'static) -> Result<()> {
    let keeper = KEEPER.get().context("there is no keeper")?;
    before.iter().filter_map(|number| Signal::try_from(*number).ok()).for_each(&signal);
    thread("wb-keeper").spawn(move || keeper.listen(signal))?;
    Ok(())
}

impl ToKeeper {
    fn listen(&self, signal: impl Fn(Signal)) {
        loop {
            match self.link.receive() {
                Ok(Some((Message::Signal { number }, _))) => {
                    let _ = Signal::try_from(number).map(&signal);
                }
                Ok(Some((Message::Done, _))) => drop(self.done.send(Ok(()))),
                Ok(Some((Message::Refused { why }, _))) => {
                    drop(self.done.send(Err(io::Error::other(why))));
                }
                Ok(Some((other, _))) => tracing::warn!("the keeper says {other:?} now"),
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    tracing::warn!("the keeper says something that makes no sense: {e}");
                }
                // As if this process had been killed with it: nothing may be left of the volume.
                Ok(None) | Err(_) => drop(raise(Signal::SIGKILL)),
            }
        }
    }

    /// Says something, and waits until it is done.
    fn ask(&self, message: &Message, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let answers = self.answers.lock().map_err(|_| io::Error::other("a thread failed"))?;
        self.link.send(message, with)?;
        answers.recv().map_err(|_| io::Error::other("the keeper is gone"))?
    }
}

/// The keeper's process.
pub(crate) fn process() -> u32 {
    KEEPER.get().map_or_else(std::process::id, |keeper| keeper.process)
}

/// Has a descriptor kept. Once this returns, it outlives this process.
pub(crate) fn keep(name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let Some(keeper) = KEEPER.get() else { return Ok(()) };
    keeper.ask(&Message::Keep { name: name.into() }, Some(descriptor))
}

/// What was kept is not needed any more.
pub(crate) fn forget(name: &str) -> io::Result<()> {
    let Some(keeper) = KEEPER.get() else { return Ok(()) };
    keeper.ask(&Message::Forget { name: name.into() }, None)
}

/// From now on, no other server will go on with the volume.
pub(crate) fn ending() {
    if let Some(keeper) = KEEPER.get()
        && let Err(e) = keeper.ask(&Message::Ending, None)
    {
        tracing::warn!("cannot tell the keeper that the volume ends: {e}");
    }
}

/// Says what the next server must know.
pub(crate) fn state(text: String) -> Result<()> {
    let Some(keeper) = KEEPER.get() else { return Ok(()) };
    keeper.link.send(&Message::State { text }, None).context("cannot reach the keeper")
}

/// The volume is served.
pub(crate) fn ready(outlives: bool) -> Result<()> {
    let Some(keeper) = KEEPER.get() else { bail!("there is no keeper") };
    keeper.link.send(&Message::Ready { outlives }, None).context("cannot reach the keeper")
}

/// For systemd.
pub(crate) fn notify(text: String) {
    if let Some(keeper) = KEEPER.get() {
        let _ = keeper.link.send(&Message::Notify { text }, None);
    }
}

/// Why this process is about to abort.
pub(crate) fn last_words(text: &str) {
    if let Some(keeper) = KEEPER.get() {
        let text = text.chars().take(2000).collect();
        let _ = keeper.link.send(&Message::LastWords { text }, None);
    }
}
