//! `wbctl attach`: the daemon. Recovers a volume and serves it in the foreground.

use crate::config::{Volume, parse_tunables};
use crate::create::{open_pair, parse_sector_size, sector_size};
use crate::notify::{self, Busy};
use crate::place::Name;
use crate::{Pair, leftovers, logging, salvage, show};
use anyhow::{Context, Result, anyhow, bail};
use futures_util::future::{Aborted, abortable};
use libwb::cache::{Cache, TunableValue};
use libwb::cli::{Output, human_size};
use libwb::control::{self, LiveStatus, Replies, Reply, Request, VolumeStatus};
use libwb::device::probe::{OpenError, Opened};
use libwb::device::{Device, UringDevice};
use libwb::format::{BLOCK_BYTES, to_u64};
use libwb::log::create::accept_growth;
use libwb::log::scan::BackingFacts;
use libwb::reactor::{Handle, Reactor};
use libwb::serve::loopdev::{LoopDevice, Options, holders};
use nix::sys::signal::{SigSet, Signal};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a device that is in use is tried again: a daemon that was just killed may have I/O under way.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long something is waited for that is to pass at once.
const BRIEFLY: Duration = Duration::from_millis(500);
/// How long the daemon, told to end by a signal, waits for the device to be released.
const RELEASE: Duration = Duration::from_secs(60);
/// What systemd is told the volume is doing.
const SERVING: &str = "serving";
/// How often a drain reports progress.
const PROGRESS: Duration = Duration::from_millis(250);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A volume that was recorded by `wbctl create`; with --cache and --backing, a name for the volume
    #[arg(value_name = "NAME", required_unless_present = "cache")]
    first: Option<First>,
    /// The cache device: a block device or a file
    #[arg(long, value_name = "DEV", requires = "backing")]
    cache: Option<PathBuf>,
    /// The backing device: a block device or a file
    #[arg(long, value_name = "DEV", requires = "cache")]
    backing: Option<PathBuf>,
    /// Logical sector size of the loop device in bytes; by default that of the backing device
    #[arg(long, value_parser = parse_sector_size, value_name = "512|4096")]
    sector_size: Option<u32>,
    #[command(flatten)]
    salvage: salvage::Salvage,
    /// The backing device is the same, and has grown. Needed where it has no identity that shows that, as a plain file
    #[arg(long)]
    grown: bool,
    /// Wait so long for devices that are not there yet, as at boot
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u32,
    /// Tunables for this time
    #[arg(value_name = "KEY=VALUE")]
    tunables: Vec<String>,
}

/// The first word that is no option. NAME may be left out where --cache is given.
#[derive(Clone, Debug)]
enum First {
    Name(Name),
    Tunable(String),
}

impl FromStr for First {
    type Err = String;

    fn from_str(text: &str) -> Result<First, String> {
        if text.contains('=') { Ok(First::Tunable(text.into())) } else { text.parse().map(First::Name) }
    }
}

impl Args {
    fn volume(&self) -> Result<(Name, Volume)> {
        let (name, tunable) = match &self.first {
            Some(First::Name(name)) => (Some(name), None),
            Some(First::Tunable(pair)) => (None, Some(pair)),
            None => (None, None),
        };
        let (name, mut volume) = match (name, &self.cache, &self.backing) {
            (name, Some(cache), Some(backing)) => {
                let volume = Volume {
                    cache: cache.clone(),
                    backing: backing.clone(),
                    sector_size: None,
                    tunables: Default::default(),
                };
                (name.cloned().map_or_else(|| Name::of_device(cache), Ok)?, volume)
            }
            (Some(name), ..) => {
                let volume = Volume::load(name)?;
                let volume = volume.ok_or_else(|| {
                    anyhow!(
                        "no volume '{name}' is recorded in {}; see wbctl create",
                        name.config_file().display()
                    )
                })?;
                (name.clone(), volume)
            }
            _ => bail!("give a volume's name, or --cache and --backing"),
        };
        volume.sector_size = self.sector_size.or(volume.sector_size);
        let tunables: Vec<String> = tunable.into_iter().chain(&self.tunables).cloned().collect();
        volume.tunables.extend(parse_tunables(&tunables)?);
        Ok((name, volume))
    }
}

/// Why the daemon is to end.
enum End {
    Signal(Signal),
    /// A client asked for it, and is told when all is done.
    Detach(Replies),
}

/// What the control socket works on.
struct Daemon {
    name: Name,
    volume: Volume,
    cache: Cache,
    device: PathBuf,
    sector_size: u32,
    runtime: Handle,
    /// Held while tunables are changed, so that of two clients at a time neither undoes what the other sets.
    setting: Mutex<()>,
    end: Sender<End>,
}

pub(crate) fn attach(args: &Args, out: &mut Output) -> Result<()> {
    let (name, volume) = args.volume()?;
    let tunables = volume.tunables()?;
    logging::to_stderr();
    libwb::serve::abort_on_panic();
    lock_for_life(&name)?;
    leftovers::warn(&name);
    let (cache, backing) = open_patiently(&volume, Duration::from_secs(args.wait.into()))?;
    let sector_size = sector_size(volume.sector_size, &backing)?;
    if let Err(why) = libwb::serve::guard_against_reclaim() {
        tracing::warn!("{why}: the volume may hang when memory is short");
    }
    let (end, ended) = channel();
    watch_signals(end.clone())?;
    let recovering = Busy::with("recovering");

    let reactor = Reactor::start().context("cannot use io_uring, which wb needs")?;
    let serve = |opened| -> Device { Arc::new(UringDevice::new(reactor.handle(), opened)) };
    let runtime = Arc::new(reactor.handle().clone());
    let (cache, backing) = (serve(cache), serve(backing));
    if args.grown {
        reactor.block_on(accept_growth(&cache, &BackingFacts::of(&backing)))?;
    }
    let open = async || Cache::open(cache.clone(), backing.clone(), runtime.clone(), tunables.clone()).await;
    let (cache, salvaged) = reactor.block_on(args.salvage.open(&cache, &backing, open))?;
    for line in salvaged.iter().flat_map(salvage::outcome) {
        tracing::warn!("the log was corrupt: {line}");
    }
    drop(recovering);
    let status = cache.status();
    tracing::info!(
        "recovered in {:.2} s, {} of the log read: {} in the cache are not written back yet",
        status.recovery_time.as_secs_f64(),
        human_size(status.recovery_bytes),
        human_size(status.dirty_blocks * to_u64(BLOCK_BYTES))
    );
    let file = name.served_file();
    let served = LoopDevice::attach(cache.clone(), reactor.handle(), &file, Options { sector_size });
    let device = match served {
        Ok(device) => device,
        Err(e) => {
            let _ = reactor.block_on(cache.close());
            return Err(e.into());
        }
    };
    let daemon = Daemon {
        name: name.clone(),
        volume,
        cache: cache.clone(),
        device: device.path().into(),
        sector_size,
        runtime: reactor.handle().clone(),
        setting: Mutex::default(),
        end,
    };
    if let Err(e) = announce(&name, daemon, out) {
        let _ = device.detach();
        let _ = reactor.block_on(cache.close());
        return Err(e);
    }
    serve_until_ended(&ended, &name, device, &reactor, &cache)
}

/// Takes the volume's lock, for as long as the process lives: its devices are not free before that.
fn lock_for_life(name: &Name) -> Result<()> {
    let started = Instant::now();
    loop {
        match name.lock()? {
            Some(lock) => {
                std::mem::forget(lock);
                return Ok(());
            }
            // Others take the lock for a moment to see whether it is free.
            None if started.elapsed() < BRIEFLY => std::thread::sleep(Duration::from_millis(10)),
            None => bail!("volume '{name}' is attached already; see wbctl status {name}"),
        }
    }
}

/// Opens the control socket, and tells everybody that the volume can be used.
fn announce(name: &Name, daemon: Daemon, out: &mut Output) -> Result<()> {
    let (socket, device) = (name.socket(), daemon.device.clone());
    control::serve(&socket, move |request, replies| daemon.answer(&request, replies))
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    link(name, &device);
    writeln!(out, "ready {}", device.display())?;
    out.flush()?;
    notify::ready(SERVING);
    Ok(())
}

fn open_patiently(volume: &Volume, wait: Duration) -> Result<(Opened, Opened)> {
    let pair = Pair { cache: volume.cache.clone(), backing: volume.backing.clone() };
    let started = Instant::now();
    loop {
        match open_pair(&pair) {
            Err(e) if started.elapsed() < patience(&e, wait) => {
                std::thread::sleep(Duration::from_millis(100))
            }
            other => return other,
        }
    }
}

/// How long it is tried again after an error. A device that is not there is waited for as long as the user says.
fn patience(error: &anyhow::Error, wait: Duration) -> Duration {
    match error.downcast_ref() {
        Some(OpenError::InUse { .. }) => PATIENCE,
        Some(OpenError::System { cause, .. }) if cause.kind() == ErrorKind::NotFound => wait,
        _ => Duration::ZERO,
    }
}

/// Blocks the signals that end the daemon in this thread and all that it starts later, and waits for them in one.
fn watch_signals(end: Sender<End>) -> Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_block()?;
    std::thread::Builder::new().name("wb-signals".into()).spawn(move || {
        while let Ok(signal) = signals.wait() {
            let _ = end.send(End::Signal(signal));
        }
    })?;
    Ok(())
}

/// A stable name for the loop device. udev makes the same (dist/udev), but need not run. The volume can be used without.
fn link(name: &Name, device: &Path) {
    let link = name.link();
    // In one step, so that a name that leads to the device before does not vanish meanwhile.
    let new = link.with_file_name(format!(".{name}"));
    let _ = std::fs::remove_file(&new);
    let made = std::fs::create_dir_all(link.parent().unwrap_or(&link))
        .and_then(|()| std::os::unix::fs::symlink(device, &new))
        .and_then(|()| std::fs::rename(&new, &link));
    if let Err(e) = made {
        tracing::warn!("cannot make the link {}: {e}", link.display());
    }
}

fn serve_until_ended(
    ended: &Receiver<End>,
    name: &Name,
    device: LoopDevice,
    reactor: &Reactor,
    cache: &Cache,
) -> Result<()> {
    let end = ended.recv();
    notify::stopping();
    let _closing = Busy::with("closing");
    match &end {
        Ok(End::Signal(signal)) => {
            tracing::info!("{signal}: closing the log");
            wait_until_released(&device, ended);
        }
        Ok(End::Detach(_)) | Err(_) => tracing::info!("detaching"),
    }
    let held = holders(device.path());
    if !held.is_empty() {
        tracing::warn!("{} is still {}: it fails from now on", device.path().display(), held.join(", "));
    }
    let synced = write_out(&device, ended);
    if let Err(e) = device.detach() {
        tracing::warn!("{e}");
    }
    let closed = reactor.block_on(cache.close());
    for file in [name.link(), name.socket()] {
        let _ = std::fs::remove_file(file);
    }
    let outcome = synced.and(closed.map_err(Into::into));
    if let Ok(End::Detach(mut replies)) = end {
        let message = |e| format!("detached, but not all data could be kept: {e:#}");
        let reply = outcome.as_ref().map_or_else(|e| Reply::Error { message: message(e) }, |()| Reply::Done);
        // A client that went away is told nothing.
        let _ = replies.send(&reply);
    }
    outcome
}

/// When the system shuts down, filesystems on the device may be unmounted only after the daemon was told to end. So it
/// serves on while the device is held, up to a limit or a second signal.
fn wait_until_released(device: &LoopDevice, ended: &Receiver<End>) {
    let started = Instant::now();
    let mut told = false;
    while started.elapsed() < RELEASE {
        let held = holders(device.path());
        if held.is_empty() {
            return;
        }
        if !told {
            tracing::warn!("waiting: {} is still {}", device.path().display(), held.join(", "));
            told = true;
        }
        if ended.recv_timeout(Duration::from_millis(100)).is_ok() {
            return;
        }
    }
}

/// Writes out what programs wrote through the device's page cache. That can take for ever when the log is full and the
/// backing device fails, so a second signal gives up on it.
fn write_out(device: &LoopDevice, ended: &Receiver<End>) -> Result<()> {
    let (done, result) = channel();
    let path = device.path().to_path_buf();
    std::thread::spawn(move || {
        let _ = done.send(std::fs::File::open(&path).and_then(|file| file.sync_all()));
    });
    loop {
        match result.recv_timeout(BRIEFLY) {
            Ok(synced) => {
                return synced.with_context(|| format!("cannot write out {}", device.path().display()));
            }
            Err(_) if matches!(ended.try_recv(), Ok(End::Signal(_))) => {
                bail!("{}: ended by a second signal before all was written out", device.path().display())
            }
            Err(_) => {}
        }
    }
}

/// Refuses to take a device away from those who hold it.
pub(crate) fn refuse_held(device: &Path, force: bool) -> Result<()> {
    match holders(device) {
        held if force || held.is_empty() => Ok(()),
        held => Err(anyhow!(
            "{} is {}; release it first, or use --force and let its users fail",
            device.display(),
            held.join(", ")
        )),
    }
}

impl Daemon {
    fn answer(&self, request: &Request, replies: &mut Replies) {
        let reply = match request {
            Request::Status => Ok(Reply::Status(Box::new(self.status()))),
            Request::Flush => self.run(None, |cache| async move { cache.flush().await }),
            Request::Drain => self.drain(replies),
            Request::Tunables => Ok(Reply::Tunables { tunables: control::by_name(&self.cache.tunables()) }),
            Request::ClearStats => {
                self.cache.clear_statistics();
                Ok(Reply::Done)
            }
            Request::Set { tunables } => self.set(tunables),
            Request::Pause => {
                tracing::info!("write-back is paused");
                self.cache.pause();
                Ok(Reply::Done)
            }
            Request::Resume => {
                tracing::info!("write-back goes on");
                self.cache.resume();
                Ok(Reply::Done)
            }
            Request::Detach { drain, force } => match self.detach(*drain, *force, replies) {
                Ok(()) => return,
                Err(e) => Err(e),
            },
        };
        // A client that went away is told nothing.
        let _ = replies.send(&reply.unwrap_or_else(|e| Reply::Error { message: format!("{e:#}") }));
    }

    fn status(&self) -> VolumeStatus {
        let status = self.cache.status();
        VolumeStatus {
            name: self.name.to_string(),
            state: if status.failure.is_some() { show::FAILED } else { show::ATTACHED }.into(),
            device: Some(self.device.clone()),
            cache: self.volume.cache.clone(),
            backing: self.volume.backing.clone(),
            live: Some(LiveStatus::new(&status, self.sector_size)),
        }
    }

    fn drain(&self, replies: &mut Replies) -> Result<Reply> {
        notify::status("draining");
        let drained = self.run(Some(replies), |cache| async move { cache.drain().await });
        notify::status(SERVING);
        drained
    }

    fn set(&self, wanted: &BTreeMap<String, TunableValue>) -> Result<Reply> {
        let _setting = self.setting.lock();
        let mut tunables = self.cache.tunables();
        for (key, value) in wanted {
            tunables.set(key, &value.to_string())?;
        }
        tracing::info!(
            "set {}",
            wanted.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
        );
        self.cache.set_tunables(tunables);
        Ok(Reply::Done)
    }

    /// Runs a request of the cache on the reactor, and reports progress meanwhile. A client that wants progress and goes
    /// away ends the request.
    fn run<F>(&self, mut progress: Option<&mut Replies>, work: impl FnOnce(Cache) -> F) -> Result<Reply>
    where
        F: Future<Output = Result<(), libwb::cache::CacheError>> + Send + 'static,
    {
        let (done, result) = channel();
        let (work, stop) = abortable(work(self.cache.clone()));
        self.runtime.run_now(async move {
            let _ = done.send(work.await);
        });
        loop {
            match result.recv_timeout(PROGRESS) {
                Ok(Ok(result)) => return result.map(|()| Reply::Done).map_err(Into::into),
                Ok(Err(Aborted)) => bail!("the client went away"),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                    if let Some(replies) = progress.as_mut() {
                        let dirty_bytes = self.cache.status().dirty_blocks * to_u64(BLOCK_BYTES);
                        // What it says of a client that has gone, the end of the work will tell.
                        let _ = replies.send(&Reply::Progress { dirty_bytes }).inspect_err(|_| stop.abort());
                    }
                }
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => bail!("the daemon is ending"),
            }
        }
    }

    /// Makes the daemon end, which then replies itself.
    fn detach(&self, drain: bool, force: bool, replies: &mut Replies) -> Result<()> {
        refuse_held(&self.device, force)?;
        if drain {
            // What programs wrote through the page cache of the device is to be drained as well.
            std::fs::File::open(&self.device).and_then(|device| device.sync_all())?;
            self.drain(replies)?;
            refuse_held(&self.device, force)?;
        }
        self.end.send(End::Detach(replies.try_clone()?)).ok().context("the daemon is ending")
    }
}
