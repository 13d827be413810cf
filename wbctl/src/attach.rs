//! `wbctl attach`: what a user starts is the keeper of the volume. It starts this command once
//! more, as a server.

use crate::attach_args::Args;
use crate::keeper::Keeper;
use crate::keeping::{Given, REFUSED, Role};
use crate::volume_paths::VolumeName;
use crate::{logging, over_nbd, server, signals};
use anyhow::{Context, Result, bail};
use libwb::cli::{self, Exit, Output};
use libwb::serve::loopdev::Reserved;
use nix::fcntl::Flock;
use std::fs::File;
use std::time::{Duration, Instant};

/// How long attach waits for a lock that others hold only for a moment.
const BRIEFLY: Duration = Duration::from_millis(500);

pub(crate) fn attach(args: &Args, out: &mut Output) -> Result<Exit> {
    // Before anything else is opened.
    let reserved = Reserved::take().context("cannot open /dev/null")?;
    match Role::of_this()? {
        Role::Server(link) => server::serve(args, link, reserved, out),
        Role::Unknown => std::process::exit(REFUSED),
        Role::First => {
            let (name, volume) = args.volume()?;
            // Before any device or file is touched.
            volume.tunables()?;
            match volume.serve.nbd() {
                Some(uri) => drop(over_nbd::load_tls(uri)?),
                None => libwb::serve::refuse_without_root().map_err(anyhow::Error::msg)?,
            }
            keep(|signals| Keeper::new(name.clone(), reserved, lock(&name)?, signals))
        }
        Role::Keeper(link) => {
            keep(|signals| Keeper::going_on(args.name()?, Given::take(&link, reserved)?, signals))
        }
    }
}

/// Keeps a volume until its end.
fn keep(keeper: impl FnOnce(nix::sys::signalfd::SignalFd) -> Result<Keeper>) -> Result<Exit> {
    // Before other threads are started.
    let signals = signals::to_read().context("cannot take signals")?;
    logging::to_stderr()?;
    libwb::serve::abort_on_panic(|report| {
        logging::line(report);
        logging::finish();
    });
    let kept = keeper(signals).map(|keeper| {
        // The server says what the system refuses.
        let _ = libwb::serve::guard_against_reclaim();
        keeper.keep()
    });
    if let Err(e) = &kept {
        // The reader of the log may have stalled, and a direct write to it could block forever.
        logging::line(&format!("wbctl: {}", cli::explain(e)));
    }
    logging::finish();
    Ok(kept.unwrap_or(Exit::Failed))
}

/// Takes the volume's lock.
fn lock(name: &VolumeName) -> Result<Flock<File>> {
    let started = Instant::now();
    loop {
        match name.lock()? {
            Some(lock) => return Ok(lock),
            // Other processes take the lock for a moment to see whether it is free.
            None if started.elapsed() < BRIEFLY => std::thread::sleep(Duration::from_millis(10)),
            None => bail!("volume '{name}' is attached already; see wbctl status {name}"),
        }
    }
}
