//! A served block device from outside: who uses it, and what a process other than its server does
//! with it.

use crate::sys;
use std::fs::{DirEntry, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Makes a loop device show its partitions, until it is taken down. Reads from it, and so must not
/// be done by its server.
///
/// # Errors
/// When it is none, or cannot be opened.
pub fn show_partitions(device: &Path) -> io::Result<()> {
    Ok(sys::loop_show_partitions(&File::open(device)?)?)
}

/// Waits until all is durable that was written to a block device and its partitions through their
/// page caches. Must not be done by its server.
///
/// # Errors
/// When the device fails.
pub fn write_out(device: &Path) -> io::Result<()> {
    // The device last: its flush covers what was written to it for the others.
    with_partitions(device).iter().rev().try_for_each(|path| match File::open(path) {
        // A partition need not have a name in /dev, and then nobody has written to it by that.
        Err(e) if e.kind() == io::ErrorKind::NotFound && path != device => Ok(()),
        file => file?.sync_all(),
    })
}

/// Takes a block device for a moment as a filesystem does. May wait for the device, and so must not
/// be done by its server.
///
/// # Errors
/// Among others, when somebody holds it, or a partition of it.
pub fn claim(device: &Path) -> io::Result<()> {
    OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(device).map(drop)
}

/// A block device, and its partitions.
fn with_partitions(device: &Path) -> Vec<PathBuf> {
    let mut found = vec![device.to_path_buf()];
    for entry in std::fs::read_dir(in_sysfs(device)).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            found.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    found
}

fn in_sysfs(device: &Path) -> PathBuf {
    Path::new("/sys/class/block").join(device.file_name().unwrap_or_default())
}

/// Who holds a block device that cannot be claimed, or a partition of it: where it is mounted, and
/// which devices stand on it.
pub fn holders(device: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    for path in with_partitions(device) {
        let of = if path == device {
            String::new()
        } else {
            format!(" (its partition {})", path.display())
        };
        for line in mounts.lines() {
            let mut fields = line.split(' ');
            if fields.next() == Some(&path.to_string_lossy()) {
                found.extend(fields.next().map(|place| format!("mounted on {place}{of}")));
            }
        }
        for holder in
            std::fs::read_dir(in_sysfs(&path).join("holders")).into_iter().flatten().flatten()
        {
            found.push(format!("held by {}{of}", holder.file_name().to_string_lossy()));
        }
    }
    if found.is_empty() {
        found.push("held by another program".into());
    }
    found
}

/// Which programs have a block device open, or a partition of it, without holding it, such as a
/// virtual machine, or a target that exports it; but not its own `server`. To see those of others
/// takes root.
pub fn users(device: &Path, server: u32) -> Vec<String> {
    let number = |path: &PathBuf| std::fs::metadata(path).map(|found| found.rdev()).ok();
    let numbers: Vec<u64> = with_partitions(device).iter().filter_map(number).collect();
    let is_device = |open: &DirEntry| {
        // A file elsewhere may be on a filesystem that does not answer.
        std::fs::read_link(open.path()).is_ok_and(|path| path.starts_with("/dev/"))
            && std::fs::metadata(open.path()).is_ok_and(|found| {
                found.file_type().is_block_device() && numbers.contains(&found.rdev())
            })
    };
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let files = std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        if pid != server && files.into_iter().any(|open| is_device(&open)) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("open in {} (process {pid})", name.trim_end()));
        }
    }
    found
}
