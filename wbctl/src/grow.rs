//! A backing device that has grown since its size was recorded.

use anyhow::Result;
use libwb::cache::Cache;
use libwb::cli::human_size;
use libwb::device::Device;
use libwb::format::{SECTOR_BYTES, to_u64};
use libwb::log::create::record_backing_size;
use libwb::log::scan::{BackingFacts, read_superblock};

/// Records the size of a backing device that has grown, so that it is noticed should it shrink again. What is not
/// sound, or belongs to another backing device, is refused with both devices untouched.
pub(crate) async fn record(cache: &Device, backing: &Device) -> Result<()> {
    let sectors = BackingFacts::of(backing).sectors;
    let Some(extension) = read_superblock(cache).await?.extension else { return Ok(()) };
    let before = extension.backing_sectors;
    if before == 0 || sectors <= before {
        return Ok(());
    }
    Cache::examine(cache, backing).await?;
    record_backing_size(cache, &extension, sectors).await?;
    let size = |sectors: u64| human_size(sectors.saturating_mul(to_u64(SECTOR_BYTES)));
    tracing::info!(
        "{} has grown from {} to {}, and the volume with it",
        backing.name(),
        size(before),
        size(sectors)
    );
    Ok(())
}
