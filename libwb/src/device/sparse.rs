//! Files that are not all there: what is written to a hole of one needs room of its filesystem,
//! which may be gone by then.

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

/// A sparse file cannot be filled.
#[derive(Debug, thiserror::Error)]
pub enum NoRoom {
    /// Its filesystem is too full.
    #[error(
        "{path}: refused: {missing} bytes of this file are not allocated yet, and its filesystem \
         has room for {free}. Make room, make it smaller, or use --sparse to leave it as it is: \
         should there be no room later, the volume fails"
    )]
    Full {
        /// The file.
        path: PathBuf,
        /// Bytes of holes.
        missing: u64,
        /// Bytes that the filesystem has left.
        free: u64,
    },
    /// The system said no.
    #[error("{path}: cannot be allocated: {cause}; --sparse leaves it as it is")]
    System {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

impl SparseFile {
    /// The file, if it is one and has holes.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn of(device: &Opened) -> io::Result<Option<SparseFile>> {
        let meta = device.file.metadata()?;
        // Blocks of 512 bytes, whatever the filesystem's are.
        let missing = meta.len().saturating_sub(meta.blocks().saturating_mul(512));
        if !meta.is_file() || missing == 0 {
            return Ok(None);
        }
        let (path, file) = (device.path.clone(), device.file.try_clone()?);
        Ok(Some(SparseFile { path, file, size: meta.len(), missing }))
    }

    /// Refuses where the filesystem has no room for the holes.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn refuse_full(&self) -> Result<(), NoRoom> {
        let free = self.free().map_err(|cause| self.system(cause))?;
        match free {
            Some(free) if free < self.missing => {
                Err(NoRoom::Full { path: self.path.clone(), missing: self.missing, free })
            }
            _ => Ok(()),
        }
    }

    /// Has the filesystem set room aside for all of the file. Where it cannot do such a thing, the
    /// file stays as it is.
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

    /// How many bytes the filesystem has left; `None` where it does not say.
    fn free(&self) -> nix::Result<Option<u64>> {
        let filesystem = fstatvfs(&self.file)?;
        if filesystem.blocks() == 0 {
            return Ok(None);
        }
        // The rest is for root alone.
        let for_all = filesystem.blocks_available();
        let blocks = if geteuid().is_root() { filesystem.blocks_free() } else { for_all };
        Ok(Some(blocks.saturating_mul(filesystem.fragment_size())))
    }

    fn system(&self, cause: Errno) -> NoRoom {
        NoRoom::System { path: self.path.clone(), cause: cause.into() }
    }
}
