//! How users choose a front end.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How a volume becomes a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FrontEnd {
    /// ublk where it works, else loop
    #[default]
    Auto,
    /// A device of the kernel's ublk driver (Linux 6.5 and later): faster
    Ublk,
    /// A loop device over FUSE
    Loop,
}

/// The option `--serve`.
#[derive(clap::Args)]
pub(crate) struct ServeOption {
    /// How the volume becomes a block device: ublk is faster and needs Linux 6.5; loop is a loop
    /// device over FUSE; auto is ublk where it works, else loop. The default is auto, or what
    /// create recorded
    #[arg(long = "serve", value_name = "auto|ublk|loop", hide_possible_values = true)]
    pub(crate) front_end: Option<FrontEnd>,
}
