//! Refuses a second cache in front of a backing device while the recorded cache is dirty. Writing
//! the recorded one back later would overwrite data that came through the second one.

use crate::notes::Note;
use anyhow::{Context, Result, bail};
use libwb::cli::{Io, VolumeDevices, count};
use libwb::device::probe::Access;
use libwb::device::{Place, is_same_device};
use libwb::log::Use;
use libwb::log::superblock::{examine_superblock, read_superblock};
use std::io::ErrorKind;
use std::path::Path;

/// Refuses a cache in front of a backing device that belongs to the dirty cache of a volume. `uuid`
/// is the identity of the cache, if it has one.
pub(crate) fn refuse(io: &Io, cache: &Path, uuid: Option<&str>, backing: &Place) -> Result<()> {
    let others = VolumeDevices::all().context("cannot read the records of other volumes")?;
    let others = others.iter().filter(|it| backing.is_same(&it.backing));
    for other in others.filter(|it| !is_same_device(cache, &it.cache)) {
        let Some(holds) = dirt(io, other, uuid)? else { continue };
        let VolumeDevices { name, cache, .. } = other;
        bail!(
            "{backing}: refused: it belongs to the volume '{name}', whose cache {} {holds}. If \
             that data is written back later, it overwrites what another cache writes now. Write \
             it back first (wbctl replay with that cache), or give it up: wbctl remove --force \
             {name}",
            cache.display(),
        );
    }
    Ok(())
}

/// What the cache of a recorded volume still has to write back, as text, if anything. A copy of the
/// cache that is about to be used is not another cache.
fn dirt(io: &Io, volume: &VolumeDevices, uuid: Option<&str>) -> Result<Option<String>> {
    let VolumeDevices { name, cache, backing } = volume;
    if std::fs::metadata(cache).is_err_and(|e| e.kind() == ErrorKind::NotFound) {
        let note =
            Note::of(volume).filter(|note| note.may_be_dirty() && uuid != Some(note.uuid.as_str()));
        return Ok(note.map(|note| {
            format!("is not there, and may hold dirty data (last seen {})", note.when())
        }));
    }
    let dirty = (|| -> Result<u64> {
        let device = io.open(cache, Access::Read)?;
        let superblock = io.block_on(examine_superblock(&device))?;
        if uuid.is_some()
            && superblock.extension().map(|page| page.uuid.to_string()).as_deref() == uuid
        {
            return Ok(0);
        }
        let superblock = io.block_on(read_superblock(&device, Use::Read))?;
        Ok(io.dirty_blocks(&device, &superblock)?)
    })();
    let dirty = dirty.with_context(|| {
        format!(
            "{backing}: refused: it belongs to the volume '{name}', and wb cannot tell whether the \
             cache of that volume is clean (wbctl remove --force {name} gives it up)"
        )
    })?;
    Ok((dirty > 0).then(|| format!("holds {}", count(dirty, "dirty block"))))
}
