//! Whether an open device is still the one at its path.

use super::identity::{Identity, identity};
use super::probe::Opened;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// An open device and its path.
pub struct Watched {
    path: PathBuf,
    /// The same open file, which keeps the device locked.
    file: File,
    identity: Identity,
}

/// What has happened to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// The file has no name any more. It is freed when its last user closes it.
    Deleted,
    /// Its path leads to another device. The inode of the open one, if that is a file.
    Replaced(Option<u64>),
    /// Its path leads nowhere. The inode of the open file.
    Moved(u64),
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Gone::Deleted => f.write_str("the file was deleted"),
            Gone::Replaced(None) => f.write_str("another device has taken its place"),
            Gone::Replaced(Some(inode)) => {
                write!(f, "another file has taken its place (the one before has the inode {inode})")
            }
            Gone::Moved(inode) => {
                write!(f, "the file is no longer there (it has the inode {inode})")
            }
        }
    }
}

impl Watched {
    /// # Errors
    /// When the process has too many files open.
    pub fn new(opened: &Opened) -> io::Result<Watched> {
        let file = opened.file.try_clone()?;
        let identity = Identity::of(&file.metadata()?);
        Ok(Watched { path: opened.path.clone(), file, identity })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What has happened to the device, if its path does not lead to it any more.
    pub fn gone(&self) -> Option<Gone> {
        let found = identity(&self.path);
        if found.as_ref().is_ok_and(|found| *found == self.identity) {
            return None;
        }
        let meta = self.file.metadata().ok()?;
        let inode = meta.is_file().then_some(meta.ino());
        match (found, inode) {
            (_, Some(_)) if meta.nlink() == 0 => Some(Gone::Deleted),
            (Ok(_), inode) => Some(Gone::Replaced(inode)),
            (Err(e), Some(inode)) if e.kind() == ErrorKind::NotFound => Some(Gone::Moved(inode)),
            // Only the name of a block device is gone. udev may be creating it again.
            (Err(_), _) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::probe::{Access, open};

    #[test]
    fn a_file_that_is_deleted_replaced_or_moved_is_told_from_one_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let [path, other] = ["device", "other"].map(|name| dir.path().join(name));
        for path in [&path, &other] {
            std::fs::write(path, [0; 4096]).unwrap();
        }
        let watched = Watched::new(&open(&path, Access::Write).unwrap()).unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        assert_eq!(watched.gone(), None);
        std::fs::hard_link(&path, dir.path().join("link")).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(watched.gone(), Some(Gone::Moved(inode)));
        std::os::unix::fs::symlink(dir.path().join("link"), &path).unwrap();
        assert_eq!(watched.gone(), None, "by another name, it is the same");
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(watched.gone(), Some(Gone::Replaced(Some(inode))));
        std::fs::remove_file(dir.path().join("link")).unwrap();
        assert_eq!(watched.gone(), Some(Gone::Deleted));
    }
}
