//! The log on a cache device: making an empty one, reading it, and repairing damage.

pub(crate) mod bounds;
mod claims;
pub(crate) mod corruption;
mod error;
#[cfg(test)]
mod evidence;
pub mod format_device;
pub mod history;
pub(crate) mod kernel_compat;
pub mod live;
pub mod pairing;
mod part;
pub mod reach;
pub mod recovery;
pub mod salvage;
pub mod scan;
pub mod segment_writes;
pub mod superblock;
pub mod tail;
#[cfg(test)]
mod test_log;
pub mod traces;
pub mod upgrade;
mod verdict;

pub(crate) use error::refuse_older;
pub use error::{LogError, LogErrorKind};
pub use superblock::Use;
