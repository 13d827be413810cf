//! Which backing device a cache belongs to.

use super::bounds::Beyond;
use super::reach::Reach;
use super::recovery::recover;
use super::scan::scan;
use super::segment_writes::write_extension;
use super::superblock::read_superblock;
use super::{LogError, LogErrorKind, Use, refuse_older};
use crate::device::Device;
use crate::format::{SECTOR_BYTES, SuperblockExtension, fitting, printable, to_u64};

/// What distinguishes a backing device from others.
#[derive(Clone, Copy, Debug)]
pub struct BackingFacts<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// Its size in sectors.
    pub sectors: u64,
    /// Its serial number or similar; empty if it has none.
    pub identity: &'a str,
}

impl<'a> BackingFacts<'a> {
    /// The facts of an open device.
    pub fn of(device: &'a Device) -> BackingFacts<'a> {
        let sectors = device.size() / to_u64(SECTOR_BYTES);
        BackingFacts { name: device.name(), sectors, identity: device.identity() }
    }

    /// The error for data that does not fit on the backing device.
    pub(crate) fn refuse_beyond(&self, device: &Device, beyond: Beyond) -> LogError {
        let (backing, sectors) = (self.name.to_string(), self.sectors);
        LogError::new(device, LogErrorKind::BeyondBacking { beyond, backing, sectors })
    }
}

/// Checks that a cache belongs to a backing device, according to its extension. The backing device
/// may have grown if its identity is the same.
///
/// # Errors
/// - The identity is another one.
/// - The backing device has shrunk.
/// - The backing device has grown, and no identity shows that it is the same.
pub fn check_pairing(
    device: &Device,
    extension: &SuperblockExtension,
    backing: &BackingFacts<'_>,
) -> Result<(), LogError> {
    let wrong = |difference| {
        let backing = backing.name.to_string();
        Err(LogError::new(device, LogErrorKind::WrongBacking { backing, difference }))
    };
    let (paired, found) = (extension.backing_sectors, backing.sectors);
    if found < paired {
        return wrong(format!(
            "the cache was made for one of {paired} sectors, this one has only {found}; if it was \
             shrunk, give it its old size back"
        ));
    }
    let known = !extension.backing_id.is_empty() && !backing.identity.is_empty();
    if found > paired && paired > 0 && !known {
        return wrong(format!(
            "the cache was made for one of {paired} sectors, this one has {found}; if it is the \
             same and has grown, attach the volume with --grown"
        ));
    }
    check_identity(device, extension, backing)
}

/// Checks that the identity of a backing device, if both are known, is the one in the extension.
///
/// # Errors
/// When it is another one.
fn check_identity(
    device: &Device,
    extension: &SuperblockExtension,
    backing: &BackingFacts<'_>,
) -> Result<(), LogError> {
    let (paired, found) = (extension.backing_id.as_str(), fitting(backing.identity));
    if paired.is_empty() || found.is_empty() || paired == found {
        return Ok(());
    }
    let [paired, found] = [paired, found].map(printable);
    let difference = format!("the cache was made for '{paired}', this one is '{found}'");
    let backing = backing.name.to_string();
    Err(LogError::new(device, LogErrorKind::WrongBacking { backing, difference }))
}

/// Records that the backing device has grown, where its identity cannot show that.
///
/// # Errors
/// Then nothing is written, unless the device failed during a write.
///
/// - A device fails.
/// - The log is corrupt, or older than `known`.
/// - The identity shows another device.
pub async fn accept_growth(
    device: &Device,
    backing: &BackingFacts<'_>,
    known: Option<Reach>,
) -> Result<(), LogError> {
    let superblock = read_superblock(device, Use::Write).await?;
    let slots = scan(device, superblock.geometry, |_, _| {}).await;
    let recovery = recover(&superblock, &slots).refuse_corrupt(device)?;
    // Writing the page would make an older copy look like a newer one.
    known.map_or(Ok(()), |known| refuse_older(device, recovery.reach(), known))?;
    let grown = |it: &SuperblockExtension| (1..backing.sectors).contains(&it.backing_sectors);
    let Some(extension) = superblock.extension.filter(grown) else { return Ok(()) };
    check_identity(device, &extension, backing)?;
    let page = SuperblockExtension { backing_sectors: backing.sectors, ..extension.next() };
    write_extension(device, &page).await?;
    Ok(device.flush().await?)
}
