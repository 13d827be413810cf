//! Which device a path leads to, and what identifies that device.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Which device a path leads to. Two paths with the same identity lead to the same device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// A block device's number.
    BlockDevice(u64),
    /// A file's filesystem and inode.
    File(u64, u64),
}

impl Identity {
    pub(super) fn of(meta: &Metadata) -> Identity {
        if meta.file_type().is_block_device() {
            Identity::BlockDevice(meta.rdev())
        } else {
            Identity::File(meta.dev(), meta.ino())
        }
    }
}

/// Which device a path leads to, without opening it.
///
/// # Errors
/// When the path leads nowhere.
pub fn identity(path: &Path) -> io::Result<Identity> {
    std::fs::metadata(path).map(|meta| Identity::of(&meta))
}

pub(super) fn sysfs_folder(number: u64) -> PathBuf {
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// The folder in which the kernel describes a block device's queue; a partition has its disk's.
pub(super) fn queue_folder(number: u64) -> PathBuf {
    let folder = sysfs_folder(number);
    let own = folder.join("queue");
    if own.exists() { own } else { folder.join("../queue") }
}

/// A block device's own identity, from sysfs:
///
/// - of a device-mapper or MD device, its UUID;
/// - of a disk, its world-wide name or serial number;
/// - of a partition, its disk's identity with the number of the partition.
pub(super) fn serial(dir: &Path) -> String {
    let read = |file: &str| {
        let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        Some(text.trim().to_string()).filter(|text| !text.is_empty())
    };
    let of_disk = |up: &str| {
        let names = ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial"];
        names.iter().find_map(|name| read(&format!("{up}{name}")))
    };
    match read("partition") {
        None => of_disk("").unwrap_or_default(),
        Some(partition) => {
            of_disk("../").map_or_else(String::new, |disk| format!("{disk}-part{partition}"))
        }
    }
}
