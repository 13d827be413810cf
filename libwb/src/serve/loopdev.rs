//! Serves a volume as a loop device: a private FUSE mount holds a file, and the loop device stands
//! on that file.
//!
//! The mount is attached to no folder, and the loop device is set to clear itself. So neither
//! outlives the daemon, however it ends. A mount namespace of the daemon's own would hide the mount
//! as well. But where mounts are not shared, as in containers, it would keep every mount that it
//! copied from the system in use.
//!
//! The daemon holds its own loop device open, and the last process to close a block device writes
//! out its page cache. A killed daemon would write to itself there, and wait forever. So the FUSE
//! connection must end first: then the requests fail. When a process ends, the kernel closes its
//! descriptors from the highest number to the lowest; so the loop device must have the lowest
//! ([`Reserved`]).

use super::fuse::{self, Connected};
use super::{Options, ServeError, Volume, failed};
use crate::reactor::Handle;
use crate::sys;
use nix::errno::Errno;
use rustix::io::{DupFlags, dup3};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use super::fuse::Connection;

/// Attempts to get a free loop device, because another program may be faster.
const ATTEMPTS: u32 = 16;

/// A descriptor reserved for the loop device. Its number is the lowest free one, and stays below
/// all that are opened later.
pub struct Reserved(OwnedFd);

impl Reserved {
    /// Reserves the number. Call it before anything else is opened that stays open.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn take() -> io::Result<Reserved> {
        Ok(Reserved(File::open("/dev/null")?.into()))
    }

    /// Makes the number refer to another file from now on.
    fn become_file(&mut self, file: &File) -> io::Result<()> {
        Ok(dup3(file, &mut self.0, DupFlags::CLOEXEC)?)
    }

    /// Fails if the kernel would close this descriptor before the other one.
    fn check_below(&self, connection: RawFd) -> io::Result<()> {
        match self.0.as_raw_fd() < connection {
            true => Ok(()),
            false => Err(io::Error::other("its descriptor is above that of the FUSE connection")),
        }
    }
}

/// A loop device that serves a volume.
pub struct LoopDevice {
    path: PathBuf,
    device: Reserved,
    connection: Option<Arc<Connection>>,
    /// Lives as long as the device.
    _mount: OwnedFd,
}

impl LoopDevice {
    /// Creates a FUSE file of that name, which shows as the loop device's backing file, and
    /// attaches a loop device to it. Before that, it passes the path to `announce`. If another
    /// program takes the device first, it announces the next one. Calls `ended` if the device
    /// gets no more requests. Once this has returned, another process should call
    /// [`complete_loop_device`](super::outside::complete_loop_device).
    ///
    /// # Errors
    /// Names the step that failed.
    pub fn attach<V: Volume>(
        volume: V,
        runtime: &Handle,
        name: &str,
        options: Options,
        reserved: Reserved,
        announce: impl FnMut(&Path) -> io::Result<()>,
        ended: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<LoopDevice, ServeError> {
        let Connected { mount, file, descriptor } =
            fuse::connect(volume, runtime, name, options, ended)?;
        let (path, device) = configure_loop_device(&file, options, reserved, announce)?;
        device
            .check_below(descriptor)
            .map_err(failed(format!("cannot serve {}", path.display())))?;
        // Without it, the device still ends, as long as nothing hangs.
        let connection =
            Connection::of(&mount).inspect_err(|e| tracing::warn!("no control of FUSE: {e}"));
        let connection = connection.ok().map(Arc::new);
        Ok(LoopDevice { path, device, connection, _mount: mount })
    }

    /// The loop device's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What ends the device even if its threads hang, where the system offers that.
    pub fn connection(&self) -> Option<Arc<Connection>> {
        self.connection.clone()
    }

    /// Takes the loop device down. Its page cache must have been written out before. If a program
    /// still holds the device, its I/O fails once the volume is closed.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn detach(self) -> Result<(), ServeError> {
        // The mount and its connection end with their last user, which may be later.
        sys::loop_clear(&self.device.0)
            .map_err(failed(format!("cannot clear {}", self.path.display())))
    }
}

fn configure_loop_device(
    file: &File,
    options: Options,
    mut reserved: Reserved,
    mut announce: impl FnMut(&Path) -> io::Result<()>,
) -> Result<(PathBuf, Reserved), ServeError> {
    let control =
        File::open("/dev/loop-control").map_err(failed("cannot open /dev/loop-control"))?;
    let mut last = Errno::EBUSY;
    for _ in 0..ATTEMPTS {
        let number = sys::loop_get_free(&control).map_err(failed("no loop device is free"))?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .and_then(|device| reserved.become_file(&device))
            .map_err(failed(format!("cannot open {}", path.display())))?;
        announce(&path).map_err(failed(format!("cannot announce {}", path.display())))?;
        match sys::loop_configure(&reserved.0, file, options.sector_size) {
            Ok(()) => {
                // A write protection outlives what a loop device was used for before.
                if !options.read_only {
                    let refused = failed(format!("cannot write to {}", path.display()));
                    sys::allow_writes(&reserved.0).map_err(refused)?;
                }
                return Ok((path, reserved));
            }
            // Another program took it first.
            Err(Errno::EBUSY) => {}
            Err(cause) => return Err(failed(format!("cannot set up {}", path.display()))(cause)),
        }
        last = Errno::EBUSY;
    }
    Err(failed("cannot get a loop device")(last))
}
