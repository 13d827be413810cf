//! The front end of a volume: a ublk device where the kernel has that, else a loop device; or an
//! NBD server.

use crate::apart;
use crate::front_end::FrontEnd;
use crate::holders::Users;
use crate::keeping::{FUSE, GUARD, Kept, LOOP, MOUNT, NBD};
use crate::over_nbd::{self, OverNbd};
use crate::standing::Standing;
use crate::to_keeper;
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result};
use libwb::cache::Cache;
use libwb::nbd::Uri;
use libwb::reactor::Handle;
use libwb::serve::loopdev::{Connection, Left, LoopDevice, Reserved};
use libwb::serve::nbd::Clients;
use libwb::serve::ublk::{self, Removal, Requests, UblkDevice};
use libwb::serve::{Options, Owner, Part, ReadOnly, ServeError, Volume};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the kernel may take to notice that a server is dead. Linux 6.6 looks every 5 seconds.
const TO_NOTICE: Duration = Duration::from_secs(10);
/// How long a device may take from its creation to its start.
const TO_START: Duration = Duration::from_secs(1);

/// A volume's block device, or what else serves it.
pub(crate) enum Served {
    Ublk(UblkDevice),
    Loop(LoopDevice),
    Nbd(OverNbd),
}

/// What ends all requests to a volume, even if its devices hang.
pub(crate) enum CutOff {
    Ublk(Requests),
    Loop(Option<Arc<Connection>>),
    Nbd(Clients),
}

impl CutOff {
    /// Makes all current and later requests fail.
    pub(crate) fn now(&self, device: &Path) {
        match self {
            CutOff::Ublk(requests) => requests.abort(),
            CutOff::Nbd(clients) => clients.cut_off(),
            CutOff::Loop(connection) => {
                if let Some(Err(e)) = connection.as_ref().map(|connection| connection.abort()) {
                    tracing::warn!("cannot abort the requests to {}: {e}", device.display());
                }
            }
        }
    }
}

/// What a front end needs to serve a volume.
pub(crate) struct Serving<'a> {
    pub(crate) name: &'a VolumeName,
    pub(crate) cache: &'a Cache,
    pub(crate) runtime: Arc<Handle>,
    pub(crate) options: Options,
    /// Whether other hosts may be served without TLS.
    pub(crate) insecure: bool,
    /// Told why the device gets no more requests.
    pub(crate) lost: Arc<dyn Fn(&str) + Send + Sync>,
}

/// This process and its keeper, as a front end sees them.
struct Ours {
    name: VolumeName,
    lost: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Owner for Ours {
    fn announce(&self, device: &Path) -> io::Result<()> {
        self.name.note_device(device)
    }

    fn keep(&self, part: Part, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let name = match part {
            Part::Fuse => FUSE,
            Part::Mount => MOUNT,
            Part::Loop => LOOP,
        };
        to_keeper::keep(name, descriptor)
    }

    fn keeper(&self) -> Option<u32> {
        Some(to_keeper::process())
    }

    fn lost(&self, why: &str) {
        (self.lost)(why);
    }
}

impl Serving<'_> {
    /// Makes the block device, or what else serves the volume.
    ///
    /// # Errors
    /// Names the step that failed.
    pub(crate) fn start(self, front_end: &FrontEnd, reserved: Reserved) -> Result<Served> {
        if self.options.read_only {
            let volume = ReadOnly(self.cache.clone());
            self.make(front_end, volume, reserved)
        } else {
            let volume = self.cache.clone();
            self.make(front_end, volume, reserved)
        }
    }

    /// Takes over what another server has made.
    ///
    /// # Errors
    /// Names the step that failed.
    pub(crate) fn resume(self, standing: &Standing, kept: Kept) -> Result<Served> {
        if self.options.read_only {
            let volume = ReadOnly(self.cache.clone());
            self.take_over(standing, volume, kept)
        } else {
            let volume = self.cache.clone();
            self.take_over(standing, volume, kept)
        }
    }

    fn make(self, front_end: &FrontEnd, volume: impl Volume, reserved: Reserved) -> Result<Served> {
        match front_end {
            FrontEnd::Nbd(uri) => {
                let listening = over_nbd::open(self.name, uri, self.insecure)?;
                self.nbd(uri, listening, volume)
            }
            FrontEnd::Ublk => Ok(self.ublk(volume)?),
            FrontEnd::Loop => Ok(self.loop_device(volume, reserved)?),
            FrontEnd::Auto => match self.ublk(volume.clone()) {
                Ok(served) => Ok(served),
                Err(why) => {
                    tracing::info!(
                        "ublk does not work: {why}. Falling back to a loop device, which is slower"
                    );
                    Ok(self.loop_device(volume, reserved)?)
                }
            },
        }
    }

    fn take_over(self, standing: &Standing, volume: impl Volume, mut kept: Kept) -> Result<Served> {
        let path = standing.device.clone();
        let mut take = |what| kept.take(what).with_context(|| format!("the keeper has no {what}"));
        if let FrontEnd::Nbd(uri) = &standing.front_end {
            return self.nbd(uri, take(NBD)?, volume);
        }
        if standing.front_end != FrontEnd::Loop {
            let device = UblkDevice::resume(volume, &self.runtime, &path, self.owner())?;
            return Ok(Served::Ublk(device));
        }
        let left = Left { path, fuse: take(FUSE)?, mount: take(MOUNT)? };
        let (file, options) = (self.name.served_file(), self.options);
        let (reserved, owner) = (kept.into_reserved(), self.owner());
        let device =
            LoopDevice::resume(volume, &self.runtime, &file, options, reserved, left, owner)?;
        Ok(Served::Loop(device))
    }

    fn ublk(&self, volume: impl Volume) -> Result<Served, ServeError> {
        let device = UblkDevice::attach(volume, &self.runtime, self.options, self.owner())?;
        let guard = apart::guard_of(device.path());
        let kept = guard.and_then(|guard| to_keeper::keep(GUARD, guard.as_fd()));
        let _ = kept.inspect_err(|e| {
            tracing::warn!(
                "cannot start the process that removes {} if this daemon is killed: {e}. The next \
                 attach would remove it",
                device.path().display()
            );
        });
        Ok(Served::Ublk(device))
    }

    fn loop_device(self, volume: impl Volume, reserved: Reserved) -> Result<Served, ServeError> {
        let (file, options, owner) = (self.name.served_file(), self.options, self.owner());
        LoopDevice::attach(volume, &self.runtime, &file, options, reserved, owner).map(Served::Loop)
    }

    fn nbd(&self, uri: &Uri, listening: OwnedFd, volume: impl Volume) -> Result<Served> {
        OverNbd::serve(uri, listening, volume, self.options, self.runtime.clone()).map(Served::Nbd)
    }

    fn owner(&self) -> Ours {
        Ours { name: self.name.clone(), lost: self.lost.clone() }
    }
}

impl Served {
    /// The path of the block device, or the address of the NBD server.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Served::Ublk(device) => device.path(),
            Served::Loop(device) => device.path(),
            Served::Nbd(nbd) => nbd.shown(),
        }
    }

    pub(crate) fn users(&self) -> Users {
        match self {
            Served::Nbd(nbd) => Users::OverNbd(nbd.clients().clone()),
            device => Users::OfDevice(device.path().into()),
        }
    }

    pub(crate) fn cut_off(&self) -> CutOff {
        match self {
            Served::Ublk(device) => CutOff::Ublk(device.requests()),
            Served::Loop(device) => CutOff::Loop(device.connection()),
            Served::Nbd(nbd) => CutOff::Nbd(nbd.clients().clone()),
        }
    }

    pub(crate) fn front_end(&self) -> FrontEnd {
        match self {
            Served::Ublk(_) => FrontEnd::Ublk,
            Served::Loop(_) => FrontEnd::Loop,
            Served::Nbd(nbd) => FrontEnd::Nbd(nbd.uri().clone()),
        }
    }

    /// Whether another server can go on when this one dies.
    pub(crate) fn can_resume(&self) -> bool {
        match self {
            Served::Ublk(device) => device.can_resume(),
            Served::Loop(device) => device.can_resume(),
            // Clients connect again.
            Served::Nbd(_) => true,
        }
    }

    /// Takes and answers no more requests. The next server gets them.
    pub(crate) fn hold(&self) {
        match self {
            Served::Ublk(device) => device.requests().hold(),
            Served::Loop(device) => device.hold(),
            Served::Nbd(nbd) => nbd.clients().hold(),
        }
    }

    /// Whether the kernel has looked for partitions already, and discards are bounded.
    pub(crate) fn is_complete(&self) -> bool {
        !matches!(self, Served::Loop(_))
    }

    /// Takes the device down. Its page cache must have been written out before.
    pub(crate) fn detach(self) -> Result<(), ServeError> {
        match self {
            Served::Ublk(device) => device.detach(),
            Served::Loop(device) => device.detach(),
            Served::Nbd(nbd) => {
                nbd.stop();
                Ok(())
            }
        }
    }
}

/// Removes what earlier daemons' devices have left at the driver. Waits a moment for that of this
/// volume.
pub(crate) fn remove_dead(name: &VolumeName) {
    let own = to_keeper::process();
    if let Some(device) = name.noted_device() {
        remove_if_dead(&device, TO_NOTICE);
    }
    let dead: Vec<PathBuf> =
        ublk::devices().into_iter().filter(|device| ublk::seems_dead(device, own)).collect();
    if !dead.is_empty() {
        // A daemon of another container may be about to start its device.
        std::thread::sleep(TO_START);
        dead.iter().for_each(|device| remove_if_dead(device, Duration::ZERO));
    }
}

fn remove_if_dead(device: &Path, patience: Duration) {
    let begun = Instant::now();
    loop {
        match ublk::remove_dead(device, to_keeper::process()) {
            Ok(Removal::Done | Removal::Alive) => return,
            Ok(Removal::NotYet) if begun.elapsed() < patience => {
                std::thread::sleep(patience / 100);
            }
            // It is another volume's, and perhaps being removed.
            Ok(Removal::NotYet) if patience.is_zero() => return,
            Ok(Removal::NotYet) => {
                return tracing::warn!(
                    "cannot remove {}, the device of an earlier daemon: the kernel still counts it \
                     as served after {} s. A later attach will try again",
                    device.display(),
                    patience.as_secs()
                );
            }
            Err(e) => return tracing::warn!("{e}"),
        }
    }
}
