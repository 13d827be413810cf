//! Who uses a served volume, and whether it may be taken away from them.

use crate::apart::{self, Task};
use anyhow::{Result, anyhow, bail};
use libwb::serve::nbd::Clients;
use libwb::serve::outside;
use nix::errno::Errno;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a device may take to be opened. A device that hangs may take forever.
const TO_OPEN: Duration = Duration::from_secs(5);
/// How long a device may stay open before that counts as use.
const BRIEFLY_OPEN: Duration = Duration::from_secs(1);

/// Who uses a volume.
#[derive(Clone)]
pub(crate) enum Users {
    /// Who uses this block device.
    OfDevice(PathBuf),
    /// NBD clients.
    OverNbd(Clients),
}

impl Users {
    /// Who holds the volume. Empty when it is free.
    pub(crate) fn holders(&self) -> Vec<String> {
        match self {
            Users::OfDevice(device) => holders(device),
            Users::OverNbd(clients) => match clients.number() {
                0 => Vec::new(),
                number => vec![format!("in use by {}", counted(number))],
            },
        }
    }

    /// Refuses to take the volume away from its users. Those of its `daemon` do not count.
    pub(crate) fn refuse_held(&self, daemon: &[u32], force: bool) -> Result<()> {
        match self {
            _ if force => Ok(()),
            Users::OfDevice(device) => refuse_held(device, daemon),
            Users::OverNbd(clients) => refuse_connected(clients),
        }
    }

    /// The block device, if there is one. It has a page cache.
    pub(crate) fn device(&self) -> Option<&Path> {
        match self {
            Users::OfDevice(device) => Some(device),
            Users::OverNbd(_) => None,
        }
    }

    /// The number of NBD clients.
    pub(crate) fn clients(&self) -> Option<usize> {
        match self {
            Users::OfDevice(_) => None,
            Users::OverNbd(clients) => Some(clients.number()),
        }
    }
}

fn counted(clients: usize) -> String {
    if clients == 1 { "1 NBD client".into() } else { format!("{clients} NBD clients") }
}

/// Refuses to take a volume away from NBD clients. One that has just ended counts for a moment.
fn refuse_connected(clients: &Clients) -> Result<()> {
    let started = Instant::now();
    while clients.number() > 0 && started.elapsed() < BRIEFLY_OPEN {
        std::thread::sleep(Duration::from_millis(20));
    }
    match clients.number() {
        0 => Ok(()),
        1 => {
            bail!("1 NBD client is connected; disconnect it first, or use --force and let it fail")
        }
        many => bail!(
            "{many} NBD clients are connected; disconnect them first, or use --force and let them \
             fail"
        ),
    }
}

/// Who holds a block device. Empty when the device is free.
pub(crate) fn holders(device: &Path) -> Vec<String> {
    let started = Instant::now();
    match apart::run(Task::Claim, device, || started.elapsed() < TO_OPEN) {
        Some(Ok(())) => Vec::new(),
        Some(Err(e)) => match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EBUSY) => outside::holders(device),
            // The device is gone, or no program can use it any more.
            Some(Errno::ENXIO | Errno::ENODEV | Errno::ENOENT | Errno::EIO) => Vec::new(),
            _ => vec![format!("perhaps in use (that cannot be told: {e})")],
        },
        None => vec!["not answering".into()],
    }
}

/// Refuses to take a device away while a process other than those of its daemon holds it or has it
/// open.
fn refuse_held(device: &Path, daemon: &[u32]) -> Result<()> {
    let mut held = holders(device);
    // udev opens a device for a moment whenever a program has closed it.
    let started = Instant::now();
    while held.is_empty() {
        held = outside::users(device, daemon);
        if held.is_empty() {
            return Ok(());
        }
        if started.elapsed() < BRIEFLY_OPEN {
            held.clear();
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Err(still_held(device, &held))
}

/// The error that names who still holds a device.
pub(crate) fn still_held(device: &Path, held: &[String]) -> anyhow::Error {
    let (device, held) = (device.display(), held.join(", "));
    anyhow!("{device} is {held}; release it first, or use --force and let its users fail")
}
