//! The two devices of a volume, as several commands take them.

use anyhow::{Context, Result};
use libwb::device::probe::{self, Access, OpenError, Opened};
use std::path::{Path, PathBuf};

/// A cache device and a backing device.
#[derive(clap::Args)]
pub(crate) struct Pair {
    /// The cache device: a block device or a file
    #[arg(long, value_name = "DEV")]
    pub(crate) cache: PathBuf,
    /// The backing device: a block device or a file
    #[arg(long, value_name = "DEV")]
    pub(crate) backing: PathBuf,
}

impl Pair {
    /// Opens both devices for reading and writing, and locks them.
    pub(crate) fn open(&self) -> Result<(Opened, Opened), OpenError> {
        probe::open_pair(&self.cache, &self.backing, [Access::Write; 2])
    }
}

/// A device's path that is valid in any working directory.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| path.display().to_string())
}
