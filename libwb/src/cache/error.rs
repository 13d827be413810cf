//! Why a cache cannot do what was asked.

use super::state::stuck::StuckBlocks;
use crate::device::{DeviceError, Operation};
use crate::format::Sector;
use crate::log::LogError;
use nix::errno::Errno;

/// Why a cache cannot do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The log cannot be read or trusted.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The cache device failed earlier, so nothing more can be kept.
    #[error("writes are refused since the cache device failed: {0}")]
    Failed(DeviceError),
    /// The log is full.
    #[error("the log is full, and write-back makes no progress: {0}")]
    Full(DeviceError),
    /// All that could be written back was.
    #[error("all else is written back, but {0}")]
    Stuck(StuckBlocks),
    /// The log's head cannot be used.
    #[error(
        "the head of the log in memory cannot be used: {0}. Writes that were not flushed may be \
         lost"
    )]
    Head(String),
    /// There is no memory for the log's head.
    #[error("no memory for the head of the log: {0}")]
    NoMemory(String),
    /// The request does not lie within the volume.
    #[error("request of {length} bytes at sector {sector} is unaligned or outside the volume")]
    OutOfRange {
        /// Where it begins.
        sector: Sector,
        /// Its length in bytes.
        length: u64,
    },
    /// The backing device has more blocks than the index can name.
    #[error(
        "{backing}: too large for a backing device: {bytes} bytes, and at most {maximum} are \
         supported"
    )]
    TooLarge {
        /// The backing device.
        backing: String,
        /// Its size in bytes.
        bytes: u64,
        /// The largest size that would do, in bytes.
        maximum: u64,
    },
    /// The cache is being closed.
    #[error("the volume is being detached")]
    Closed,
    /// The cache was closed, but a segment that is written back could not be emptied.
    #[error(
        "all data is kept, but the cache is not ready for the kernel module, which would take old \
         data for new: {0}. Before you give it the cache, attach and detach the volume again, or \
         use wbcheck --repair"
    )]
    NotHandedOver(DeviceError),
}

impl CacheError {
    /// The error number that a front end reports.
    pub fn errno(&self) -> Errno {
        match self {
            CacheError::OutOfRange { .. } => Errno::EINVAL,
            CacheError::Closed => Errno::ESHUTDOWN,
            CacheError::Device(error) if error.operation == Operation::Discard => error.cause,
            CacheError::Log(_)
            | CacheError::Head(_)
            | CacheError::NoMemory(_)
            | CacheError::Device(_)
            | CacheError::Failed(_)
            | CacheError::Full(_)
            | CacheError::Stuck(_)
            | CacheError::NotHandedOver(_) => Errno::EIO,
            CacheError::TooLarge { .. } => Errno::EFBIG,
        }
    }
}
