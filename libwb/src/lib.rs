//! A log-structured write cache for block devices, in user space.
//!
//! `libwb` holds the on-disk format of dm-writeboost, the devices that a cache stands on, the log,
//! the cache engine, and the front end that serves a cached volume. ARCHITECTURE.md describes how
//! they fit together. Units are types (see [`format`]); a plain `u64` or `usize` is bytes unless
//! its name or documentation says what it counts.

mod buf;
pub mod cache;
#[cfg(feature = "cli")]
pub mod cli;
pub mod control;
pub mod device;
pub mod format;
pub mod log;
mod pending;
pub mod reactor;
#[cfg(not(feature = "sim"))]
mod rules;
#[cfg(feature = "sim")]
pub mod rules;
pub mod runtime;
pub mod serve;
mod sys;
