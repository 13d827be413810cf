//! Checks of a pair of devices before a cache is made for it.

use super::IoBuf;
use super::probe::Opened;
use crate::format::{BLOCK_BYTES, decode_magic, to_u64};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Why a backing device is probably the wrong one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// It is a cache device itself.
    #[error(
        "{path}: refused: it is a cache device of wb, and may hold the only copy of data (wbcheck \
         {path} tells). Were the two devices swapped? Use --force to make it a backing device \
         anyway"
    )]
    IsCache {
        /// The backing device.
        path: PathBuf,
    },
    /// It is smaller than its cache.
    #[error(
        "{path}: refused: it has {size} bytes, and its cache device {cache_size}. Were the two \
         devices swapped? Use --force to take them as they are"
    )]
    Smaller {
        /// The backing device.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The size of the cache device in bytes.
        cache_size: u64,
    },
    /// It cannot be read.
    #[error("{path}: cannot read: {cause}")]
    Unreadable {
        /// The backing device.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },
}

/// Refuses a backing device that was probably named by mistake.
///
/// # Errors
/// Says why.
pub fn refuse_misfit(cache: &Opened, backing: &Opened) -> Result<(), Misfit> {
    let path = || backing.path.clone();
    if is_cache(backing).map_err(|cause| Misfit::Unreadable { path: path(), cause })? {
        return Err(Misfit::IsCache { path: path() });
    }
    if backing.size < cache.size {
        return Err(Misfit::Smaller { path: path(), size: backing.size, cache_size: cache.size });
    }
    Ok(())
}

/// Whether a device begins like a cache device.
fn is_cache(device: &Opened) -> io::Result<bool> {
    if device.size < to_u64(BLOCK_BYTES) {
        return Ok(false);
    }
    let mut block = IoBuf::zeroed(BLOCK_BYTES);
    device.file.read_exact_at(&mut block, 0)?;
    Ok(decode_magic(block.block_at(0)).is_ok())
}
