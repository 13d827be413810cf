//! `wbctl remove`: forgets a volume.

use crate::config::{RecordedVolume, not_recorded};
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, bail};
use libwb::cli::{Io, Output, count, human_size};
use libwb::device::probe::Access;
use libwb::format::{BLOCK_BYTES, to_u64};
use libwb::log::Use;
use libwb::log::superblock::read_superblock;
use std::io::Write;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The volume
    name: VolumeName,
    /// Forget the volume without checking that its cache is clean, for example when the cache
    /// device is gone
    #[arg(long)]
    force: bool,
}

pub(crate) fn remove(args: &Args, out: &mut Output) -> Result<()> {
    let name = &args.name;
    let record = name.config_file();
    if !record.exists() {
        return Err(not_recorded(name));
    }
    let Some(lock) = name.lock()? else {
        bail!("volume '{name}' is attached; first run: wbctl detach {name} --drain");
    };
    if !args.force
        && let Some(volume) = RecordedVolume::load(name)?
    {
        refuse_dirty(name, &volume)?;
    }
    std::fs::remove_file(&record).with_context(|| format!("cannot remove {}", record.display()))?;
    name.clear(lock)?;
    writeln!(out, "removed '{name}'; its devices are as they were")?;
    Ok(())
}

fn refuse_dirty(name: &VolumeName, volume: &RecordedVolume) -> Result<()> {
    let cannot_tell = || {
        format!(
            "refused: cannot tell whether the cache of '{name}' is clean (--force forgets the \
             volume anyway)"
        )
    };
    let dirty = (|| -> Result<u64> {
        let io = Io::start()?;
        let device = io.open(&volume.cache, Access::Read)?;
        let superblock = io.block_on(read_superblock(&device, Use::Read))?;
        Ok(io.dirty_blocks(&device, &superblock)?)
    })();
    let dirty = dirty.with_context(cannot_tell)?;
    if dirty > 0 {
        bail!(
            "refused: {} ({}) of '{name}' are only in its cache. Write them back first: wbctl \
             replay --cache {} --backing {}",
            human_size(dirty * to_u64(BLOCK_BYTES)),
            count(dirty, "block"),
            volume.cache.display(),
            volume.backing.in_shell()
        );
    }
    Ok(())
}
