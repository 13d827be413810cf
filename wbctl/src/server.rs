//! The server of a volume: recovers it and serves its requests, as long as its keeper lives.
//!
//! The first server makes all that the keeper holds. A later one finds it there.

use crate::apart::{self, Task};
use crate::attach_args::Args;
use crate::config::RecordedVolume;
use crate::daemon::{Daemon, SERVING};
use crate::devices::Devices;
use crate::ending::{End, LiveVolume, serve_until_ended};
use crate::keeping::{CLIENT, Given, HEAD, LISTENER, Link, REFUSED};
use crate::linking::link;
use crate::notes::About;
use crate::notify::{self, Busy};
use crate::noting::Noting;
use crate::opening::{open_devices, recover, recover_again, reopen_devices};
use crate::restart::Waiting;
use crate::serving::{self, Served, Serving};
use crate::signals::{self, Stage, Stages};
use crate::standing::Standing;
use crate::volume_paths::VolumeName;
use crate::{leftovers, logging, sector_size, to_keeper, watch};
use anyhow::{Context, Result, bail};
use libwb::cache::{Cache, Head};
use libwb::cli::{self, Backing, Exit, Io, Output};
use libwb::control;
use libwb::device::Device;
use libwb::device::nbd::Terms;
use libwb::device::probe::Opened;
use libwb::serve::Options;
use libwb::serve::loopdev::Reserved;
use rustix::process::DumpableBehavior;
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long the kernel may take to change the queue, and to look for partitions.
const TO_COMPLETE: Duration = Duration::from_secs(10);

/// Serves a volume until the keeper or a client ends it.
pub(crate) fn serve(args: &Args, link: Link, reserved: Reserved, out: &mut Output) -> Result<Exit> {
    // Before other threads are started.
    signals::ignore()?;
    // The next server starts once the core is written. If the core went to this very volume, its
    // write would never end.
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    logging::to_stderr()?;
    libwb::serve::abort_on_panic(|report| {
        to_keeper::last_words(report);
        logging::line(report);
        logging::finish();
    });
    let (end, ended) = channel();
    let stages = Arc::new(Stages::new(end.clone()));
    let served = meet(link, reserved, &stages).and_then(|(given, before)| {
        let server = Server { args, stages: &stages, end };
        match before {
            Some(standing) => server.go_on(given, standing, &ended, out),
            None => server.begin(given, &ended, out),
        }
    });
    if let Err(e) = &served {
        // The reader of the log may have stalled, and a direct write to it could block forever.
        logging::line(&format!("wbctl: {}", cli::explain(e)));
    }
    logging::finish();
    Ok(if served.is_ok() { Exit::Done } else { Exit::Failed })
}

/// Takes what the keeper has to give. What this program does not understand is for another one.
fn meet(link: Link, reserved: Reserved, stages: &Arc<Stages>) -> Result<(Given, Option<Standing>)> {
    let told = stages.clone();
    let mut given = to_keeper::meet(link, reserved)?;
    let standing = given.state.take().map(|text| {
        Standing::read(&text).unwrap_or_else(|e| {
            logging::line(&format!("wbctl: {e:#}"));
            logging::finish();
            std::process::exit(REFUSED)
        })
    });
    if standing.is_some() {
        // Signals end it in order, and not before it serves.
        stages.reach(Stage::Serving);
    }
    to_keeper::listen(&given.signals, move |signal| told.take(signal))?;
    Ok((given, standing))
}

struct Server<'a> {
    args: &'a Args,
    stages: &'a Stages,
    end: Sender<End>,
}

/// A volume with its devices open.
struct OnDevices {
    name: VolumeName,
    volume: RecordedVolume,
    options: Options,
    watched: Devices,
    io: Io,
    devices: [Device; 2],
    /// On what terms the backing device is used, if it is on a server.
    terms: Option<Terms>,
}

/// A recovered volume.
struct Recovered {
    on: OnDevices,
    cache: Cache,
    noting: Option<Noting>,
}

impl Server<'_> {
    /// Serves a volume that is not attached yet.
    fn begin(self, given: Given, ended: &Receiver<End>, out: &mut Output) -> Result<()> {
        let (name, volume) = self.args.volume()?;
        leftovers::warn(&name);
        serving::remove_dead(&name);
        let io = Io::start()?;
        let opened = open_devices(&io, &name, &volume, self.args)?;
        let sector_size = sector_size::choose(volume.sector_size, &opened.1.device)?;
        let on = self.on_devices(io, name, volume, opened, sector_size)?;
        self.stages.reach(Stage::Recovering);
        let head = if self.args.read_only { None } else { Some(new_head()?) };
        let busy = Busy::while_devices_work("recovering", &on.devices);
        let cache = recover(&on.io, self.args, &on.volume, &on.devices, head.as_ref())?;
        drop(busy);
        let mut recovered = Recovered { on, cache, noting: None };
        recovered.start_noting();
        let serving = recovered.serving(lost(&self.end));
        let made = serving.start(&recovered.on.volume.serve, given.kept.into_reserved());
        let device = match made {
            Ok(device) => device,
            Err(e) => {
                recovered.give_up();
                return Err(e);
            }
        };
        if !device.is_complete() {
            complete_loop_device(device.path());
        }
        match recovered.announce(&self, &device, given.program, out) {
            Ok(()) => self.until_ended(recovered, device, ended),
            Err(e) => {
                // No other server goes on from here.
                to_keeper::ending();
                let _ = device.detach();
                recovered.give_up();
                Err(e)
            }
        }
    }

    /// Goes on where another server has ended. If that fails, the keeper decides what comes next:
    /// nothing is taken down here.
    fn go_on(
        self,
        mut given: Given,
        standing: Standing,
        ended: &Receiver<End>,
        out: &mut Output,
    ) -> Result<()> {
        let waiting = given.kept.take(CLIENT).map(Waiting::on);
        let name = self.args.name()?;
        let volume = standing.volume.clone();
        let io = Io::start()?;
        let opened = reopen_devices(&io, &standing, self.args.read_only)?;
        let on = self.on_devices(io, name, volume, opened, standing.sector_size)?;
        let head = self.head_left(given.kept.take(HEAD))?;
        let cache = recover_again(&on.io, &standing, &on.devices, head.as_ref())?;
        let mut recovered = Recovered { on, cache, noting: None };
        let listener = given.kept.take(LISTENER).context("the keeper has no socket")?;
        let device = recovered.serving(lost(&self.end)).resume(&standing, given.kept)?;
        let (program, listener, told) = (given.program, listener.into(), standing.announced);
        match recovered.answer_clients(&self, &device, program, listener, told) {
            // The last server may have died before it did so. The user may read no more.
            Ok(standing) => drop(recovered.tell_user(standing, &device, out)),
            Err(e) => {
                // Dropping it would take it down.
                std::mem::forget(device);
                return Err(e);
            }
        }
        notify::ready(SERVING);
        waiting.into_iter().for_each(|client| client.done(given.is_installed));
        // The note may go to the volume itself, which is served from here on.
        recovered.start_noting();
        self.until_ended(recovered, device, ended)
    }

    /// The head of the log that the last server has left. A volume that takes writes has one.
    fn head_left(&self, left: Option<OwnedFd>) -> Result<Option<Head>> {
        let head = left.map(Head::open).transpose();
        let head = head.context("cannot use the head of the log that the last server has left")?;
        match (self.args.read_only, &head) {
            (true, None) => Ok(None),
            (false, Some(head)) if !head.is_blank() => Ok(Some(head.clone())),
            _ => bail!("the keeper does not have the head of the log that the last server used"),
        }
    }

    fn on_devices(
        &self,
        io: Io,
        name: VolumeName,
        volume: RecordedVolume,
        (cache, backing): (Opened, Backing),
        sector_size: u32,
    ) -> Result<OnDevices> {
        let options =
            Options { sector_size, read_only: self.args.read_only, backing: backing.traits };
        match libwb::serve::guard_against_reclaim() {
            // An ordinary user may not, and no memory of this host need wait for the volume.
            Err(why) if volume.serve.nbd().is_some() => tracing::debug!("{why}"),
            Err(why) => tracing::warn!("{why}: the volume may hang when memory is short"),
            Ok(()) => {}
        }
        let Backing { device, watched, terms, .. } = backing;
        let watched = Devices::of(&cache, watched)?;
        let devices = [io.serve(cache), device];
        watch::start(devices.clone());
        Ok(OnDevices { name, volume, options, watched, io, devices, terms })
    }

    fn until_ended(
        self,
        recovered: Recovered,
        device: Served,
        ended: &Receiver<End>,
    ) -> Result<()> {
        self.stages.reach(Stage::Serving);
        let on = &recovered.on;
        let by = (&*on.io.runtime(), on.options.read_only);
        let served = LiveVolume::of(&on.name, &recovered.cache, &on.devices, &device, by);
        serve_until_ended(&served, device, ended, move || recovered.close())
    }
}

impl Recovered {
    fn start_noting(&mut self) {
        let OnDevices { name, volume, options, .. } = &self.on;
        if !options.read_only {
            self.noting = Noting::start(self.cache.clone(), About::of(name, volume));
        }
    }

    fn serving(&self, lost: Arc<dyn Fn(&str) + Send + Sync>) -> Serving<'_> {
        let OnDevices { name, volume, options, io, .. } = &self.on;
        Serving {
            name,
            cache: &self.cache,
            runtime: io.runtime(),
            options: *options,
            insecure: volume.insecure,
            lost,
        }
    }

    /// Shows to others that the volume can be used.
    fn announce(
        &self,
        server: &Server<'_>,
        device: &Served,
        program: PathBuf,
        out: &mut Output,
    ) -> Result<()> {
        let socket = self.on.name.socket();
        let cannot = || format!("cannot listen on {}", socket.display());
        let listener = control::listen(&socket).with_context(cannot)?;
        to_keeper::keep(LISTENER, listener.as_fd()).with_context(cannot)?;
        let standing = self.answer_clients(server, device, program, listener, false)?;
        self.tell_user(standing, device, out)?;
        notify::ready(SERVING);
        Ok(())
    }

    /// Tells the user that the volume is ready, and the next server that it need not do so.
    fn tell_user(&self, standing: Standing, device: &Served, out: &mut Output) -> Result<()> {
        if standing.announced {
            return Ok(());
        }
        if let Some(device) = device.users().device() {
            link(&self.on.name, device);
        }
        writeln!(out, "ready {}", device.path().display())?;
        out.flush()?;
        Standing { announced: true, ..standing }.leave(&self.cache)
    }

    /// From now on, another server may go on. Returns what is left to it.
    fn answer_clients(
        &self,
        server: &Server<'_>,
        device: &Served,
        program: PathBuf,
        listener: UnixListener,
        announced: bool,
    ) -> Result<Standing> {
        let OnDevices { name, volume, options, watched, io, devices, terms } = &self.on;
        let users = device.users();
        users.device().into_iter().for_each(|device| watched.served_as(device));
        let standing = Standing {
            volume: volume.clone(),
            sector_size: options.sector_size,
            front_end: device.front_end(),
            device: device.path().into(),
            backing_terms: *terms,
            tunables: BTreeMap::new(),
            paused: false,
            announced,
        };
        standing.leave(&self.cache)?;
        let outlives = device.can_resume();
        to_keeper::ready(outlives)?;
        let daemon = Daemon {
            name: name.clone(),
            // Clients come when the user knows.
            standing: Standing { announced: true, ..standing.clone() },
            cache: self.cache.clone(),
            watched: watched.clone(),
            devices: devices.clone(),
            users,
            runtime: (*io.runtime()).clone(),
            read_only: options.read_only,
            outlives,
            program,
            setting: Mutex::default(),
            end: server.end.clone(),
        };
        let answer = move |request, replies: &mut _| daemon.answer(&request, replies);
        control::serve(listener, answer).context("cannot answer clients")?;
        Ok(standing)
    }

    fn close(self) -> Result<()> {
        let OnDevices { options, watched, io, .. } = self.on;
        let closed = if options.read_only { Ok(()) } else { io.block_on(self.cache.close()) };
        self.noting.into_iter().for_each(|noting| noting.finish(closed.is_ok()));
        closed?;
        watched.refuse_gone(self.cache.status().dirty_blocks)
    }

    /// Ends a volume that was not announced.
    fn give_up(self) {
        to_keeper::ending();
        self.on.name.withdraw();
        let _ = self.close();
    }
}

/// A new head of the log, which outlives this process.
fn new_head() -> Result<Head> {
    let head = Head::create().context("no memory for the head of the log")?;
    to_keeper::keep(HEAD, head.descriptor()).context("cannot hand over the head of the log")?;
    Ok(head)
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
