//! The arguments of `wbctl attach`.

use crate::config::{RecordedVolume, not_recorded, parse_tunables};
use crate::front_end::{FrontEnd, ServeOption};
use crate::pair::{Insecure, absolute, absolute_place};
use crate::sector_size::SectorSize;
use crate::volume_paths::VolumeName;
use anyhow::{Result, bail};
use libwb::cli::{SalvageOption, place, refuse_in_the_clear};
use libwb::device::Place;
use std::path::PathBuf;
use std::str::FromStr;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A volume that `wbctl create` recorded; with --cache and --backing, a name for the volume
    #[arg(value_name = "NAME", required_unless_present = "cache")]
    first: Option<First>,
    /// The cache device: a block device or a file
    #[arg(long, value_name = "DEV", requires = "backing")]
    cache: Option<PathBuf>,
    /// The backing device: a block device, a file, or an export of an NBD server
    /// (nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; with TLS: nbds…)
    #[arg(long, value_name = "DEV|URI", requires = "cache", value_parser = place())]
    backing: Option<Place>,
    #[command(flatten)]
    insecure: Insecure,
    #[command(flatten)]
    serve: ServeOption,
    #[command(flatten)]
    sector: SectorSize,
    #[command(flatten)]
    pub(crate) salvage: SalvageOption,
    /// Use a cache that is older than when wb last saw it: an earlier copy, or a device that went
    /// back in time. Its data may be older than that of the backing device
    #[arg(long)]
    pub(crate) older: bool,
    /// Serve only reads, and change nothing on either device
    ///
    /// wb keeps in memory what recovery would write. The block device is read-only, too. To mount a
    /// filesystem whose journal was not replayed, use -o ro,noload (ext4) or -o ro,norecovery
    /// (xfs).
    #[arg(long, conflicts_with_all = ["salvage", "grown"])]
    pub(crate) read_only: bool,
    /// The backing device is the same one, and has grown. Needed where the device has no identity
    /// that shows this, such as a plain file
    #[arg(long)]
    pub(crate) grown: bool,
    /// Wait up to this long for devices that are not there yet, as at boot
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) wait: u32,
    /// Tunables for this attach only
    #[arg(value_name = "KEY=VALUE")]
    tunables: Vec<String>,
}

/// The first positional argument. NAME is optional where --cache is given.
#[derive(Clone, Debug)]
enum First {
    Name(VolumeName),
    Tunable(String),
}

impl FromStr for First {
    type Err = String;

    fn from_str(text: &str) -> Result<First, String> {
        if text.contains('=') {
            Ok(First::Tunable(text.into()))
        } else {
            text.parse().map(First::Name)
        }
    }
}

impl Args {
    /// The name of the volume.
    pub(crate) fn name(&self) -> Result<VolumeName> {
        match (&self.first, &self.cache) {
            (Some(First::Name(name)), _) => Ok(name.clone()),
            (_, Some(cache)) => VolumeName::of_device(cache),
            _ => bail!("give a volume's name, or --cache and --backing"),
        }
    }

    /// The volume, with all that the command line says.
    pub(crate) fn volume(&self) -> Result<(VolumeName, RecordedVolume)> {
        let name = self.name()?;
        let tunable = match &self.first {
            Some(First::Tunable(pair)) => Some(pair),
            _ => None,
        };
        let mut volume = match (&self.cache, &self.backing) {
            (Some(cache), Some(backing)) => {
                RecordedVolume {
                    // Others read these paths from other working directories.
                    cache: absolute(cache)?,
                    backing: absolute_place(backing)?,
                    serve: FrontEnd::default(),
                    insecure: false,
                    sector_size: None,
                    tunables: Default::default(),
                }
            }
            _ => RecordedVolume::load(&name)?.ok_or_else(|| not_recorded(&name))?,
        };
        // What is recorded allows the recorded addresses, and no other.
        let is_recorded = volume.insecure && !self.serve.is_given();
        volume.serve = self.serve.or(volume.serve, is_recorded || self.insecure.insecure)?;
        volume.insecure |= self.insecure.insecure;
        refuse_in_the_clear(&volume.backing, volume.insecure)?;
        volume.sector_size = self.sector.sector_size.or(volume.sector_size);
        let tunables: Vec<String> = tunable.into_iter().chain(&self.tunables).cloned().collect();
        volume.tunables.extend(parse_tunables(&tunables)?);
        Ok((name, volume))
    }
}
