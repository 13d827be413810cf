//! A served block device, seen from outside: who uses it, and what processes other than its server
//! do with it.

use super::MAX_DISCARD;
use crate::sys;
use nix::sys::stat::{major, minor};
use std::fs::{DirEntry, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bounds the discards of a loop device, and makes it show its partitions until it is taken down.
/// The kernel waits for requests under way, and reads from the device. So its server must not do
/// this.
///
/// # Errors
/// When it is not a loop device, or cannot be opened.
pub fn complete_loop_device(device: &Path) -> io::Result<()> {
    let shown = File::open(device).and_then(|device| Ok(sys::loop_show_partitions(&device)?));
    // Comes second: before Linux 6.9, the other resets the limit.
    limit_discards(device)?;
    shown
}

/// The kernel carries out discards of a loop device one after the other, and other requests wait
/// for each. So they must be short.
fn limit_discards(device: &Path) -> io::Result<()> {
    let name = device.file_name().unwrap_or_default();
    let limit = Path::new("/sys/class/block").join(name).join("queue/discard_max_bytes");
    std::fs::write(limit, MAX_DISCARD.to_string())
}

/// Waits until everything written to a block device and its partitions through their page caches is
/// durable. Its server must not do this.
///
/// # Errors
/// When the device fails.
pub fn write_out(device: &Path) -> io::Result<()> {
    // The device comes last: its flush covers the writes of its partitions.
    with_partitions(device).iter().rev().try_for_each(|path| match File::open(path) {
        // A partition without a name in /dev has not been written to by that name.
        Err(e) if e.kind() == io::ErrorKind::NotFound && path != device => Ok(()),
        file => file?.sync_all(),
    })
}

/// Claims a block device for a moment, as a filesystem does. This may wait for the device, so its
/// server must not do it.
///
/// # Errors
/// Among others, when a program holds the device or one of its partitions.
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

/// Who holds a block device that cannot be claimed, or one of its partitions: its mount points, and
/// the devices on top of it.
pub fn holders(device: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for path in with_partitions(device) {
        let of = if path == device {
            String::new()
        } else {
            format!(" (its partition {})", path.display())
        };
        let number = std::fs::metadata(&path).map(|device| device.rdev()).unwrap_or(0);
        let places = mounts.lines().filter_map(|line| place_of(line, &path, number));
        found.extend(places.map(|place| format!("mounted on {place}{of}")));
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

/// Where a line of /proc/self/mountinfo says that a block device is mounted. Some filesystems show
/// the device only as what was mounted, which may be a link to it.
fn place_of<'a>(line: &'a str, device: &Path, number: u64) -> Option<&'a str> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut fields = mount.split(' ');
    let (shown, place) = (fields.nth(2)?, fields.nth(1)?);
    let source = Path::new(filesystem.split(' ').nth(1)?);
    let is_source = source.starts_with("/dev")
        && (source == device || std::fs::canonicalize(source).is_ok_and(|it| it == device));
    (shown == format!("{}:{}", major(number), minor(number)) || is_source).then_some(place)
}

/// The programs that have a block device or one of its partitions open without holding it. Examples
/// are a virtual machine and a target that exports the device. Leaves out the processes of its
/// `daemon`. Only root sees the programs of others.
pub fn users(device: &Path, daemon: &[u32]) -> Vec<String> {
    let number = |path: &PathBuf| std::fs::metadata(path).map(|found| found.rdev()).ok();
    let numbers: Vec<u64> = with_partitions(device).iter().filter_map(number).collect();
    let is_device = |open: &DirEntry| {
        // A file elsewhere may be on a filesystem that hangs.
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
        if !daemon.contains(&pid) && files.into_iter().any(|open| is_device(&open)) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("open in {} (process {pid})", name.trim_end()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::place_of;
    use nix::sys::stat::makedev;
    use std::path::Path;

    #[test]
    fn a_mount_is_found_by_the_number_of_its_device_or_by_what_was_mounted() {
        let device = Path::new("/dev/ublkb0");
        let number = makedev(259, 0);
        let by_link = "40 30 259:0 / /srv rw,relatime shared:1 - ext4 /dev/wb/data rw";
        assert_eq!(place_of(by_link, device, number), Some("/srv"));
        let of_btrfs = "41 30 0:45 /@home /home rw - btrfs /dev/ublkb0 rw,subvol=/@home";
        assert_eq!(place_of(of_btrfs, device, number), Some("/home"));
        let other = "42 30 8:1 / /boot rw - ext4 /dev/sda1 rw";
        assert_eq!(place_of(other, device, number), None);
        for cut_short in ["", "1 2 259:0", "1 2 259:0 / /srv rw", "1 2 259:0 / /srv rw - ext4"] {
            assert_eq!(place_of(cut_short, device, number), None, "{cut_short}");
        }
    }
}
