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

/// Whether a block device makes a single write durable in less time than a write and a flush take,
/// as sysfs says: it can do so itself (FUA), or has no volatile cache. Elsewhere the kernel flushes
/// after each such write, and a commit may consist of two.
pub(super) fn prefers_durable_writes(dir: &Path) -> bool {
    let says = |file: &str, what: &str| {
        // A partition has the queue of its disk.
        ["queue", "../queue"].iter().any(|queue| {
            std::fs::read_to_string(dir.join(queue).join(file)).is_ok_and(|it| it.trim() == what)
        })
    };
    says("fua", "1") || says("write_cache", "write through")
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

#[cfg(test)]
mod tests {
    use super::prefers_durable_writes;
    use std::fs::{create_dir_all, write};

    #[test]
    fn a_device_with_fua_or_without_a_volatile_cache_prefers_durable_writes() {
        let dir = tempfile::tempdir().unwrap();
        for (fua, cache, prefers) in [
            ("1\n", "write back\n", true),
            ("0\n", "write back\n", false),
            ("0\n", "write through\n", true),
        ] {
            let (disk, partition) = (dir.path().join("sda"), dir.path().join("sda/sda1"));
            create_dir_all(disk.join("queue")).unwrap();
            create_dir_all(&partition).unwrap();
            write(disk.join("queue/fua"), fua).unwrap();
            write(disk.join("queue/write_cache"), cache).unwrap();
            assert_eq!(prefers_durable_writes(&disk), prefers, "{fua}{cache}");
            assert_eq!(prefers_durable_writes(&partition), prefers, "{fua}{cache}");
        }
        assert!(!prefers_durable_writes(&dir.path().join("none")));
    }
}
