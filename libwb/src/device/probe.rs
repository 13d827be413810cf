//! Opening devices: what they are, how large, who else uses them.

use super::held;
pub use super::identity::{Identity, identity};
use super::identity::{serial, sysfs_folder};
use crate::format::{SECTOR_BYTES, to_u64};
use crate::sys;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{EBUSY, EINVAL, EROFS};
use nix::sys::resource::{Resource, getrlimit};
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a device is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read, while nobody writes.
    Read,
    /// To read, whatever others do: what is read may change meanwhile.
    ReadUnlocked,
    /// To read and write, alone.
    Write,
}

/// Why a device cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system said no.
    #[error("{path}: cannot open: {}", in_words(cause))]
    System {
        /// The device.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Neither a block device nor a regular file.
    #[error("{path}: neither a block device nor a regular file")]
    NotADevice {
        /// The device.
        path: PathBuf,
    },
    /// Somebody else holds it.
    #[error(
        "{path}: in use (mounted, attached, or held by another program); see wbctl list, lsblk \
         and fuser"
    )]
    InUse {
        /// The device.
        path: PathBuf,
    },
    /// Somebody else uses it, and no lock shows that.
    #[error("{path}: in use: {by}")]
    Held {
        /// The device.
        path: PathBuf,
        /// Who, and how to end that.
        by: String,
    },
    /// It takes no writes, or nobody is to write to it.
    #[error("{path}: write-protected, and wb must write to it: {how}")]
    WriteProtected {
        /// The device.
        path: PathBuf,
        /// By what, and how to end that.
        how: String,
    },
    /// A file that this process may not write to its end.
    #[error(
        "{path}: {size} bytes, but this process may write files of {limit} bytes at most; raise \
         the limit (ulimit -f, or LimitFSIZE= of a unit)"
    )]
    FileSizeLimit {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// While it was opened, its path came to lead elsewhere.
    #[error(
        "{path}: another file or device is being put in its place; try again when that is done"
    )]
    Replaced {
        /// The device.
        path: PathBuf,
    },
    /// A file of an odd size.
    #[error("{path}: {size} bytes is no multiple of 512; was it truncated?")]
    Unaligned {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The two devices of a pair are one, by whatever names.
    #[error("{cache} and {backing} are the same device; cache and backing must be two")]
    SameDevice {
        /// Where the cache device was to be.
        cache: PathBuf,
        /// Where the backing device was to be.
        backing: PathBuf,
    },
    /// A backing device without room for anything.
    #[error("{path}: the backing device is empty (0 bytes)")]
    Empty {
        /// The device.
        path: PathBuf,
    },
    /// A block size that the format does not suit.
    #[error("{path}: logical blocks of {block_size} bytes are not supported, only 512 to 4096")]
    BlockSize {
        /// The device.
        path: PathBuf,
        /// Its logical block size in bytes.
        block_size: u32,
    },
}

/// Opens the cache device and the backing device of a pair, each for what it is needed for.
///
/// # Errors
/// As [`open`], and when the two are one, or the backing device is empty.
pub fn open_pair(
    cache: &Path,
    backing: &Path,
    [for_cache, for_backing]: [Access; 2],
) -> Result<(Opened, Opened), OpenError> {
    let same = || OpenError::SameDevice { cache: cache.into(), backing: backing.into() };
    let opened_backing = open(backing, for_backing)?;
    let opened_cache = match open(cache, for_cache) {
        Ok(opened) => opened,
        // The lock on the backing device is in the way: the two are one.
        Err(_) if matches!((identity(cache), identity(backing)), (Ok(a), Ok(b)) if a == b) => {
            return Err(same());
        }
        Err(error) => return Err(error),
    };
    if opened_cache.identity == opened_backing.identity {
        return Err(same());
    }
    if opened_backing.size == 0 {
        return Err(OpenError::Empty { path: backing.into() });
    }
    Ok((opened_cache, opened_backing))
}

/// What the system said, without the number that Rust adds to it.
fn in_words(cause: &io::Error) -> String {
    cause
        .raw_os_error()
        .map_or_else(|| cause.to_string(), |n| Errno::from_raw(n).desc().to_string())
}

/// A device, opened and locked.
#[derive(Debug)]
pub struct Opened {
    /// As the user named it.
    pub path: PathBuf,
    /// Open for direct I/O, where that works.
    pub(crate) file: File,
    /// Size in bytes.
    pub size: u64,
    /// The unit of I/O in bytes.
    pub block_size: u32,
    /// Which device it is.
    pub identity: Identity,
    /// What tells it from others wherever it is plugged in, for a block device that has such a
    /// thing; else empty.
    pub identity_text: String,
    /// Where the system keeps its statistics, for a block device.
    pub stat: Option<PathBuf>,
}

/// A program that has ended may have a device for a moment longer: io_uring lets go of it in the
/// background.
const BRIEFLY: Duration = Duration::from_millis(400);

/// Opens a block device or a regular file for direct I/O.
///
/// A block device that is opened to write is claimed exclusively (it must not be mounted), and
/// every device but an unlocked one is locked with `flock`, shared to read and exclusively to
/// write. What is opened to write must not be used by a loop device or as swap either, nor be
/// write-protected.
///
/// # Errors
/// Says which device, and what about it.
pub fn open(path: &Path, access: Access) -> Result<Opened, OpenError> {
    let started = Instant::now();
    loop {
        match open_at_once(path, access) {
            Err(OpenError::InUse { .. } | OpenError::Held { .. } | OpenError::Replaced { .. })
                if started.elapsed() < BRIEFLY =>
            {
                std::thread::sleep(BRIEFLY / 20);
            }
            done => return done,
        }
    }
}

fn open_at_once(path: &Path, access: Access) -> Result<Opened, OpenError> {
    let system = |cause: io::Error| match cause.raw_os_error() {
        Some(EBUSY) => OpenError::InUse { path: path.into() },
        Some(EROFS) => OpenError::WriteProtected { path: path.into(), how: in_words(&cause) },
        _ => OpenError::System { path: path.into(), cause },
    };
    let meta = std::fs::metadata(path).map_err(system)?;
    let is_block = meta.file_type().is_block_device();
    if !is_block && !meta.is_file() {
        return Err(OpenError::NotADevice { path: path.into() });
    }
    let exclusive =
        if is_block && access != Access::ReadUnlocked { OFlag::O_EXCL } else { OFlag::empty() };
    let open = |flags: OFlag| {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(access == Access::Write)
            .custom_flags((flags | exclusive).bits())
            .open(path)
    };
    let file = match open(OFlag::O_DIRECT) {
        // A filesystem without direct I/O: through the page cache, then.
        Err(e) if e.raw_os_error() == Some(EINVAL) && !is_block => open(OFlag::empty()),
        // Or with direct I/O in units that sector addresses do not fit.
        Ok(file) if !is_block && !direct_io_fits_sectors(&file) => open(OFlag::empty()),
        other => other,
    }
    .map_err(system)?;
    let size = if is_block {
        sys::block_device_size(&file).map_err(|e| system(e.into()))?
    } else {
        meta.len()
    };
    let block_size = if is_block { sys::logical_block_size(&file).map_err(system)? } else { 512 };
    if !size.is_multiple_of(to_u64(SECTOR_BYTES)) {
        return Err(OpenError::Unaligned { path: path.into(), size });
    }
    if !block_size.is_power_of_two() || !(512..=4096).contains(&block_size) {
        return Err(OpenError::BlockSize { path: path.into(), block_size });
    }
    match access {
        Access::ReadUnlocked => Ok(()),
        Access::Read => file.try_lock_shared(),
        Access::Write => file.try_lock(),
    }
    .map_err(|error| match error {
        TryLockError::WouldBlock => OpenError::InUse { path: path.into() },
        TryLockError::Error(cause) => system(cause),
    })?;
    if access == Access::Write {
        refuse_unwritable(path, &file, &meta)?;
        if let Some(by) = held::holder(path, &meta) {
            return Err(OpenError::Held { path: path.into(), by });
        }
    }
    // Before the lock was had, another may have been put in its place.
    let identity = Identity::of(&file.metadata().map_err(system)?);
    if super::identity::identity(path).map_err(system)? != identity {
        return Err(OpenError::Replaced { path: path.into() });
    }
    let sysfs = is_block.then(|| sysfs_folder(meta.rdev()));
    let identity_text = sysfs.as_deref().map_or_else(String::new, serial);
    let stat = sysfs.map(|folder| folder.join("stat"));
    Ok(Opened { path: path.into(), file, size, block_size, identity, identity_text, stat })
}

/// Refuses what the system lets us open to write, but that takes no writes or is not to.
fn refuse_unwritable(path: &Path, file: &File, meta: &Metadata) -> Result<(), OpenError> {
    let (path, shown) = (path.to_path_buf(), path.display());
    let protected = |how: String| Err(OpenError::WriteProtected { path: path.clone(), how });
    if meta.file_type().is_block_device() {
        let read_only = sys::is_read_only(file)
            .map_err(|cause| OpenError::System { path: path.clone(), cause: cause.into() })?;
        if read_only {
            return protected(format!(
                "the device is read-only. Unless that is a switch on it: blockdev --setrw {shown}"
            ));
        }
        return Ok(());
    }
    // Root may write to it all the same, but somebody has said that nobody is to.
    if meta.mode() & 0o222 == 0 {
        return protected(format!(
            "its mode lets nobody write. If that may change: chmod u+w {shown}"
        ));
    }
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if limit < meta.len() => {
            Err(OpenError::FileSizeLimit { path, size: meta.len(), limit })
        }
        _ => Ok(()),
    }
}

fn direct_io_fits_sectors(file: &File) -> bool {
    // A filesystem that does not say is believed: the kernel's oldest rule is the logical block
    // size, 512 nearly always.
    sys::direct_io_alignment(file)
        .is_none_or(|n| n > 0 && to_u64(SECTOR_BYTES).is_multiple_of(u64::from(n)))
}
