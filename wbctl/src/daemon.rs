//! What an attached volume's daemon answers those who ask it over its socket.

use crate::apart::{self, Task};
use crate::attach::refuse_held;
use crate::config::Volume;
use crate::ending::End;
use crate::place::Name;
use crate::{notify, show};
use anyhow::{Context, Result, anyhow, bail};
use futures_util::future::{Aborted, abortable};
use libwb::cache::{Cache, TunableValue};
use libwb::control::{self, LiveStatus, Replies, Reply, Request, VolumeStatus};
use libwb::device::Device;
use libwb::format::{BLOCK_BYTES, to_u64};
use libwb::reactor::Handle;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// What systemd is told the volume is doing.
pub(crate) const SERVING: &str = "serving";
/// How often a drain reports progress.
const PROGRESS: Duration = Duration::from_millis(250);

/// What the control socket works on.
pub(crate) struct Daemon {
    pub(crate) name: Name,
    pub(crate) volume: Volume,
    pub(crate) cache: Cache,
    /// What the cache stands on: the cache device, and the backing device.
    pub(crate) devices: [Device; 2],
    pub(crate) device: PathBuf,
    pub(crate) sector_size: u32,
    pub(crate) runtime: Handle,
    pub(crate) read_only: bool,
    /// Held while tunables are changed, so that of two clients at a time neither undoes what the other sets.
    pub(crate) setting: Mutex<()>,
    pub(crate) end: Sender<End>,
}

impl Daemon {
    pub(crate) fn answer(&self, request: &Request, replies: &mut Replies) {
        let reply = match request {
            Request::Flush | Request::Drain | Request::Set { .. } | Request::Pause | Request::Resume
                if self.read_only =>
            {
                Err(self.refusal())
            }
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
            state: self.state(status.failure.is_some()).into(),
            device: Some(self.device.clone()),
            cache: self.volume.cache.clone(),
            backing: self.volume.backing.clone(),
            live: Some(LiveStatus::new(
                &status,
                self.sector_size,
                self.devices.each_ref().map(|device| device.pending()),
            )),
        }
    }

    fn state(&self, has_failed: bool) -> &'static str {
        match (has_failed, self.read_only) {
            (true, _) => show::FAILED,
            (false, true) => show::READ_ONLY,
            (false, false) => show::ATTACHED,
        }
    }

    fn refusal(&self) -> anyhow::Error {
        anyhow!(
            "'{0}' is attached read-only; detach it, and attach it without --read-only: wbctl detach {0}",
            self.name
        )
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
        tunables.check()?;
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
        let (work, stop) = abortable(work(self.cache.clone()));
        let ended = self.runtime.run_watched(work, PROGRESS, || {
            if let Some(replies) = progress.as_mut() {
                let dirty_bytes = self.bytes_to_write_back();
                // What it says of a client that has gone, the end of the work will tell.
                let _ = replies.send(&Reply::Progress { dirty_bytes }).inspect_err(|_| stop.abort());
            }
        });
        match ended {
            Some(Ok(result)) => Ok(result.map(|()| Reply::Done)?),
            Some(Err(Aborted)) => bail!("the client went away"),
            None => bail!("the daemon is ending"),
        }
    }

    /// Writes out what is in the page cache of the device, as long as the client waits for it.
    fn write_out(&self, replies: &mut Replies) -> Result<()> {
        let mut told = Instant::now();
        let written = apart::run(Task::WriteOut, &self.device, || {
            if told.elapsed() < PROGRESS {
                return true;
            }
            told = Instant::now();
            replies.send(&Reply::Progress { dirty_bytes: self.bytes_to_write_back() }).is_ok()
        });
        written
            .context("the client went away")?
            .with_context(|| format!("cannot write out {}; nothing was detached", self.device.display()))
    }

    fn bytes_to_write_back(&self) -> u64 {
        self.cache.status().blocks_to_write_back * to_u64(BLOCK_BYTES)
    }

    /// Makes the daemon end, which then replies itself.
    fn detach(&self, drain: bool, force: bool, replies: &mut Replies) -> Result<()> {
        refuse_held(&self.device, std::process::id(), force)?;
        if drain && self.read_only {
            return Err(self.refusal());
        }
        if drain {
            // What programs wrote through the page cache of the device is to be drained as well.
            self.write_out(replies)?;
            self.drain(replies)?;
            refuse_held(&self.device, std::process::id(), force)?;
        }
        self.end
            .send(End::Detach { force, replies: replies.try_clone()? })
            .ok()
            .context("the daemon is ending")
    }
}
