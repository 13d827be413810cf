//! The two devices of a volume, as several commands take them.

use anyhow::{Context, Result};
use libwb::cli::{Backing, Io, place, refuse_in_the_clear};
use libwb::device::Place;
use libwb::device::probe::{Access, Opened};
use std::path::{Path, PathBuf};

/// A cache device and a backing device.
#[derive(clap::Args)]
pub(crate) struct Pair {
    /// The cache device: a block device or a file
    #[arg(long, value_name = "DEV")]
    pub(crate) cache: PathBuf,
    /// The backing device: a block device, a file, or an export of an NBD server
    /// (nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; with TLS: nbds…)
    #[arg(long, value_name = "DEV|URI", value_parser = place())]
    pub(crate) backing: Place,
    #[command(flatten)]
    pub(crate) insecure: Insecure,
}

/// The option `--insecure`.
#[derive(clap::Args)]
pub(crate) struct Insecure {
    /// Use NBD without TLS even with other hosts: for an address in --backing, and one in --serve.
    /// Anybody who reaches a served address can read and write the volume; anybody on the way to a
    /// backing device can read and change its data
    #[arg(long)]
    pub(crate) insecure: bool,
}

impl Pair {
    /// Opens both devices for reading and writing, and locks them.
    pub(crate) fn open(&self, io: &Io) -> Result<(Opened, Backing)> {
        self.open_for(io, [Access::Write; 2])
    }

    /// The same, each with its own access.
    pub(crate) fn open_for(&self, io: &Io, access: [Access; 2]) -> Result<(Opened, Backing)> {
        refuse_in_the_clear(&self.backing, self.insecure.insecure)?;
        Ok(io.open_pair(&self.cache, &self.backing, access)?)
    }
}

/// A device's path that is valid in any working directory.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| path.display().to_string())
}

/// A place that is valid in any working directory.
pub(crate) fn absolute_place(place: &Place) -> Result<Place> {
    place.absolute().with_context(|| place.to_string())
}
