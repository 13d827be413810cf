//! Files with holes. A write to a hole needs space of the filesystem, which may have run out by
//! then.

use super::probe::Opened;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::geteuid;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// A file with holes.
#[derive(Debug)]
pub struct SparseFile {
    path: PathBuf,
    file: File,
    /// Its size in bytes.
    size: u64,
    /// Bytes of holes.
    missing: u64,
}

/// Why a sparse file cannot be allocated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoRoom {
    /// Its filesystem is too full.
    #[error(
        "{path}: refused: {missing} bytes of this file are not allocated yet, and its filesystem \
         has room for {free}. Make room, make it smaller, or use --sparse to leave it as it is: \
         if there is no room later, the volume fails"
    )]
    Full {
        /// The file.
        path: PathBuf,
        /// Bytes of holes.
        missing: u64,
        /// Bytes that the filesystem has left.
        free: u64,
    },
    /// The system refused.
    #[error("{path}: cannot be allocated: {cause}; --sparse leaves it as it is")]
    System {
        /// The file.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },
}

impl SparseFile {
    /// The device as a sparse file, if it is a file with holes.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn of(device: &Opened) -> io::Result<Option<SparseFile>> {
        let meta = device.file.metadata()?;
        // The system counts blocks of 512 bytes on every filesystem.
        let missing = meta.len().saturating_sub(meta.blocks().saturating_mul(512));
        if !meta.is_file() || missing == 0 {
            return Ok(None);
        }
        let (path, file) = (device.path.clone(), device.file.try_clone()?);
        Ok(Some(SparseFile { path, file, size: meta.len(), missing }))
    }

    /// Refuses a file whose filesystem has no room for the holes.
    ///
    /// # Errors
    /// Says how much room is missing.
    pub fn refuse_full(&self) -> Result<(), NoRoom> {
        let free = self.free().map_err(|cause| self.system(cause))?;
        match free {
            Some(free) if free < self.missing => {
                Err(NoRoom::Full { path: self.path.clone(), missing: self.missing, free })
            }
            _ => Ok(()),
        }
    }

    /// Allocates the whole file. If the filesystem does not support that, the file stays as it is.
    ///
    /// # Errors
    /// When there is no room.
    pub fn allocate(&self) -> Result<(), NoRoom> {
        let size = i64::try_from(self.size).map_err(|_| self.system(Errno::EFBIG))?;
        match fallocate(&self.file, FallocateFlags::empty(), 0, size) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            Err(cause) => Err(self.system(cause)),
        }
    }

    /// The free bytes of the filesystem; `None` if it does not tell.
    fn free(&self) -> nix::Result<Option<u64>> {
        let filesystem = fstatvfs(&self.file)?;
        if filesystem.blocks() == 0 {
            return Ok(None);
        }
        // Only root may use the remaining blocks.
        let for_all = filesystem.blocks_available();
        let blocks = if geteuid().is_root() { filesystem.blocks_free() } else { for_all };
        Ok(Some(blocks.saturating_mul(filesystem.fragment_size())))
    }

    fn system(&self, cause: Errno) -> NoRoom {
        NoRoom::System { path: self.path.clone(), cause: cause.into() }
    }
}
