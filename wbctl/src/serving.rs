//! The front end of a volume: a ublk device where the kernel has that, else a loop device.

use crate::apart::Guard;
use crate::volume_paths::VolumeName;
use anyhow::Result;
use clap::ValueEnum;
use libwb::cache::Cache;
use libwb::reactor::Handle;
use libwb::serve::loopdev::{Connection, LoopDevice, Reserved};
use libwb::serve::ublk::{self, Removal, Requests, UblkDevice};
use libwb::serve::{Options, ReadOnly, ServeError, Volume};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the kernel may take to notice that a server is dead. Linux 6.6 looks every 5 seconds.
const TO_NOTICE: Duration = Duration::from_secs(10);
/// How long a device may take from its creation to its start.
const TO_START: Duration = Duration::from_secs(1);

/// How a volume becomes a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FrontEnd {
    /// ublk where it works, else loop
    #[default]
    Auto,
    /// A device of the kernel's ublk driver (Linux 6.5 and later): faster
    Ublk,
    /// A loop device over FUSE
    Loop,
}

/// The option `--serve`.
#[derive(clap::Args)]
pub(crate) struct ServeOption {
    /// How the volume becomes a block device: ublk is faster and needs Linux 6.5; loop is a loop
    /// device over FUSE; auto is ublk where it works, else loop. The default is auto, or what
    /// create recorded
    #[arg(long = "serve", value_name = "auto|ublk|loop", hide_possible_values = true)]
    pub(crate) front_end: Option<FrontEnd>,
}

/// A volume's block device.
pub(crate) enum Served {
    Ublk {
        device: UblkDevice,
        /// Removes what the device leaves behind if this process is killed.
        _guard: Option<Guard>,
    },
    Loop(LoopDevice),
}

/// What ends all requests to a block device, even if other devices hang.
pub(crate) enum CutOff {
    Ublk(Requests),
    Loop(Option<Arc<Connection>>),
}

impl CutOff {
    /// Makes all current and later requests fail.
    pub(crate) fn now(&self, device: &Path) {
        match self {
            CutOff::Ublk(requests) => requests.abort(),
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
    pub(crate) runtime: &'a Handle,
    pub(crate) options: Options,
    /// For the loop device.
    pub(crate) reserved: Reserved,
    /// Told why the device gets no more requests.
    pub(crate) lost: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Serving<'_> {
    /// Makes the block device.
    ///
    /// # Errors
    /// Names the step that failed.
    pub(crate) fn start(self, front_end: FrontEnd) -> Result<Served, ServeError> {
        if self.options.read_only {
            let volume = ReadOnly(self.cache.clone());
            self.serve(front_end, volume)
        } else {
            let volume = self.cache.clone();
            self.serve(front_end, volume)
        }
    }

    fn serve(self, front_end: FrontEnd, volume: impl Volume) -> Result<Served, ServeError> {
        match front_end {
            FrontEnd::Ublk => self.ublk(volume),
            FrontEnd::Loop => self.loop_device(volume),
            FrontEnd::Auto => match self.ublk(volume.clone()) {
                Ok(served) => Ok(served),
                Err(why) => {
                    tracing::info!(
                        "ublk does not work: {why}. Falling back to a loop device, which is slower"
                    );
                    self.loop_device(volume)
                }
            },
        }
    }

    fn ublk(&self, volume: impl Volume) -> Result<Served, ServeError> {
        let note = |device: &Path| self.name.note_device(device);
        let device = UblkDevice::attach(volume, self.runtime, self.options, note, self.lost())?;
        let guard = Guard::of(device.path()).inspect_err(|e| {
            tracing::warn!(
                "cannot start the process that removes {} if this daemon is killed: {e}. The next \
                 attach would remove it",
                device.path().display()
            );
        });
        Ok(Served::Ublk { device, _guard: guard.ok() })
    }

    fn loop_device(self, volume: impl Volume) -> Result<Served, ServeError> {
        let (file, ended) = (self.name.served_file(), self.lost());
        let note = |device: &Path| self.name.note_device(device);
        let (runtime, options) = (self.runtime, self.options);
        LoopDevice::attach(volume, runtime, &file, options, self.reserved, note, ended)
            .map(Served::Loop)
    }

    fn lost(&self) -> impl Fn(&str) + Send + Sync + 'static {
        let lost = self.lost.clone();
        move |why| lost(why)
    }
}

impl Served {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Served::Ublk { device, .. } => device.path(),
            Served::Loop(device) => device.path(),
        }
    }

    pub(crate) fn cut_off(&self) -> CutOff {
        match self {
            Served::Ublk { device, .. } => CutOff::Ublk(device.requests()),
            Served::Loop(device) => CutOff::Loop(device.connection()),
        }
    }

    /// Whether the kernel has looked for partitions already, and discards are bounded.
    pub(crate) fn is_complete(&self) -> bool {
        matches!(self, Served::Ublk { .. })
    }

    /// Takes the device down. Its page cache must have been written out before.
    pub(crate) fn detach(self) -> Result<(), ServeError> {
        match self {
            Served::Ublk { device, .. } => device.detach(),
            Served::Loop(device) => device.detach(),
        }
    }
}

/// Removes what earlier daemons' devices have left at the driver. Waits a moment for that of this
/// volume.
pub(crate) fn remove_dead(name: &VolumeName) {
    if let Some(own) = name.noted_device() {
        remove_if_dead(&own, TO_NOTICE);
    }
    let dead: Vec<PathBuf> =
        ublk::devices().into_iter().filter(|device| ublk::seems_dead(device)).collect();
    if !dead.is_empty() {
        // A daemon of another container may be about to start its device.
        std::thread::sleep(TO_START);
        dead.iter().for_each(|device| remove_if_dead(device, Duration::ZERO));
    }
}

fn remove_if_dead(device: &Path, patience: Duration) {
    let begun = Instant::now();
    loop {
        match ublk::remove_dead(device) {
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
