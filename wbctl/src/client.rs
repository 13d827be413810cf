//! What is asked of a running daemon.

use crate::attach::refuse_held;
use crate::config::Volume;
use crate::leftovers;
use crate::place::Name;
use anyhow::{Context, Result, bail};
use libwb::cache::TunableValue;
use libwb::cli::{self, Output, Progress, human_size};
use libwb::control::{Client, LiveStatus, Reply, Request, VolumeStatus};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a process may take to end that was detached by force. A device that hangs may keep it.
const TO_END: Duration = Duration::from_secs(3);

#[derive(clap::Args)]
pub(crate) struct DetachArgs {
    /// The volume
    name: Name,
    /// Write everything back first, so that the backing device alone holds all data
    #[arg(long)]
    drain: bool,
    /// Detach even while the device is mounted, held or open; its users get I/O errors. Ends within
    /// seconds even if a device hangs. Also clears what a killed daemon left behind
    #[arg(long)]
    force: bool,
}

fn connect(name: &Name) -> Result<Client> {
    Client::connect(&name.socket()).map_err(|e| match e.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            let advice = match Volume::load(name) {
                Ok(None) => "see wbctl list".into(),
                _ => format!("attach it with: wbctl attach {name}"),
            };
            anyhow::anyhow!("volume '{name}' is not attached; {advice}")
        }
        _ => anyhow::Error::new(e).context(format!("cannot reach the daemon of '{name}'")),
    })
}

fn ask(name: &Name, request: &Request) -> Result<Reply> {
    ask_with(name, request, |_| ())
}

fn ask_with(name: &Name, request: &Request, progress: impl FnMut(u64)) -> Result<Reply> {
    let reply =
        connect(name)?.ask(request, progress).with_context(|| format!("the daemon of '{name}' went away"))?;
    match reply {
        Reply::Error { message } => bail!("{message}"),
        reply => Ok(reply),
    }
}

/// The state of an attached volume.
pub(crate) fn status(name: &Name) -> Result<VolumeStatus> {
    match ask(name, &Request::Status)? {
        Reply::Status(status) => Ok(*status),
        other => bail!("the daemon of '{name}' answers strangely: {other:?}"),
    }
}

/// What the daemon of an attached volume tells of it.
pub(crate) fn live(name: &Name) -> Result<LiveStatus> {
    status(name)?.live.with_context(|| format!("the daemon of '{name}' says nothing of its work"))
}

/// The tunables in force of an attached volume.
pub(crate) fn tunables(name: &Name) -> Result<BTreeMap<String, TunableValue>> {
    match ask(name, &Request::Tunables)? {
        Reply::Tunables { tunables } => Ok(tunables),
        other => bail!("the daemon of '{name}' answers strangely: {other:?}"),
    }
}

/// Changes tunables of an attached volume, all or none.
pub(crate) fn set(name: &Name, tunables: BTreeMap<String, TunableValue>) -> Result<()> {
    ask(name, &Request::Set { tunables }).map(drop)
}

pub(crate) fn flush(name: &Name, out: &mut Output) -> Result<()> {
    ask(name, &Request::Flush)?;
    writeln!(out, "flushed '{name}'")?;
    Ok(())
}

pub(crate) fn clear_stats(name: &Name, out: &mut Output) -> Result<()> {
    ask(name, &Request::ClearStats)?;
    writeln!(out, "the counters of '{name}' start anew")?;
    Ok(())
}

/// Asks for something that writes everything back, and shows how far that has got. When it is interrupted, the daemon goes
/// on as before.
fn ask_to_drain(name: &Name, request: &Request, go_on: &str) -> Result<Reply> {
    let still = Arc::new(AtomicU64::new(u64::MAX));
    let (told, go_on) = (still.clone(), format!("go on with: wbctl {go_on}"));
    cli::on_interrupt("wbctl", move || match told.load(Ordering::Relaxed) {
        u64::MAX => format!("interrupted; {go_on}"),
        dirty => format!("interrupted: {} are still only in the cache; {go_on}", human_size(dirty)),
    })?;
    let mut bar: Option<(Progress, u64)> = None;
    ask_with(name, request, |dirty| {
        still.store(dirty, Ordering::Relaxed);
        let (progress, most) = bar.get_or_insert_with(|| (Progress::new("writing back", dirty, 1), dirty));
        progress.set(most.saturating_sub(dirty));
    })
}

pub(crate) fn pause(name: &Name, out: &mut Output) -> Result<()> {
    ask(name, &Request::Pause)?;
    writeln!(
        out,
        "write-back of '{name}' is paused, until the log is full; it goes on with: wbctl resume {name}"
    )?;
    Ok(())
}

pub(crate) fn resume(name: &Name, out: &mut Output) -> Result<()> {
    ask(name, &Request::Resume)?;
    writeln!(out, "write-back of '{name}' goes on")?;
    Ok(())
}

pub(crate) fn drain(name: &Name, out: &mut Output) -> Result<()> {
    ask_to_drain(name, &Request::Drain, &format!("drain {name}"))?;
    writeln!(out, "drained '{name}': everything written before is on the backing device")?;
    Ok(())
}

pub(crate) fn detach(args: &DetachArgs, out: &mut Output) -> Result<()> {
    let name = &args.name;
    if args.force && !name.is_running()? {
        return leftovers::clear(name, out);
    }
    // The daemon looks as well, but as a service it may not see the mounts that its users see.
    if let VolumeStatus { device: Some(device), live: Some(live), .. } = status(name)? {
        refuse_held(&device, live.pid, args.force)?;
    }
    let request = Request::Detach { drain: args.drain, force: args.force };
    // The last that it says before it is done is how much is left.
    let mut left = 0;
    match args.drain {
        true => ask_to_drain(name, &request, &format!("detach {name} --drain"))?,
        false => ask_with(name, &request, |dirty| left = dirty)?,
    };
    let what = match left {
        _ if args.drain => "; the backing device alone holds all data".into(),
        0 => String::new(),
        left => format!("; {} stay only in the cache", human_size(left)),
    };
    // The daemon holds its lock as long as it lives.
    let asked = Instant::now();
    while name.is_running()? {
        if args.force && asked.elapsed() > TO_END {
            let waits = "its process ends when the device that hangs answers";
            writeln!(out, "detached '{name}'{what}; {waits}")?;
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    writeln!(out, "detached '{name}'{what}")?;
    Ok(())
}
