//! Finding users of a device or a file that neither exclusive opening nor a lock reveals: loop
//! devices and swap.

use super::identity::{Identity, sysfs_folder};
use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The device or file to open.
struct Wanted {
    identity: Identity,
    /// The last component of its path, after symbolic links.
    name: Option<OsString>,
    links: u64,
    /// Its folder in sysfs, for a block device.
    sysfs: Option<PathBuf>,
}

/// Who uses a device or file and how to end that, as text.
pub(super) fn holder(path: &Path, meta: &Metadata) -> Option<String> {
    let identity = Identity::of(meta);
    let wanted = Wanted {
        identity,
        name: path.canonicalize().ok().and_then(|path| path.file_name().map(OsStr::to_os_string)),
        links: meta.nlink(),
        sysfs: folder(identity),
    };
    loop_device(&wanted).or_else(|| swap(&wanted))
}

fn folder(identity: Identity) -> Option<PathBuf> {
    match identity {
        Identity::BlockDevice(number) => sysfs_folder(number).canonicalize().ok(),
        Identity::File(..) => None,
    }
}

fn loop_device(wanted: &Wanted) -> Option<String> {
    std::fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let mut file = std::fs::read(entry.path().join("loop/backing_file")).ok()?;
        file.pop_if(|last| *last == b'\n');
        let name = entry.file_name();
        let name = name.to_string_lossy();
        wanted.is_at(Path::new(&OsString::from_vec(file))).then(|| {
            format!(
                "the loop device /dev/{name} uses it. Unmount that loop device, then: losetup \
                 --detach /dev/{name}"
            )
        })
    })
}

/// The kernel opens a swap device exclusively, but not a swap file.
fn swap(wanted: &Wanted) -> Option<String> {
    let table = std::fs::read("/proc/swaps").ok()?;
    table.split(|&byte| byte == b'\n').skip(1).find_map(|line| {
        let field = line.split(|byte| byte.is_ascii_whitespace()).next()?;
        let path = PathBuf::from(OsString::from_vec(unescaped(field)));
        wanted
            .is_at(&path)
            .then(|| format!("the system swaps to it; to end that: swapoff {}", path.display()))
    })
}

impl Wanted {
    /// Whether a path leads to the wanted device, to a partition of it, or to its whole disk.
    fn is_at(&self, path: &Path) -> bool {
        // The path may be on a filesystem that hangs. So only a path that may match is followed.
        let may_be = match self.identity {
            Identity::BlockDevice(_) => path.starts_with("/dev/"),
            Identity::File(..) => self.links > 1 || path.file_name() == self.name.as_deref(),
        };
        let Some(other) = std::fs::metadata(path).ok().filter(|_| may_be) else { return false };
        let other = Identity::of(&other);
        // The folder of a partition is inside that of its disk.
        let overlaps =
            |(ours, its): (&PathBuf, &PathBuf)| ours.starts_with(its) || its.starts_with(ours);
        other == self.identity
            || self.sysfs.as_ref().zip(folder(other).as_ref()).is_some_and(overlaps)
    }
}

/// Decodes a path from a kernel table. In it a blank, tab, line feed or backslash is a backslash
/// and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| first == b'\\');
        let digits =
            digits.and_then(|it| u8::from_str_radix(OsStr::from_bytes(it).to_str()?, 8).ok());
        text.push(digits.unwrap_or(first));
        rest = if digits.is_some() { &after[3..] } else { after };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::unescaped;

    #[test]
    fn a_path_in_a_table_of_the_kernel_is_read_as_it_is() {
        for (field, path) in [
            (&b"/swap"[..], &b"/swap"[..]),
            (br"/a\040b\011\134", b"/a b\t\\"),
            (br"/a\9", br"/a\9"),
            (br"/a\77", br"/a\77"),
            (b"\xff\\", b"\xff\\"),
        ] {
            assert_eq!(unescaped(field), path);
        }
    }
}
