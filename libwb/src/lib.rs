//! A log-structured write cache for block devices, in user space.
//!
//! `libwb` holds the on-disk format of dm-writeboost, the devices that a cache stands on, the log,
//! the cache engine, and the front end that serves a cached volume:
//!
//! | module | feature | what it holds |
//! | --- | --- | --- |
//! | [`mod@format`] | | bytes ⇄ values: superblock, segments, checksums. No I/O |
//! | `device`, `log` | `log` (default) | block devices; scan, recovery, salvage of a log |
//! | `device::nbd` | `nbd-client` | a device on an NBD server |
//! | `cache` | `engine` | the write cache itself |
//! | `reactor` | `uring` | files and block devices through io_uring |
//! | `nbd` | `nbd` | the NBD protocol: bytes ⇄ values. No I/O |
//! | `serve` | `serve-ublk`, `serve-loop`, `serve-nbd` | a volume as a block device, or over NBD |
//! | `control` | `control` | the socket of the daemon |
//! | `cli` | `cli` | what the programs share |
//!
//! ARCHITECTURE.md in the repository describes how they fit together. Units are types (see
//! [`mod@format`]); a plain `u64` or `usize` is bytes unless its name or documentation says what it
//! counts.
//!
//! A cache in memory loses its process and recovers:
//!
#![cfg_attr(all(feature = "engine", feature = "uring"), doc = "```")]
#![cfg_attr(not(all(feature = "engine", feature = "uring")), doc = "```ignore")]
//! use libwb::cache::{Cache, OpenOptions};
//! use libwb::device::{Device, IoBuf, MemDevice};
//! use libwb::format::{BLOCK_BYTES, Sector, SuperblockExtension};
//! use libwb::log::format_device::create;
//! use libwb::reactor::Reactor;
//! use std::sync::Arc;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let reactor = Reactor::start()?;
//! let runtime = Arc::new(reactor.handle().clone());
//! let ssd: Device = Arc::new(MemDevice::new("ssd", 8 << 20));
//! let disk: Device = Arc::new(MemDevice::new("disk", 64 << 20));
//! let options = OpenOptions::serve;
//!
//! // Format the cache device, open the cache, write a block, and make it durable.
//! reactor.block_on(async {
//!     let identity = SuperblockExtension::new(uuid::Uuid::new_v4(), ssd.size());
//!     create(&ssd, Some(&identity), |_| ()).await?;
//!     let cache = Cache::open(ssd.clone(), disk.clone(), runtime.clone(), options()).await?;
//!     cache.write(Sector(8), &[7; BLOCK_BYTES]).await?;
//!     cache.flush().await?;
//!     // The process dies here: the cache is not closed, and the disk has nothing yet.
//!     Ok::<_, Box<dyn std::error::Error>>(())
//! })?;
//!
//! // The next process recovers the log.
//! reactor.block_on(async {
//!     let cache = Cache::open(ssd.clone(), disk.clone(), runtime, options()).await?;
//!     let data = cache.read(Sector(8), IoBuf::zeroed(BLOCK_BYTES)).await?;
//!     assert!(data.iter().all(|&byte| byte == 7));
//!     cache.drain().await?;
//!     cache.close().await?;
//!     Ok::<_, Box<dyn std::error::Error>>(())
//! })?;
//! let data = reactor.block_on(disk.read(8 * 512, IoBuf::zeroed(BLOCK_BYTES)))?;
//! assert!(data.iter().all(|&byte| byte == 7), "the disk alone holds it now");
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "log")]
mod buf;
#[cfg(feature = "engine")]
pub mod cache;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "control")]
pub mod control;
#[cfg(feature = "log")]
pub mod device;
#[cfg(feature = "control")]
pub mod folders;
pub mod format;
#[cfg(feature = "log")]
pub mod log;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(feature = "log")]
mod pending;
#[cfg(feature = "uring")]
pub mod reactor;
#[cfg(all(any(feature = "engine", feature = "nbd-client"), not(feature = "sim")))]
mod rules;
#[cfg(feature = "sim")]
pub mod rules;
#[cfg(any(feature = "engine", feature = "uring"))]
pub mod runtime;
#[cfg(feature = "serve")]
pub mod serve;
#[cfg(any(feature = "engine", feature = "uring"))]
mod sys;
