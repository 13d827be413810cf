//! How an attached volume's daemon answers requests over its socket.

use crate::apart::{self, Task};
use crate::devices::Devices;
use crate::ending::End;
use crate::holders::Users;
use crate::notify;
use crate::restart;
use crate::standing::Standing;
use crate::to_keeper;
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, anyhow, bail};
use futures_util::future::abortable;
use libwb::cache::{Cache, Status, TunableValue};
use libwb::cli::{count, human_time};
use libwb::control::{
    self, BackingLink, LiveStatus, Processes, Replies, Reply, Request, VolumeState, VolumeStatus,
};
use libwb::device::{Device, LinkStatus};
use libwb::format::{BLOCK_BYTES, to_u64};
use libwb::reactor::Handle;
use libwb::runtime::thread;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// The status that systemd shows.
pub(crate) const SERVING: &str = "serving";
/// How often a drain reports progress.
const PROGRESS: Duration = Duration::from_millis(250);
/// How often the daemon tells any other client that it is at work, and notices a client that is
/// gone. Clients lose patience only after a much longer time.
const WORKING: Duration = Duration::from_secs(2);
/// How long a pause waits for the batch under way.
const BATCH: Duration = Duration::from_secs(10);
const GONE: &str = "the client went away";

/// What the control socket works on.
pub(crate) struct Daemon {
    pub(crate) name: VolumeName,
    /// What the next server must know.
    pub(crate) standing: Standing,
    pub(crate) cache: Cache,
    /// Tells whether the files or devices still exist.
    pub(crate) watched: Devices,
    /// The cache device and the backing device.
    pub(crate) devices: [Device; 2],
    pub(crate) users: Users,
    pub(crate) runtime: Handle,
    pub(crate) read_only: bool,
    /// Whether another server can go on when this one dies.
    pub(crate) outlives: bool,
    /// The program that is installed.
    pub(crate) program: PathBuf,
    /// Held while tunables change, so that no client undoes the change of another.
    pub(crate) setting: Mutex<()>,
    pub(crate) end: Sender<End>,
}

/// What is wrong with the link to a device on a server.
fn trouble_of(device: &str, link: &LinkStatus) -> Option<String> {
    let time = human_time(link.down_for?.as_secs_f64());
    let why = link.problem.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
    let waiting = count(to_u64(link.waiting), "request");
    let wait = if link.waiting == 1 { "waits" } else { "wait" };
    Some(format!("the link to {device} has been down for {time}{why}: {waiting} {wait} for it"))
}

impl Daemon {
    pub(crate) fn answer(&self, request: &Request, replies: &mut Replies) {
        let reply = match request {
            Request::Flush
            | Request::Drain
            | Request::Set { .. }
            | Request::Pause
            | Request::Resume
                if self.read_only =>
            {
                Err(self.refusal())
            }
            Request::Status => Ok(Reply::Status(Box::new(self.status()))),
            Request::Flush => {
                self.run(replies, WORKING, |cache| async move { cache.flush().await })
            }
            Request::Drain => self.drain(replies),
            Request::Tunables => {
                Ok(Reply::Tunables { tunables: control::by_name(&self.cache.tunables()) })
            }
            Request::ClearStats => {
                self.cache.clear_statistics();
                Ok(Reply::Done)
            }
            Request::Set { tunables } => self.set(tunables),
            Request::Pause => Ok(self.pause(replies)),
            Request::Resume => {
                tracing::info!("write-back resumed");
                self.cache.resume();
                self.leave();
                Ok(Reply::Done)
            }
            Request::Restart => match self.restart(replies) {
                Ok(()) => return,
                Err(e) => Err(e),
            },
            Request::Detach { drain, force } => match self.detach(*drain, *force, replies) {
                Ok(()) => return,
                Err(e) => Err(e),
            },
        };
        // A client that went away gets no reply.
        let _ = replies.send(&reply.unwrap_or_else(|e| Reply::Error { message: format!("{e:#}") }));
    }

    fn status(&self) -> VolumeStatus {
        let status = self.cache.status();
        let troubles = self.troubles(&status);
        VolumeStatus {
            name: self.name.to_string(),
            state: self.state(&status, &troubles),
            message: (!troubles.is_empty()).then(|| troubles.join("; ")),
            device: Some(self.standing.device.clone()),
            cache: self.standing.volume.cache.clone(),
            backing: self.standing.volume.backing.clone(),
            live: Some(self.live(&status)),
            untold: Vec::new(),
        }
    }

    fn live(&self, status: &Status) -> LiveStatus {
        let processes = Processes {
            keeper: to_keeper::process(),
            server: std::process::id(),
            outlives_server: self.outlives,
        };
        let pending = self.devices.each_ref().map(|device| device.pending());
        LiveStatus {
            backing_link: self.backing().link().map(BackingLink::from),
            clients: self.users.clients().map(to_u64),
            ..LiveStatus::new(status, self.standing.sector_size, pending, processes)
        }
    }

    fn backing(&self) -> &Device {
        let [_, backing] = &self.devices;
        backing
    }

    /// What is wrong with the volume, one sentence each.
    fn troubles(&self, status: &Status) -> Vec<String> {
        let failure = status.failure.iter().map(|failure| format!("writes are refused: {failure}"));
        let writeback = status
            .writeback_error
            .iter()
            .map(|error| format!("write-back makes no progress: {error}"));
        let stuck = status.stuck.iter().map(ToString::to_string);
        let link = self.backing().link().and_then(|link| trouble_of(self.backing().name(), &link));
        failure.chain(link).chain(writeback).chain(stuck).chain(self.watched.troubles()).collect()
    }

    fn state(&self, status: &Status, troubles: &[String]) -> VolumeState {
        if status.failure.is_some() {
            VolumeState::Failed
        } else if !troubles.is_empty() {
            VolumeState::Degraded
        } else if self.read_only {
            VolumeState::AttachedReadOnly
        } else {
            VolumeState::Attached
        }
    }

    fn refusal(&self) -> anyhow::Error {
        anyhow!(
            "'{0}' is attached read-only; detach it, and attach it without --read-only: wbctl \
             detach {0}",
            self.name
        )
    }

    fn drain(&self, replies: &mut Replies) -> Result<Reply> {
        notify::status("draining");
        let drained = self.run(replies, PROGRESS, |cache| async move { cache.drain().await });
        notify::status(SERVING);
        drained
    }

    /// Pauses write-back, and waits up to [`BATCH`] for the current batch.
    fn pause(&self, replies: &mut Replies) -> Reply {
        tracing::info!("write-back paused");
        self.cache.pause();
        self.leave();
        let (cache, started) = (self.cache.clone(), Instant::now());
        let (ended, stop) = abortable(async move { cache.batch_ended().await });
        let is_worth_it = || started.elapsed() < BATCH && replies.send(&self.progress()).is_ok();
        let _ = self.runtime.run_watched(ended, WORKING, is_worth_it);
        stop.abort();
        Reply::Done
    }

    fn set(&self, wanted: &BTreeMap<String, TunableValue>) -> Result<Reply> {
        let _setting = self.setting.lock();
        let mut tunables = self.cache.tunables();
        for (key, value) in wanted {
            tunables.set(key, &value.to_string())?;
        }
        tunables.check()?;
        tracing::info!(
            "set {}",
            wanted
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect::<Vec<_>>()
                .join(" ")
        );
        self.cache.set_tunables(tunables);
        self.leave();
        Ok(Reply::Done)
    }

    /// Leaves to the next server what has changed.
    fn leave(&self) {
        if let Err(e) = self.standing.leave(&self.cache) {
            tracing::warn!("if this server died, the next one would not know what was set: {e:#}");
        }
    }

    /// Makes this server end in favour of the installed program. The next server sends the reply.
    fn restart(&self, replies: &mut Replies) -> Result<()> {
        if !self.outlives {
            bail!(
                "this kernel does not hand requests to another server, so the volume would fail; \
                 detach it, and attach it again"
            );
        }
        let (told, program) = (&mut replies.clone(), self.program.clone());
        let mut since = Instant::now();
        restart::refuse_unfit(&program, || {
            if since.elapsed() < WORKING {
                return true;
            }
            since = Instant::now();
            told.send(&self.progress()).is_ok()
        })?;
        self.end
            .send(End::Restart { replies: replies.clone() })
            .ok()
            .context("the daemon is ending")
    }

    /// Runs a request of the cache on the reactor, and reports progress meanwhile. If the client
    /// goes away, the request is cancelled and not waited for, since a device may hang.
    fn run<F>(
        &self,
        replies: &mut Replies,
        every: Duration,
        work: impl FnOnce(Cache) -> F,
    ) -> Result<Reply>
    where
        F: Future<Output = Result<(), libwb::cache::CacheError>> + Send + 'static,
    {
        let (work, stop) = abortable(work(self.cache.clone()));
        let mut is_gone = false;
        let ended = self.runtime.run_watched(work, every, || {
            is_gone = replies.send(&self.progress()).is_err();
            !is_gone
        });
        match ended {
            Some(Ok(result)) => Ok(result.map(|()| Reply::Done)?),
            _ if is_gone => {
                stop.abort();
                bail!("{GONE}")
            }
            _ => bail!("the daemon is ending"),
        }
    }

    /// Runs work that may block in a thread of its own, and reports progress meanwhile. If the
    /// client goes away, the work continues, but is not waited for.
    fn aside<T: Send + 'static>(
        &self,
        replies: &mut Replies,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let (done, result) = channel();
        let run = move || {
            let _ = done.send(work());
        };
        thread("wb-aside").spawn(run).context("cannot start a thread")?;
        loop {
            match result.recv_timeout(WORKING) {
                Ok(done) => return Ok(done),
                Err(RecvTimeoutError::Timeout) => replies.send(&self.progress()).context(GONE)?,
                Err(RecvTimeoutError::Disconnected) => bail!("the daemon is ending"),
            }
        }
    }

    /// The report that the daemon is at work, and how much is still to be written back.
    fn progress(&self) -> Reply {
        let status = self.cache.status();
        Reply::Progress {
            dirty_bytes: status.dirty_blocks * to_u64(BLOCK_BYTES),
            left_bytes: Some(status.blocks_to_write_back * to_u64(BLOCK_BYTES)),
        }
    }

    fn refuse_held(&self, force: bool, replies: &mut Replies) -> Result<()> {
        let users = self.users.clone();
        let ours = [std::process::id(), to_keeper::process()];
        self.aside(replies, move || users.refuse_held(&ours, force))?
    }

    /// Writes out the page cache of the device, as long as the client waits for it.
    fn write_out(&self, replies: &mut Replies) -> Result<()> {
        let Some(device) = self.users.device() else { return Ok(()) };
        let mut told = Instant::now();
        let written = apart::run(Task::WriteOut, device, || {
            if told.elapsed() < WORKING {
                return true;
            }
            told = Instant::now();
            replies.send(&self.progress()).is_ok()
        });
        written
            .context(GONE)?
            .with_context(|| format!("cannot write out {}; nothing was detached", device.display()))
    }

    /// Makes the daemon end. The shutdown then sends the reply.
    fn detach(&self, drain: bool, force: bool, replies: &mut Replies) -> Result<()> {
        self.refuse_held(force, replies)?;
        if drain && self.read_only {
            return Err(self.refusal());
        }
        if drain {
            // A drain includes data that is still in the page cache of the device.
            self.write_out(replies)?;
            self.drain(replies)?;
            self.refuse_held(force, replies)?;
        }
        self.end
            .send(End::Detach { force, replies: replies.clone() })
            .ok()
            .context("the daemon is ending")?;
        while !replies.has_ended() {
            std::thread::sleep(WORKING);
            // A client that is gone gets no reply.
            let _ = replies.send(&self.progress());
        }
        Ok(())
    }
}
