//! Requests to a running daemon.

use crate::config::RecordedVolume;
use crate::holders::{holders, still_held};
use crate::leftovers;
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, anyhow, bail};
use libwb::cache::TunableValue;
use libwb::cli::{self, Output, Progress, human_size};
use libwb::control::{
    AskError, Client, LiveStatus, Remaining, Reply, Request, VolumeState, VolumeStatus,
};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a daemon that has closed its volume may take to end.
const LINGERING: Duration = Duration::from_secs(30);
/// How long a process may take to end after a forced detach. A device that hangs may keep it.
const TO_END: Duration = Duration::from_secs(3);

#[derive(clap::Args)]
pub(crate) struct DetachArgs {
    /// The volume
    name: VolumeName,
    /// Write everything back first, so that the backing device alone holds all data. NBD clients
    /// must flush their own caches before
    #[arg(long)]
    drain: bool,
    /// Detach even while the device is mounted, held or open, or NBD clients are connected; its
    /// users get I/O errors. Ends within seconds, even if a device hangs. Also clears what a killed
    /// daemon left behind
    #[arg(long)]
    force: bool,
}

/// The message for a daemon that gave no answer.
fn explained(name: &VolumeName, error: AskError) -> anyhow::Error {
    match error {
        AskError::NotThere if name.is_running().unwrap_or(false) => {
            anyhow!("volume '{name}' is starting or stopping; try again")
        }
        AskError::NotThere => {
            let advice = match RecordedVolume::load(name) {
                Ok(None) => "see wbctl list".into(),
                _ => format!("attach it with: wbctl attach {name}"),
            };
            anyhow!("volume '{name}' is not attached; {advice}")
        }
        AskError::Silent(pid) => anyhow!("volume '{name}': {}", silence(name, pid)),
        AskError::Gone if name.is_running().unwrap_or(false) => anyhow!(
            "volume '{name}': its server was restarted meanwhile, and goes on. The command may \
             have done a part, which is kept: repeat it"
        ),
        AskError::System(cause) => {
            anyhow::Error::new(cause).context(format!("cannot reach the daemon of '{name}'"))
        }
        error => anyhow!("volume '{name}': {error}"),
    }
}

/// The advice about a daemon that does not answer.
pub(crate) fn silence(name: &VolumeName, pid: Option<i32>) -> String {
    let kill = pid.map_or("kill it".into(), |pid| format!("kill -9 {pid}"));
    format!(
        "{}: it is stopped, or hangs, or is replacing a server that died; in the last case its log \
         says so: wait. To give it up: {kill}, then: wbctl detach --force {name}",
        AskError::Silent(pid)
    )
}

fn ask(name: &VolumeName, request: &Request) -> Result<Reply> {
    ask_with(name, request, |_| ())
}

fn ask_with(
    name: &VolumeName,
    request: &Request,
    progress: impl FnMut(Remaining),
) -> Result<Reply> {
    let reply =
        Client::connect(&name.socket()).and_then(|mut client| client.ask(request, progress));
    match reply.map_err(|e| explained(name, e))? {
        Reply::Error { message } => bail!("{message}"),
        reply => Ok(reply),
    }
}

/// The state of an attached volume, or why its daemon does not report it.
pub(crate) fn look(name: &VolumeName) -> Result<VolumeStatus, AskError> {
    match Client::connect(&name.socket())?.ask(&Request::Status, |_| ())? {
        Reply::Status(status) => Ok(completed(name, *status)),
        Reply::Error { message } => Err(AskError::System(io::Error::other(message))),
        other => Err(AskError::System(io::Error::other(format!(
            "the daemon gave an unexpected answer: {other:?}"
        )))),
    }
}

/// Fills in what is known without the daemon, where a daemon of another version left it out.
fn completed(name: &VolumeName, mut status: VolumeStatus) -> VolumeStatus {
    let VolumeStatus { name: told_name, state, untold, .. } = &mut status;
    untold.retain(|pointer| match pointer.as_str() {
        "/name" => {
            *told_name = name.to_string();
            false
        }
        "/state" => {
            // The daemon answers.
            *state = VolumeState::Attached;
            false
        }
        _ => true,
    });
    status
}

/// The state of an attached volume.
pub(crate) fn status(name: &VolumeName) -> Result<VolumeStatus> {
    look(name).map_err(|e| explained(name, e))
}

/// What the daemon of an attached volume reports about its activity.
pub(crate) fn live(name: &VolumeName) -> Result<LiveStatus> {
    status(name)?
        .live
        .with_context(|| format!("the daemon of '{name}' does not report its activity"))
}

/// The tunables in force of an attached volume.
pub(crate) fn tunables(name: &VolumeName) -> Result<BTreeMap<String, TunableValue>> {
    match ask(name, &Request::Tunables)? {
        Reply::Tunables { tunables } => Ok(tunables),
        other => bail!("the daemon of '{name}' gave an unexpected answer: {other:?}"),
    }
}

/// Changes tunables of an attached volume, all or none.
pub(crate) fn set(name: &VolumeName, tunables: BTreeMap<String, TunableValue>) -> Result<()> {
    ask(name, &Request::Set { tunables }).map(drop)
}

/// Warns of values that a daemon of another version does not report: they must not pass for 0.
pub(crate) fn warn_of_untold(volumes: &[VolumeStatus]) {
    for volume in volumes.iter().filter(|volume| !volume.untold.is_empty()) {
        let untold: Vec<_> =
            volume.untold.iter().map(|it| it.trim_matches('/').replace('/', ".")).collect();
        cli::complain(
            "wbctl",
            format!(
                "the daemon of '{}' is of another version and does not report {}: shown as 0 or \
                 not at all",
                volume.name,
                untold.join(", ")
            ),
        );
    }
}

pub(crate) fn flush(name: &VolumeName, out: &mut Output) -> Result<()> {
    ask(name, &Request::Flush)?;
    writeln!(out, "flushed '{name}'")?;
    Ok(())
}

pub(crate) fn clear_stats(name: &VolumeName, out: &mut Output) -> Result<()> {
    ask(name, &Request::ClearStats)?;
    writeln!(out, "reset the counters of '{name}'")?;
    Ok(())
}

/// Sends a request that drains, and shows progress. Returns how many bytes were dirty in the
/// daemon's last report. If the user interrupts it, the daemon keeps working as before.
fn ask_to_drain(name: &VolumeName, request: &Request, go_on: &str) -> Result<u64> {
    let dirty = Arc::new(AtomicU64::new(u64::MAX));
    let (told, go_on) = (dirty.clone(), format!("continue with: wbctl {go_on}"));
    cli::on_interrupt("wbctl", move || match told.load(Ordering::Relaxed) {
        u64::MAX => format!("interrupted; {go_on}"),
        dirty => format!("interrupted: {} are still only in the cache; {go_on}", human_size(dirty)),
    })?;
    let last = dirty.clone();
    let mut bar: Option<(Progress, u64)> = None;
    ask_with(name, request, |remaining| {
        dirty.store(remaining.dirty, Ordering::Relaxed);
        let left = remaining.left;
        let (progress, most) =
            bar.get_or_insert_with(|| (Progress::new("writing back", left, 1), left));
        progress.set(most.saturating_sub(left));
    })?;
    Ok(last.load(Ordering::Relaxed)).map(|dirty| if dirty == u64::MAX { 0 } else { dirty })
}

pub(crate) fn pause(name: &VolumeName, out: &mut Output) -> Result<()> {
    ask(name, &Request::Pause)?;
    // The daemon does not wait for a batch that takes long.
    let goes_on = look(name).is_ok_and(|status| status.live.is_some_and(|live| live.writing_back));
    let still = if goes_on { "; an earlier batch, or a drain, is still finishing" } else { "" };
    writeln!(
        out,
        "write-back of '{name}' is paused until the log is full{still}; to resume it: wbctl \
         resume {name}"
    )?;
    Ok(())
}

pub(crate) fn resume(name: &VolumeName, out: &mut Output) -> Result<()> {
    ask(name, &Request::Resume)?;
    writeln!(out, "resumed write-back of '{name}'")?;
    Ok(())
}

pub(crate) fn restart(name: &VolumeName, out: &mut Output) -> Result<()> {
    ask(name, &Request::Restart)?;
    let live = live(name)?;
    writeln!(out, "restarted '{name}': process {} serves it now", live.server_pid)?;
    Ok(())
}

pub(crate) fn drain(name: &VolumeName, out: &mut Output) -> Result<()> {
    ask_to_drain(name, &Request::Drain, &format!("drain {name}"))?;
    writeln!(out, "drained '{name}': everything written before is on the backing device")?;
    Ok(())
}

pub(crate) fn detach(args: &DetachArgs, out: &mut Output) -> Result<()> {
    let name = &args.name;
    if args.force && !name.is_running()? {
        return leftovers::clear(name, out);
    }
    if !args.force {
        refuse_held_here(name)?;
    }
    let request = Request::Detach { drain: args.drain, force: args.force };
    // The last progress report tells how much is left.
    let mut left = 0;
    match args.drain {
        true => left = ask_to_drain(name, &request, &format!("detach {name} --drain"))?,
        false => drop(ask_with(name, &request, |remaining| left = remaining.dirty)?),
    }
    let what = match left {
        0 if args.drain => "; the backing device alone holds all data".into(),
        0 => String::new(),
        left if args.drain => {
            format!(
                "; {} were written after the drain, and stay only in the cache",
                human_size(left)
            )
        }
        left => format!("; {} stay only in the cache", human_size(left)),
    };
    // The daemon holds its lock as long as it lives.
    let asked = Instant::now();
    while name.is_running()? {
        if args.force && asked.elapsed() > TO_END {
            let waits = "its process has not ended yet; it may wait for a device";
            writeln!(out, "detached '{name}'{what}; {waits}")?;
            return Ok(());
        }
        if asked.elapsed() > LINGERING {
            bail!(
                "volume '{name}' is detached, but its daemon does not end, and holds the devices"
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    writeln!(out, "detached '{name}'{what}")?;
    Ok(())
}

/// The daemon checks this itself, but as a service it may not see the mounts of its users. A daemon
/// of another version may not report its device; then the link tells it.
fn refuse_held_here(name: &VolumeName) -> Result<()> {
    let device = match look(name) {
        // The daemon alone knows its NBD clients. Their server's address is no path.
        Ok(VolumeStatus { device: Some(device), .. }) => device.is_absolute().then_some(device),
        Err(e @ (AskError::NotThere | AskError::Silent(_))) => return Err(explained(name, e)),
        // It was killed meanwhile.
        Err(AskError::Gone) if !name.is_running()? => {
            return Err(explained(name, AskError::NotThere));
        }
        Ok(_) | Err(_) => std::fs::read_link(name.link()).ok(),
    };
    match device.map(|device| (holders(&device), device)) {
        Some((held, device)) if !held.is_empty() => Err(still_held(&device, &held)),
        _ => Ok(()),
    }
}
