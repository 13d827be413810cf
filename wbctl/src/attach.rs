//! `wbctl attach`: the daemon. Recovers a volume and serves it in the foreground.

use crate::apart::{self, Task};
use crate::config::{RecordedVolume, not_recorded, parse_tunables};
use crate::daemon::{Daemon, SERVING};
use crate::devices::Devices;
use crate::ending::{End, LiveVolume, serve_until_ended};
use crate::keeper::Keeper;
use crate::notes::About;
use crate::notify::{self, Busy};
use crate::older::Past;
use crate::pair::absolute;
use crate::sector_size::{self, SectorSize};
use crate::serving::{self, FrontEnd, ServeOption, Serving};
use crate::signals::{self, Stage, Stages};
use crate::volume_paths::VolumeName;
use crate::{leftovers, logging, rival, salvage, watch};
use anyhow::{Context, Result, bail};
use libwb::cache::{Cache, CacheError, OpenOptions};
use libwb::cli::{self, Exit, Io, Output, SalvageOption, human_size};
use libwb::control;
use libwb::device::Device;
use libwb::device::probe::{self, Access, OpenError, Opened};
use libwb::format::{BLOCK_BYTES, SegmentId, to_u64};
use libwb::log::pairing::{BackingFacts, accept_growth};
use libwb::serve::Options;
use libwb::serve::loopdev::Reserved;
use std::fs::Permissions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long attach retries to open a device that is in use.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same after a daemon was killed: its I/O may still be under way, and holds the devices until
/// it ends.
const PATIENCE_AFTER_KILL: Duration = Duration::from_secs(15);
/// How long attach waits for a lock that others hold only for a moment.
const BRIEFLY: Duration = Duration::from_millis(500);
/// How long the kernel may take to change the queue, and to look for partitions.
const TO_COMPLETE: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A volume that `wbctl create` recorded; with --cache and --backing, a name for the volume
    #[arg(value_name = "NAME", required_unless_present = "cache")]
    first: Option<First>,
    /// The cache device: a block device or a file
    #[arg(long, value_name = "DEV", requires = "backing")]
    cache: Option<PathBuf>,
    /// The backing device: a block device or a file
    #[arg(long, value_name = "DEV", requires = "cache")]
    backing: Option<PathBuf>,
    #[command(flatten)]
    serve: ServeOption,
    #[command(flatten)]
    sector: SectorSize,
    #[command(flatten)]
    salvage: SalvageOption,
    /// Use a cache that is older than when wb last saw it: an earlier copy, or a device that went
    /// back in time. Its data may be older than that of the backing device
    #[arg(long)]
    older: bool,
    /// Serve only reads, and change nothing on either device
    ///
    /// wb keeps in memory what recovery would write. The block device is read-only, too. To mount a
    /// filesystem whose journal was not replayed, use -o ro,noload (ext4) or -o ro,norecovery
    /// (xfs).
    #[arg(long, conflicts_with_all = ["salvage", "grown"])]
    read_only: bool,
    /// The backing device is the same one, and has grown. Needed where the device has no identity
    /// that shows this, such as a plain file
    #[arg(long)]
    grown: bool,
    /// Wait up to this long for devices that are not there yet, as at boot
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u32,
    /// Tunables for this attach only
    #[arg(value_name = "KEY=VALUE")]
    tunables: Vec<String>,
}

/// The first positional argument. NAME is optional where --cache is given.
#[derive(Clone, Debug)]
enum First {
    Name(VolumeName),
    Tunable(String),
}

impl FromStr for First {
    type Err = String;

    fn from_str(text: &str) -> Result<First, String> {
        if text.contains('=') {
            Ok(First::Tunable(text.into()))
        } else {
            text.parse().map(First::Name)
        }
    }
}

impl Args {
    fn volume(&self) -> Result<(VolumeName, RecordedVolume)> {
        let (name, tunable) = match &self.first {
            Some(First::Name(name)) => (Some(name), None),
            Some(First::Tunable(pair)) => (None, Some(pair)),
            None => (None, None),
        };
        let (name, mut volume) = match (name, &self.cache, &self.backing) {
            (name, Some(cache), Some(backing)) => {
                let volume = RecordedVolume {
                    // Others read these paths from other working directories.
                    cache: absolute(cache)?,
                    backing: absolute(backing)?,
                    serve: FrontEnd::default(),
                    sector_size: None,
                    tunables: Default::default(),
                };
                (name.cloned().map_or_else(|| VolumeName::of_device(cache), Ok)?, volume)
            }
            (Some(name), ..) => {
                let volume = RecordedVolume::load(name)?.ok_or_else(|| not_recorded(name))?;
                (name.clone(), volume)
            }
            _ => bail!("give a volume's name, or --cache and --backing"),
        };
        volume.serve = self.serve.front_end.unwrap_or(volume.serve);
        volume.sector_size = self.sector.sector_size.or(volume.sector_size);
        let tunables: Vec<String> = tunable.into_iter().chain(&self.tunables).cloned().collect();
        volume.tunables.extend(parse_tunables(&tunables)?);
        Ok((name, volume))
    }
}

pub(crate) fn attach(args: &Args, out: &mut Output) -> Result<Exit> {
    // Before anything else is opened.
    let reserved = Reserved::take().context("cannot open /dev/null")?;
    let (name, volume) = args.volume()?;
    // Before any device or file is touched.
    volume.tunables()?;
    libwb::serve::refuse_without_root().map_err(anyhow::Error::msg)?;
    // Before other threads are started.
    let (end, ended) = channel();
    let stages = signals::take(end.clone())?;
    logging::to_stderr()?;
    libwb::serve::abort_on_panic(|report| {
        logging::line(report);
        logging::finish();
    });
    let attached = serve(args, name, volume, reserved, (end, &ended), &stages, out);
    if let Err(e) = &attached {
        // The reader of the log may have stalled, and a direct write to it could block forever.
        logging::line(&format!("wbctl: {}", cli::explain(e)));
    }
    logging::finish();
    Ok(if attached.is_ok() { Exit::Done } else { Exit::Failed })
}

/// Serves a volume until a signal or a client ends it.
fn serve(
    args: &Args,
    name: VolumeName,
    volume: RecordedVolume,
    reserved: Reserved,
    (end, ended): (Sender<End>, &Receiver<End>),
    stages: &Stages,
    out: &mut Output,
) -> Result<()> {
    lock_for_life(&name)?;
    leftovers::warn(&name);
    serving::remove_dead(&name);
    let (cache, backing) =
        open_patiently(&name, &volume, Duration::from_secs(args.wait.into()), args.read_only)?;
    let options = Options {
        sector_size: sector_size::choose(volume.sector_size, &backing)?,
        read_only: args.read_only,
        backing: backing.traits,
    };
    if let Err(why) = libwb::serve::guard_against_reclaim() {
        tracing::warn!("{why}: the volume may hang when memory is short");
    }
    stages.reach(Stage::Recovering);

    let watched = Devices::of(&cache, &backing)?;
    let io = Io::start()?;
    let runtime = io.runtime();
    let devices = [io.serve(cache), io.serve(backing)];
    watch::start(devices.clone());
    let recovering = Busy::while_devices_work("recovering", &devices);
    let cache = recover(&io, args, &volume, &devices[0], &devices[1])?;
    drop(recovering);
    let keeper =
        if args.read_only { None } else { Keeper::start(cache.clone(), About::of(&name, &volume)) };
    let Options { sector_size, read_only, .. } = options;
    let (to_close, to_look_at) = (cache.clone(), watched.clone());
    let close = move || {
        let closed = if read_only { Ok(()) } else { io.block_on(to_close.close()) };
        keeper.into_iter().for_each(|keeper| keeper.finish(closed.is_ok()));
        closed?;
        to_look_at.refuse_gone(to_close.status().dirty_blocks)
    };
    let serving = Serving {
        name: &name,
        cache: &cache,
        runtime: &runtime,
        options,
        reserved,
        lost: lost(&end),
    };
    let device = match serving.start(volume.serve) {
        Ok(device) => device,
        Err(e) => {
            name.withdraw();
            let _ = close();
            return Err(e.into());
        }
    };
    watched.served_as(device.path());
    if !device.is_complete() {
        complete_loop_device(device.path());
    }
    let served = LiveVolume::of(&name, &cache, &devices, &device);
    let daemon = Daemon {
        name: name.clone(),
        watched,
        volume,
        cache,
        devices,
        device: device.path().into(),
        sector_size,
        runtime: (*runtime).clone(),
        read_only,
        setting: Mutex::default(),
        end,
    };
    if let Err(e) = announce(&name, daemon, out) {
        name.withdraw();
        let _ = device.detach();
        let _ = close();
        return Err(e);
    }
    stages.reach(Stage::Serving);
    serve_until_ended(&served, device, ended, close)
}

/// What ends the daemon when its block device gets no more requests.
fn lost(end: &Sender<End>) -> Arc<dyn Fn(&str) + Send + Sync> {
    let end = end.clone();
    Arc::new(move |why| drop(end.send(End::Lost(why.into()))))
}

/// Has the loop device completed, and gives up after [`TO_COMPLETE`] if a device hangs.
fn complete_loop_device(device: &Path) {
    let begun = Instant::now();
    let why = match apart::run(Task::CompleteLoop, device, || begun.elapsed() < TO_COMPLETE) {
        Some(Ok(())) => return,
        Some(Err(e)) => e.to_string(),
        None => "it does not answer".into(),
    };
    tracing::warn!(
        "{} may not show partitions, and other requests may wait for a long discard: {why}",
        device.display()
    );
}

/// Opens the cache, unless it is an older copy, or a second cache in front of a dirty one.
fn recover(
    io: &Io,
    args: &Args,
    volume: &RecordedVolume,
    cache: &Device,
    backing: &Device,
) -> Result<Cache> {
    let past = Past::look_up(io, cache, args.older, |why| tracing::warn!("{why}"))?;
    if !args.read_only {
        rival::refuse(io, &volume.cache, past.uuid.as_deref(), &volume.backing)?;
    }
    if args.grown {
        let accepted = io.block_on(accept_growth(cache, &BackingFacts::of(backing), past.reach));
        accepted.map_err(|e| past.explain(CacheError::Log(e).into()))?;
    }
    let tunables = volume.tunables()?;
    let open = async |known| {
        let (cache, backing) = (cache.clone(), backing.clone());
        let options = if args.read_only { OpenOptions::read_only() } else { OpenOptions::serve() };
        Cache::open(cache, backing, io.runtime(), options.knowing(known).tunables(tunables.clone()))
            .await
    };
    let opened = io.block_on(salvage::open(&args.salvage, cache, backing, past.reach, open));
    let (cache, salvaged) = opened.map_err(|e| past.explain(e))?;
    for line in salvaged.iter().flat_map(salvage::outcome) {
        tracing::warn!("the log was corrupt: {line}");
    }
    let status = cache.status();
    if status.newest == SegmentId::NONE {
        tracing::info!("the cache is new: there was nothing to recover");
        return Ok(cache);
    }
    tracing::info!(
        "recovered in {:.2} s, {} of the log read: {} in the cache still await write-back",
        status.recovery_time.as_secs_f64(),
        human_size(status.recovery_bytes),
        human_size(status.dirty_blocks * to_u64(BLOCK_BYTES))
    );
    Ok(cache)
}

/// Takes the volume's lock for the life of the process: its devices are not free before it ends.
fn lock_for_life(name: &VolumeName) -> Result<()> {
    let started = Instant::now();
    loop {
        match name.lock()? {
            Some(lock) => {
                std::mem::forget(lock);
                return Ok(());
            }
            // Other processes take the lock for a moment to see whether it is free.
            None if started.elapsed() < BRIEFLY => std::thread::sleep(Duration::from_millis(10)),
            None => bail!("volume '{name}' is attached already; see wbctl status {name}"),
        }
    }
}

/// Opens the control socket, and announces that the volume can be used.
fn announce(name: &VolumeName, daemon: Daemon, out: &mut Output) -> Result<()> {
    let (socket, device) = (name.socket(), daemon.device.clone());
    control::serve(&socket, move |request, replies| daemon.answer(&request, replies))
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    link(name, &device);
    writeln!(out, "ready {}", device.display())?;
    out.flush()?;
    notify::ready(SERVING);
    Ok(())
}

fn open_patiently(
    name: &VolumeName,
    volume: &RecordedVolume,
    wait: Duration,
    read_only: bool,
) -> Result<(Opened, Opened)> {
    // A daemon that ends in order removes its socket.
    let in_use = if name.socket().exists() { PATIENCE_AFTER_KILL } else { PATIENCE };
    let access = if read_only { Access::Read } else { Access::Write };
    let started = Instant::now();
    loop {
        match probe::open_pair(&volume.cache, &volume.backing, [access; 2]) {
            Err(e) if started.elapsed() < patience(&e, in_use, wait) => {
                std::thread::sleep(Duration::from_millis(100))
            }
            other => return Ok(other?),
        }
    }
}

/// How long attach retries after an error. For a device that is not there, the user decides.
fn patience(error: &OpenError, in_use: Duration, wait: Duration) -> Duration {
    match error {
        OpenError::InUse { .. } => in_use,
        OpenError::System { cause, .. } if cause.kind() == ErrorKind::NotFound => wait,
        _ => Duration::ZERO,
    }
}

/// Makes a stable name for the block device. udev makes the same link (dist/udev), but udev may not
/// be running. The volume works without it.
fn link(name: &VolumeName, device: &Path) {
    let link = name.link();
    // In one step, so that a link to the previous device never vanishes in between.
    let new = link.with_file_name(format!(".{name}"));
    let _ = std::fs::remove_file(&new);
    let folder = link.parent().unwrap_or(&link);
    let made = std::fs::create_dir_all(folder)
        // Readable for all users, whatever the umask.
        .and_then(|()| std::fs::set_permissions(folder, Permissions::from_mode(0o755)))
        .and_then(|()| std::os::unix::fs::symlink(device, &new))
        .and_then(|()| std::fs::rename(&new, &link));
    if let Err(e) = made {
        tracing::warn!("cannot make the link {}: {e}", link.display());
    }
    unlink_others(&link, device);
}

/// Removes the links of other volumes to this device. Their daemons were killed, and the device
/// used to be theirs.
fn unlink_others(own: &Path, device: &Path) {
    for entry in
        own.parent().and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten().flatten()
    {
        let link = entry.path();
        if link != own && std::fs::canonicalize(&link).is_ok_and(|to| to == device) {
            tracing::warn!(
                "removed {}: it belonged to a daemon that was killed, and would lead to this \
                 volume",
                link.display()
            );
            let _ = std::fs::remove_file(&link);
        }
    }
}
