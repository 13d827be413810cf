//! How a daemon ends: in order if possible, and within seconds if required, even if a device hangs.
//!
//! A thread of its own, or another process, performs every step that may wait for a device. After a
//! second request to end, or a forced one, each step may take at most [`URGENT`]. After a third,
//! the daemon waits for none. Flushed data is in the log in any case.

use crate::apart::{self, Task};
use crate::holders::Users;
use crate::logging;
use crate::notify::{self, Busy};
use crate::restart;
use crate::serving::{CutOff, Served};
use crate::to_keeper;
use crate::volume_paths::VolumeName;
use anyhow::{Result, anyhow};
use libwb::cache::{Cache, CacheError};
use libwb::cli::{Exit, human_size};
use libwb::control::{Replies, Reply};
use libwb::device::Device;
use libwb::format::{BLOCK_BYTES, to_u64};
use libwb::reactor::Handle;
use nix::sys::signal::Signal;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// After a signal, how long the daemon waits until the device is released.
const RELEASE: Duration = Duration::from_secs(60);
/// How long a step may take when the end is urgent.
const URGENT: Duration = Duration::from_secs(3);
/// How long requests wait for the link to a backing device on a server while the volume ends.
const LINK: Duration = Duration::from_secs(10);
/// How often the daemon checks for further requests to end.
const TICK: Duration = Duration::from_millis(100);
/// How long an immediate end waits for its last replies to clients.
const TO_TELL: Duration = Duration::from_secs(1);

/// Why the daemon ends.
pub(crate) enum End {
    Signal(Signal),
    /// A client asked for it, and gets a reply when all is done.
    Detach {
        force: bool,
        replies: Replies,
    },
    /// A client asked for the installed program; the next server sends the reply.
    Restart {
        replies: Replies,
    },
    /// The block device gets no more requests; this says why.
    Lost(String),
}

/// A volume that is being served.
pub(crate) struct LiveVolume {
    name: VolumeName,
    cache: Cache,
    devices: [Device; 2],
    runtime: Handle,
    read_only: bool,
    cut_off: CutOff,
    users: Users,
    /// The block device, or the address of the NBD server.
    path: PathBuf,
}

/// The requests to end, so far.
struct Callers<'a> {
    ended: &'a Receiver<End>,
    /// How many requests were repeated or forced, and when the last one came.
    urged: u32,
    since: Instant,
    clients: Vec<Replies>,
}

impl Callers<'_> {
    fn hear(&mut self, end: End) {
        let urges = match end {
            End::Signal(_) => true,
            // The daemon ends already, which ends the device.
            End::Lost(_) => false,
            End::Restart { mut replies } => {
                let message = "the daemon is ending".into();
                let _ = replies.send(&Reply::Error { message });
                false
            }
            End::Detach { force, replies } => {
                self.clients.push(replies);
                force
            }
        };
        if urges {
            self.urged += 1;
            self.since = Instant::now();
        }
    }

    /// Takes in all pending requests.
    fn hear_all(&mut self) {
        while let Ok(end) = self.ended.try_recv() {
            self.hear(end);
        }
    }

    /// Whether to stop waiting for a step that began at `begun`.
    fn had_enough(&mut self, begun: Instant) -> bool {
        self.hear_all();
        match self.urged {
            0 => false,
            1 => begun.max(self.since).elapsed() > URGENT,
            _ => true,
        }
    }

    /// Runs work in a thread. Returns `None` if it stopped waiting for it.
    fn within<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (done, result) = channel();
        let begun = Instant::now();
        std::thread::spawn(move || done.send(work()));
        loop {
            if let Ok(output) = result.recv_timeout(TICK) {
                return Some(output);
            }
            if self.had_enough(begun) {
                return None;
            }
        }
    }

    /// Keeps serving while the device is held, up to a limit or a second signal. At a system
    /// shutdown, filesystems on the device may be unmounted only after the daemon was told to end.
    fn wait_until_released(&mut self, served: &LiveVolume) {
        let begun = Instant::now();
        let mut told = false;
        while begun.elapsed() < RELEASE && self.urged == 0 {
            let held = served.users.holders();
            if held.is_empty() {
                return;
            }
            if !told {
                tracing::warn!("waiting: {} is still {}", served.path.display(), held.join(", "));
                told = true;
            }
            if let Ok(end) = self.ended.recv_timeout(TICK) {
                self.hear(end);
            }
        }
    }

    /// Writes out the page cache of the device. If the log is full and the backing device fails,
    /// this blocks forever.
    fn write_out(&mut self, served: &LiveVolume) -> Result<()> {
        let Some(device) = served.users.device() else { return Ok(()) };
        let begun = Instant::now();
        match apart::run(Task::WriteOut, device, || !self.had_enough(begun)) {
            Some(Ok(())) => Ok(()),
            Some(Err(e)) => Err(anyhow!("cannot write out {}: {e}", device.display())),
            None => Err(anyhow!(
                "{}: there was no time to write out data that programs had not flushed",
                device.display()
            )),
        }
    }
}

impl Callers<'_> {
    /// Waits for the users of the device if the end allows that, and writes out its page cache.
    fn release(&mut self, served: &LiveVolume, end: Option<End>) -> Result<()> {
        match end {
            Some(End::Lost(why)) => {
                served.lose_patience();
                let lost = anyhow!(
                    "the kernel has ended {}: {why}. Unmount what is on it, then attach the volume \
                     again",
                    served.path.display()
                );
                tracing::error!("{lost}; closing the log");
                return Err(lost);
            }
            Some(End::Signal(signal)) => {
                tracing::info!("{signal}: closing the log");
                self.wait_until_released(served);
            }
            Some(detach) => {
                tracing::info!("detaching");
                self.hear(detach);
            }
            None => {}
        }
        let held = served.users.holders();
        if !held.is_empty() {
            tracing::warn!(
                "{} is still {}: it fails from now on",
                served.path.display(),
                held.join(", ")
            );
        }
        served.lose_patience();
        self.write_out(served)
    }
}

/// Serves until a signal or a client ends it, then shuts down. `close` closes the log.
pub(crate) fn serve_until_ended(
    served: &LiveVolume,
    device: Served,
    ended: &Receiver<End>,
    close: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<()> {
    let mut callers = Callers { ended, urged: 0, since: Instant::now(), clients: Vec::new() };
    let end = served.until_told(&device, ended);
    notify::stopping();
    let closing = Busy::with("closing", served.writing());
    let written_out = callers.release(served, end);
    // Up to here, another server could go on if this one died.
    to_keeper::ending();
    if written_out.is_err() {
        // Programs that wait for the device get an error, and nothing may arrive late.
        served.cut_off();
    }
    let Some(detached) = callers.within(move || device.detach()) else {
        served.end_now(callers, "the block device could be taken down", written_out.is_ok())
    };
    if let Err(e) = detached {
        tracing::warn!("{e}");
    }
    drop(closing);
    let _closing = Busy::while_devices_work("closing", &served.devices);
    let Some(closed) = callers.within(close) else {
        served.end_now(callers, "the log was closed", written_out.is_ok())
    };
    served.name.withdraw();
    let outcome = match (written_out, closed) {
        (Err(one), Err(other)) => Err(anyhow!("{one:#}; {other:#}")),
        (written_out, closed) => written_out.and(closed),
    };
    callers.hear_all();
    served.tell(callers.clients, outcome.as_ref().map_err(describe));
    outcome
}

/// The message to clients about an end that went wrong.
fn describe(error: &anyhow::Error) -> String {
    match error.downcast_ref() {
        Some(CacheError::NotHandedOver(_)) => format!("detached; {error:#}"),
        _ => format!("detached, but not all data could be kept: {error:#}"),
    }
}

impl LiveVolume {
    /// Serves until the volume is to end; `None` if nothing can end it any more. Does not return if
    /// another program is to go on.
    fn until_told(&self, device: &Served, ended: &Receiver<End>) -> Option<End> {
        loop {
            match ended.recv().ok()? {
                End::Restart { mut replies } => {
                    let (runtime, read_only) = (&self.runtime, self.read_only);
                    let made =
                        restart::make_room(device, &self.cache, runtime, read_only, &replies);
                    if let Err(e) = made {
                        let _ = replies.send(&Reply::Error { message: format!("{e:#}") });
                    }
                }
                end => return Some(end),
            }
        }
    }

    pub(crate) fn of(
        name: &VolumeName,
        cache: &Cache,
        devices: &[Device; 2],
        device: &Served,
        (runtime, read_only): (&Handle, bool),
    ) -> LiveVolume {
        LiveVolume {
            name: name.clone(),
            cache: cache.clone(),
            devices: devices.clone(),
            runtime: runtime.clone(),
            read_only,
            cut_off: device.cut_off(),
            users: device.users(),
            path: device.path().into(),
        }
    }

    /// A number that changes as long as the volume takes writes, or makes room for them.
    fn writing(&self) -> impl FnMut() -> u64 + Send + 'static {
        let cache = self.cache.clone();
        // A batch that fails and restarts makes no room, so only the lowest number counts.
        let mut lowest = u64::MAX;
        move || {
            let status = cache.status();
            lowest = lowest.min(status.blocks_to_write_back);
            let written = status.statistics.counters.write_bytes;
            written
                .wrapping_add(status.durable.0)
                .wrapping_add(status.written_back.0)
                .wrapping_sub(lowest)
        }
    }

    /// From now on, nothing waits long for a server that is away: the log can be closed without it.
    fn lose_patience(&self) {
        let [_, backing] = &self.devices;
        if backing.link().is_some() {
            backing.set_timeout(Some(LINK));
        }
    }

    fn dirty_bytes(&self) -> u64 {
        self.cache.status().dirty_blocks * to_u64(BLOCK_BYTES)
    }

    /// Aborts all requests to the device: programs that wait for it get an error.
    fn cut_off(&self) {
        self.cut_off.now(&self.path);
    }

    /// Tells clients how the shutdown ended, and how much data is only in the cache. Ignores
    /// clients that went away.
    fn tell(&self, clients: Vec<Replies>, outcome: Result<&(), String>) {
        let dirty_bytes = self.dirty_bytes();
        for mut client in clients {
            let last = match &outcome {
                Ok(()) => Reply::Done,
                Err(message) => Reply::Error { message: message.clone() },
            };
            let left = Reply::Progress { dirty_bytes, left_bytes: None };
            // Data in an earlier report may have been written back since.
            let told =
                if dirty_bytes > 0 || client.has_begun() { client.send(&left) } else { Ok(()) };
            let _ = told.and_then(|()| client.send(&last));
        }
    }

    /// Exits the process before the step `before` was done. The kernel takes down the rest.
    /// `written_out` tells whether the page cache was written out.
    fn end_now(&self, mut callers: Callers<'_>, before: &str, written_out: bool) -> ! {
        self.cut_off();
        let status = self.cache.status();
        let left = human_size(self.dirty_bytes());
        // No program writes any more: the acknowledged data is kept if the newest segment is
        // durable.
        let is_kept = written_out && status.durable == status.newest && status.failure.is_none();
        let lost = if is_kept { "nothing is lost" } else { "unflushed data may be lost" };
        let why = if callers.urged > 1 {
            "because it was told to end at once"
        } else {
            "because a device does not answer"
        };
        let message = format!(
            "ended before {before}, {why}: {left} stay only in the cache, and {lost}; the next \
             attach recovers the log"
        );
        tracing::error!("{message}");
        self.name.withdraw();
        callers.hear_all();
        let outcome = if is_kept { Ok(&()) } else { Err(message) };
        std::thread::scope(|scope| {
            let telling = scope.spawn(|| self.tell(callers.clients, outcome));
            let begun = Instant::now();
            while !telling.is_finished() && begun.elapsed() < TO_TELL {
                std::thread::sleep(TICK / 10);
            }
            logging::finish();
            std::process::exit(Exit::Failed as i32)
        })
    }
}
