//! Opening devices: what they are, how large they are, and who else uses them.

use super::held;
pub use super::identity::{Identity, identity};
use super::identity::{prefers_durable_writes, queue_folder, serial, sysfs_folder};
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
    /// To read, while no other process writes.
    Read,
    /// To read without a lock. The data may change meanwhile.
    ReadUnlocked,
    /// To read and write, as the only user.
    Write,
}

/// Why a device cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The system refused.
    #[error("{path}: cannot open: {}", error_text(cause))]
    System {
        /// The device.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },
    /// Neither a block device nor a regular file.
    #[error("{path}: neither a block device nor a regular file")]
    NotADevice {
        /// The device.
        path: PathBuf,
    },
    /// Another process holds it.
    #[error(
        "{path}: in use (mounted, attached, or held by another program); see wbctl list, lsblk \
         and fuser"
    )]
    InUse {
        /// The device.
        path: PathBuf,
    },
    /// It is in use, though no lock shows that.
    #[error("{path}: in use: {by}")]
    Held {
        /// The device.
        path: PathBuf,
        /// By whom, and how to end that.
        by: String,
    },
    /// It rejects writes, or its mode forbids them.
    #[error("{path}: write-protected, and wb must write to it: {how}")]
    WriteProtected {
        /// The device.
        path: PathBuf,
        /// The reason, and how to end that.
        how: String,
    },
    /// The file is larger than this process may write.
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
    /// It is on an NBD server, and cannot be used.
    #[cfg(feature = "nbd-client")]
    #[error("{path}: {cause}")]
    Export {
        /// Its address.
        path: PathBuf,
        /// What is wrong.
        cause: super::nbd::LinkError,
    },
    /// The files for encrypted connections cannot be used.
    #[cfg(feature = "nbd-client")]
    #[error("{path}: {cause}")]
    Tls {
        /// The address of the export.
        path: PathBuf,
        /// What is wrong.
        cause: super::nbd::TlsError,
    },
    /// Its path changed to another file or device while it was opened.
    #[error(
        "{path}: another file or device is being put in its place; try again when that is done"
    )]
    Replaced {
        /// The device.
        path: PathBuf,
    },
    /// Its size is not a multiple of 512.
    #[error("{path}: {size} bytes is no multiple of 512; was it truncated?")]
    Unaligned {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The two devices of a pair are the same device.
    #[error("{cache} and {backing} are the same device; cache and backing must be two")]
    SameDevice {
        /// The path of the cache device.
        cache: PathBuf,
        /// The path of the backing device.
        backing: PathBuf,
    },
    /// The backing device has no space at all.
    #[error("{path}: the backing device is empty (0 bytes)")]
    Empty {
        /// The device.
        path: PathBuf,
    },
    /// The format does not support its block size.
    #[error("{path}: logical blocks of {block_size} bytes are not supported, only 512 to 4096")]
    BlockSize {
        /// The device.
        path: PathBuf,
        /// Its logical block size in bytes.
        block_size: u32,
    },
}

/// Opens the cache device and the backing device of a pair, each with its own access.
///
/// # Errors
/// As [`open`], and when both are the same device, or the backing device is empty.
pub fn open_pair(
    cache: &Path,
    backing: &Path,
    [for_cache, for_backing]: [Access; 2],
) -> Result<(Opened, Opened), OpenError> {
    let same = || OpenError::SameDevice { cache: cache.into(), backing: backing.into() };
    let opened_backing = open(backing, for_backing)?;
    let opened_cache = match open(cache, for_cache) {
        Ok(opened) => opened,
        // The lock on the backing device is the obstacle: both are the same device.
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

/// The system's error, without the number that Rust adds.
fn error_text(cause: &io::Error) -> String {
    cause
        .raw_os_error()
        .map_or_else(|| cause.to_string(), |n| Errno::from_raw(n).desc().to_string())
}

/// A device, opened and locked.
#[derive(Debug)]
pub struct Opened {
    /// The path as the user gave it.
    pub path: PathBuf,
    /// Open for direct I/O, if possible.
    pub(crate) file: File,
    /// Size in bytes.
    pub size: u64,
    /// The unit of I/O in bytes.
    pub block_size: u32,
    /// Which device it is.
    pub identity: Identity,
    /// What identifies a block device wherever it is plugged in; empty if it has nothing like that.
    pub identity_text: String,
    /// The file with its statistics, for a block device.
    pub stat: Option<PathBuf>,
    /// Whether a durable write takes less time than a write and a flush.
    pub prefers_durable_writes: bool,
    /// What users of a device on top of it should know.
    pub traits: Traits,
}

/// What users of a block device go by when they lay out data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// Physical sector size in bytes, if it is known.
    pub physical_sector_size: Option<u32>,
    /// Whether seeking takes time, as on a hard disk.
    pub rotational: bool,
}

impl Traits {
    /// The traits of the block device with this number. For a file, pass its filesystem's device.
    fn of(number: u64) -> Traits {
        let folder = queue_folder(number);
        let read =
            |file| std::fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u32>().ok();
        Traits {
            physical_sector_size: read("physical_block_size")
                .filter(|size| size.is_power_of_two() && (512..=1 << 20).contains(size)),
            rotational: read("rotational") == Some(1),
        }
    }
}

/// A device stays open a moment longer than its program: io_uring closes it in the background.
const BRIEFLY: Duration = Duration::from_millis(400);

/// Opens a block device or a regular file for direct I/O.
///
/// - A block device, unless it is opened unlocked, is claimed exclusively; it must not be mounted.
/// - Every device, unless it is opened unlocked, is locked with `flock`: shared to read,
///   exclusively to write.
/// - A device opened to write must not be used by a loop device or as swap, and must not be
///   write-protected.
///
/// # Errors
/// Says which device, and what is wrong with it.
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
        Some(EROFS) => OpenError::WriteProtected { path: path.into(), how: error_text(&cause) },
        _ => OpenError::System { path: path.into(), cause },
    };
    let meta = std::fs::metadata(path).map_err(system)?;
    let is_block = meta.file_type().is_block_device();
    if !is_block && !meta.is_file() {
        return Err(OpenError::NotADevice { path: path.into() });
    }
    let file = open_file(path, access, is_block).map_err(system)?;
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
    lock(&file, access).map_err(|error| match error {
        TryLockError::WouldBlock => OpenError::InUse { path: path.into() },
        TryLockError::Error(cause) => system(cause),
    })?;
    if access == Access::Write {
        refuse_unwritable(path, &file, &meta)?;
        if let Some(by) = held::holder(path, &meta) {
            return Err(OpenError::Held { path: path.into(), by });
        }
    }
    // Another device may have taken its place before the lock was taken.
    let identity = Identity::of(&file.metadata().map_err(system)?);
    if super::identity::identity(path).map_err(system)? != identity {
        return Err(OpenError::Replaced { path: path.into() });
    }
    let sysfs = is_block.then(|| sysfs_folder(meta.rdev()));
    let identity_text = sysfs.as_deref().map_or_else(String::new, serial);
    let prefers_durable_writes = sysfs.as_deref().is_some_and(prefers_durable_writes);
    let stat = sysfs.map(|folder| folder.join("stat"));
    let traits = Traits::of(if is_block { meta.rdev() } else { meta.dev() });
    Ok(Opened {
        path: path.into(),
        file,
        size,
        block_size,
        identity,
        identity_text,
        stat,
        prefers_durable_writes,
        traits,
    })
}

/// Opens a file for direct I/O if possible, and claims a block device exclusively.
fn open_file(path: &Path, access: Access, is_block: bool) -> io::Result<File> {
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
    match open(OFlag::O_DIRECT) {
        // The filesystem has no direct I/O: use the page cache.
        Err(e) if e.raw_os_error() == Some(EINVAL) && !is_block => open(OFlag::empty()),
        // Its direct I/O needs a larger alignment than sectors: use the page cache.
        Ok(file) if !is_block && !direct_io_fits_sectors(&file) => open(OFlag::empty()),
        other => other,
    }
}

/// Locks a file as long as it is open, without waiting.
fn lock(file: &File, access: Access) -> Result<(), TryLockError> {
    match access {
        Access::ReadUnlocked => Ok(()),
        Access::Read => file.try_lock_shared(),
        Access::Write => file.try_lock(),
    }
}

/// Refuses a device that the system opens to write, although it rejects writes or its mode forbids
/// them.
fn refuse_unwritable(path: &Path, file: &File, meta: &Metadata) -> Result<(), OpenError> {
    let (path, shown) = (path.to_path_buf(), path.display());
    let protected = |how: String| Err(OpenError::WriteProtected { path: path.clone(), how });
    if meta.file_type().is_block_device() {
        let read_only = sys::is_read_only(file)
            .map_err(|cause| OpenError::System { path: path.clone(), cause: cause.into() })?;
        if read_only {
            return protected(format!(
                "the device is read-only. If it has no write-protect switch: blockdev --setrw \
                 {shown}"
            ));
        }
        return Ok(());
    }
    // Root may write to it anyway, but the mode forbids that for everyone.
    if meta.mode() & 0o222 == 0 {
        return protected(format!(
            "its mode lets no user write. To allow writes: chmod u+w {shown}"
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
    // Without a report from the filesystem, assume that it fits: the usual alignment is the logical
    // block size, nearly always 512.
    sys::direct_io_alignment(file)
        .is_none_or(|n| n > 0 && to_u64(SECTOR_BYTES).is_multiple_of(u64::from(n)))
}
