//! Checks of a pair of devices before a cache is made for it.

use super::{Device, DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, decode_magic, to_u64};
use std::sync::Arc;

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
        path: Arc<str>,
    },
    /// It is smaller than its cache.
    #[error(
        "{path}: refused: it has {size} bytes, and its cache device {cache_size}. Were the two \
         devices swapped? Use --force to take them as they are"
    )]
    Smaller {
        /// The backing device.
        path: Arc<str>,
        /// Its size in bytes.
        size: u64,
        /// The size of the cache device in bytes.
        cache_size: u64,
    },
    /// It cannot be read.
    #[error("{0}")]
    Unreadable(#[from] DeviceError),
}

/// Refuses a backing device that was probably named by mistake. `cache_size` is in bytes.
///
/// # Errors
/// Says why.
pub async fn refuse_misfit(cache_size: u64, backing: &Device) -> Result<(), Misfit> {
    let path = || backing.name().clone();
    if is_cache(backing).await? {
        return Err(Misfit::IsCache { path: path() });
    }
    if backing.size() < cache_size {
        return Err(Misfit::Smaller { path: path(), size: backing.size(), cache_size });
    }
    Ok(())
}

/// Whether a device begins like a cache device.
async fn is_cache(device: &Device) -> Result<bool, DeviceError> {
    if device.size() < to_u64(BLOCK_BYTES) {
        return Ok(false);
    }
    let block = device.read(0, IoBuf::zeroed(BLOCK_BYTES)).await?;
    Ok(decode_magic(block.block_at(0)).is_ok())
}
