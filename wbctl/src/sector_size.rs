//! The logical sector size that a volume is served with.

use anyhow::{Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use libwb::device::Device;

/// The option `--sector-size`.
#[derive(clap::Args)]
pub(crate) struct SectorSize {
    /// Logical sector size of the block device in bytes; by default that of the backing device
    #[arg(
        long,
        value_parser = sizes(),
        hide_possible_values = true,
        value_name = "512|4096"
    )]
    pub(crate) sector_size: Option<u32>,
}

/// The sector sizes, as completions offer them.
fn sizes() -> impl TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["512", "4096"]).try_map(|text| parse(&text))
}

/// Reads a sector size.
pub(crate) fn parse(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("must be 512 or 4096".into()),
    }
}

/// The sector size to serve a backing device with.
pub(crate) fn choose(wanted: Option<u32>, backing: &Device) -> Result<u32> {
    let wanted = wanted.unwrap_or(if backing.block_size() > 512 { 4096 } else { 512 });
    if wanted < backing.block_size() {
        bail!(
            "{}: has blocks of {} bytes, so sectors of {wanted} bytes cannot be served; use \
             --sector-size 4096",
            backing.name(),
            backing.block_size()
        );
    }
    if !backing.size().is_multiple_of(wanted.into()) {
        bail!(
            "{}: its {} bytes are not a multiple of {wanted}, so its end cannot be served in \
             sectors of {wanted} bytes; use --sector-size 512",
            backing.name(),
            backing.size()
        );
    }
    Ok(wanted)
}
