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
//! ([`Reserved`]), in each process that holds both.
//!
//! If another process holds the parts, the device outlives its server: who uses it waits until the
//! next server takes over ([`LoopDevice::resume`]).

use super::fuse::{self, Connected, Hold};
use super::{Options, Owner, Part, ServeError, Volume, failed};
use crate::reactor::Handle;
use crate::sys;
use nix::errno::Errno;
use rustix::io::{DupFlags, dup3};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
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

    /// Makes the number refer to the loop device from now on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn hold(&mut self, device: impl AsFd) -> io::Result<()> {
        Ok(dup3(device, &mut self.0, DupFlags::CLOEXEC)?)
    }

    /// Fails if the kernel would close this descriptor before the other one.
    fn check_below(&self, connection: RawFd) -> io::Result<()> {
        match self.0.as_raw_fd() < connection {
            true => Ok(()),
            false => Err(io::Error::other("its descriptor is above that of the FUSE connection")),
        }
    }
}

impl AsFd for Reserved {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What an earlier server has left of a loop device. The loop device itself is in [`Reserved`].
pub struct Left {
    /// Its path.
    pub path: PathBuf,
    /// The connection to the kernel.
    pub fuse: OwnedFd,
    /// The mount.
    pub mount: OwnedFd,
}

/// A loop device that serves a volume.
pub struct LoopDevice {
    path: PathBuf,
    device: Reserved,
    connection: Option<Arc<Connection>>,
    requests: Arc<dyn Hold>,
    can_resume: bool,
    /// Lives as long as the device.
    _mount: OwnedFd,
}

impl LoopDevice {
    /// Creates a FUSE file of that name, which shows as the loop device's backing file, and
    /// attaches a loop device to it. Once this has returned, another process should call
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
        owner: impl Owner,
    ) -> Result<LoopDevice, ServeError> {
        let owner = Arc::new(owner);
        let (connected, file) = fuse::connect(volume, runtime, name, options, owner.clone())?;
        let (path, device) = configure_loop_device(&file, options, reserved, &*owner)?;
        LoopDevice::of(connected, path, device)
    }

    /// Serves a device whose earlier server has ended. What that one had not answered comes again,
    /// if [`LoopDevice::can_resume`] was true there. Name and options must be as they were.
    ///
    /// # Errors
    /// Names the step that failed.
    pub fn resume<V: Volume>(
        volume: V,
        runtime: &Handle,
        name: &str,
        options: Options,
        device: Reserved,
        left: Left,
        owner: impl Owner,
    ) -> Result<LoopDevice, ServeError> {
        let (fuse, owner) = (left.fuse.into(), Arc::new(owner));
        let connected = fuse::resume(volume, runtime, name, options, fuse, left.mount, owner)?;
        LoopDevice::of(connected, left.path, device)
    }

    fn of(connected: Connected, path: PathBuf, device: Reserved) -> Result<LoopDevice, ServeError> {
        let Connected { mount, requests, can_resume, descriptor } = connected;
        device
            .check_below(descriptor)
            .map_err(failed(format!("cannot serve {}", path.display())))?;
        // Without it, the device still ends, as long as nothing hangs.
        let connection =
            Connection::of(&mount).inspect_err(|e| tracing::warn!("no control of FUSE: {e}"));
        let connection = connection.ok().map(Arc::new);
        Ok(LoopDevice { path, device, connection, requests, can_resume, _mount: mount })
    }

    /// Whether the kernel hands requests that were not answered to the next server (Linux 6.9).
    pub fn can_resume(&self) -> bool {
        self.can_resume
    }

    /// Takes and answers no more requests, as if the process had died: the next server gets them.
    pub fn hold(&self) {
        self.requests.hold();
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
    owner: &impl Owner,
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
            .and_then(|device| reserved.hold(&device))
            .map_err(failed(format!("cannot open {}", path.display())))?;
        owner.announce(&path).map_err(failed(format!("cannot announce {}", path.display())))?;
        // Before it has a page cache, which its last holder would write out.
        owner
            .keep(Part::Loop, reserved.as_fd())
            .map_err(failed(format!("cannot hand over {}", path.display())))?;
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
