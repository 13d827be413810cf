//! Whoever has a volume served, as a front end sees them.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// A part of a loop device over FUSE. The volume outlives its server if another process holds a
/// descriptor of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The connection to the kernel.
    Fuse,
    /// The mount.
    Mount,
    /// The loop device. It is kept before it is configured.
    Loop,
}

/// Whoever has a volume served. A function that takes the reason of the device's end is one.
pub trait Owner: Send + Sync + 'static {
    /// Hears the path of the block device before it appears. If another program takes the device
    /// first, it hears of the next one.
    ///
    /// # Errors
    /// When the device must not appear.
    fn announce(&self, _device: &Path) -> io::Result<()> {
        Ok(())
    }

    /// Takes a descriptor that must outlive the server. The part is used only after that.
    ///
    /// # Errors
    /// When it cannot.
    fn keep(&self, _part: Part, _descriptor: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    /// The process that answers for a ublk device, if another one serves the device after this
    /// process has died.
    fn keeper(&self) -> Option<u32> {
        None
    }

    /// Hears that the device gets no more requests, and why.
    fn lost(&self, why: &str);
}

impl<F: Fn(&str) + Send + Sync + 'static> Owner for F {
    fn lost(&self, why: &str) {
        self(why);
    }
}
