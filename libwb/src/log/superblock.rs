//! What the superblock region of a cache device says.

use super::{LogError, LogErrorKind};
use crate::device::{Device, DeviceError, IoBuf};
use crate::format::{
    BLOCK_BYTES, EXTENSION_OFFSETS, EXTENSION_VERSION, Geometry, PageFault, RECORD_BLOCK_OFFSET,
    SUPERBLOCK_OFFSET, SegmentId, SuperblockExtension, SuperblockFault, decode_magic,
    decode_record,
};

/// What the caller wants a cache device for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To read it.
    Read,
    /// To write to it, or to write its content to the backing device.
    Write,
}

/// Replaces each byte of an unreadable block. It makes no magic and no valid record.
const UNREAD: u8 = 0xff;

/// What the superblock region of a cache device says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The layout of the device.
    pub geometry: Geometry,
    /// The superblock record: every segment up to this one was written back.
    pub record: SegmentId,
    /// The record proves that wb wrote it for this cache. The kernel module writes one that does
    /// not.
    pub is_record_proved: bool,
    /// The superblock extension. A device of the kernel module has none.
    pub extension: Option<SuperblockExtension>,
    /// The device has lost its extension: a damaged copy, or the record, shows that there was one.
    pub lost_extension: bool,
}

/// What the superblock region of a device says, valid or not.
#[derive(Clone, Debug)]
pub struct RawSuperblock {
    /// The layout of a cache device of this size.
    pub geometry: Geometry,
    /// Whether the magic is correct.
    pub magic: Result<(), SuperblockFault>,
    /// The superblock record.
    pub record: Result<SegmentId, SuperblockFault>,
    /// Both copies of the superblock extension.
    pub pages: [Result<SuperblockExtension, PageFault>; 2],
    /// The digest of the cache that the record belongs to, if the record has one.
    pub record_digest: Option<u32>,
}

impl RawSuperblock {
    /// The newer of the sound copies of the superblock extension, if there is any.
    pub fn extension(&self) -> Option<&SuperblockExtension> {
        SuperblockExtension::newest(&self.pages)
    }

    /// Whether one of the two copies of the superblock extension is damaged, unreadable or gone,
    /// and no power cut explains that.
    pub fn has_damaged_copy(&self) -> bool {
        self.extension().is_some() && self.pages.iter().any(Result::is_err) && !self.has_torn_copy()
    }

    /// Whether a power cut tore one of the two copies of the superblock extension.
    pub fn has_torn_copy(&self) -> bool {
        let torn = self.pages.iter().find_map(|page| match page {
            Err(PageFault::Torn(torn)) => Some(torn),
            _ => None,
        });
        self.extension().zip(torn).is_some_and(|(sound, torn)| sound.explains(torn))
    }

    /// Whether this version of wb may use the device, according to its extension.
    ///
    /// # Errors
    /// When this version of wb does not know the extension's version or features, or the device was
    /// resized after it was formatted.
    pub fn check_extension(&self, device: &Device, wanted: Use) -> Result<(), LogError> {
        let Some(extension) = self.extension() else { return Ok(()) };
        if extension.version != EXTENSION_VERSION {
            return Err(LogError::new(
                device,
                LogErrorKind::UnknownVersion { version: extension.version },
            ));
        }
        if extension.incompatible != 0 {
            return Err(LogError::new(
                device,
                LogErrorKind::UnknownFeatures { flags: extension.incompatible },
            ));
        }
        if extension.read_compatible != 0 && wanted == Use::Write {
            return Err(LogError::new(
                device,
                LogErrorKind::ReadOnlyFeatures { flags: extension.read_compatible },
            ));
        }
        let (formatted, found) = (extension.cache_bytes, device.size());
        if formatted != found {
            return Err(LogError::new(device, LogErrorKind::Resized { formatted, found }));
        }
        Ok(())
    }

    /// The superblock for an examination in spite of faults. An invalid record counts as none, so
    /// that every segment counts.
    pub fn or_no_record(&self) -> Superblock {
        Superblock {
            geometry: self.geometry,
            extension: self.extension().cloned(),
            record: self.record.unwrap_or(SegmentId::NONE),
            is_record_proved: self.record.is_ok()
                && self.extension().is_some_and(|page| Some(page.digest()) == self.record_digest),
            // Without a readable page, the record and the segments tell.
            lost_extension: self.extension().is_none()
                && (self.record_digest.is_some()
                    || self
                        .pages
                        .iter()
                        .any(|page| matches!(page, Err(PageFault::Crc | PageFault::Torn(_))))),
        }
    }
}

/// Reads the superblock and its record, and says whether each is valid.
///
/// # Errors
/// When the magic or the record cannot be read, or the device has an impossible size.
pub async fn examine_superblock(device: &Device) -> Result<RawSuperblock, LogError> {
    let (superblock, unread) = examine_damaged_superblock(device).await?;
    match unread.into_iter().flatten().next() {
        Some(error) => Err(error.into()),
        None => Ok(superblock),
    }
}

/// As [`examine_superblock`], for a device with any damage. Also returns the errors from reading
/// the magic and the record. An unreadable one counts as invalid.
///
/// # Errors
/// When the device has an impossible size.
pub async fn examine_damaged_superblock(
    device: &Device,
) -> Result<(RawSuperblock, [Option<DeviceError>; 2]), LogError> {
    let geometry = Geometry::of_device(device.size())
        .map_err(|fault| LogError::new(device, LogErrorKind::Geometry { fault }))?;
    let read = async |offset| match device.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await {
        Ok(block) => (*block.block_at(0), None),
        Err(error) => ([UNREAD; BLOCK_BYTES], Some(error)),
    };
    let page = async |offset| match read(offset).await {
        (_, Some(_)) => Err(PageFault::Unreadable),
        (block, None) => SuperblockExtension::decode(&block),
    };
    let (first, no_magic) = read(SUPERBLOCK_OFFSET).await;
    let (last, no_record) = read(RECORD_BLOCK_OFFSET).await;
    let pages = [page(EXTENSION_OFFSETS[0]).await, page(EXTENSION_OFFSETS[1]).await];
    let digest = SuperblockExtension::newest(&pages).map(SuperblockExtension::digest);
    let record = decode_record(&last);
    let record_digest = record.ok().and_then(|record| record.digest);
    let is_foreign = digest.zip(record_digest).is_some_and(|(ours, its)| ours != its);
    let superblock = RawSuperblock {
        geometry,
        pages,
        magic: decode_magic(&first),
        record: record.and_then(|record| match is_foreign {
            true => Err(SuperblockFault::ForeignRecord { found: record.id.0 }),
            false => Ok(record.id),
        }),
        record_digest,
    };
    Ok((superblock, [no_magic, no_record]))
}

/// Reads and checks the superblock and its record.
///
/// # Errors
/// - The device cannot be read, has an impossible size, or is no cache device.
/// - Its record is invalid.
/// - As [`RawSuperblock::check_extension`].
pub async fn read_superblock(device: &Device, wanted: Use) -> Result<Superblock, LogError> {
    let superblock = |fault| LogError::new(device, LogErrorKind::Superblock { fault });
    let raw = examine_superblock(device).await?;
    raw.magic.map_err(superblock)?;
    raw.record.map_err(superblock)?;
    raw.check_extension(device, wanted)?;
    Ok(raw.or_no_record())
}
