//! Who holds a served block device, and whether it may be taken away from them.

use crate::apart::{self, Task};
use anyhow::{Result, anyhow};
use libwb::serve::outside;
use nix::errno::Errno;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a device may take to be opened. A device that hangs may take forever.
const TO_OPEN: Duration = Duration::from_secs(5);
/// How long a device may stay open before that counts as use.
const BRIEFLY_OPEN: Duration = Duration::from_secs(1);

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
pub(crate) fn refuse_held(device: &Path, daemon: &[u32], force: bool) -> Result<()> {
    if force {
        return Ok(());
    }
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
