//! Serves a volume as a loop device: a private FUSE mount holds a file, and the loop device stands
//! on that file.
//!
//! The mount is attached to no folder, and the loop device is set to clear itself. So neither
//! outlives the daemon, however it ends. A mount namespace of the daemon's own would hide the mount
//! as well. But where mounts are not shared, as in containers, it would keep every mount that it
//! copied from the system in use.
//!
//! The daemon holds its own loop device open, and the last process to close a block device writes
//! out its page cache. A killed daemon would write to itself there, and wait forever. So the FUSE
//! connection must end first: then the requests fail. When a process ends, the kernel closes its
//! descriptors from the highest number to the lowest; so the loop device must have the lowest
//! ([`Reserved`]).

use super::ServedVolume;
use crate::cache::Timed;
use crate::device::IoBuf;
use crate::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use crate::reactor::Handle;
use crate::sys;
use fuser::{
    BackgroundSession, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat, minor};
use rustix::io::{DupFlags, dup3};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

const FUSE: &str = "/dev/fuse";
/// The largest request that the kernel sends, in bytes.
const MAX_REQUEST: u32 = 1 << 20;
/// The maximum number of requests that the kernel keeps in flight.
const MAX_BACKGROUND: u16 = 256;
/// Threads that take requests. Each holds a buffer of 16 MiB of address space.
const THREADS: usize = 2;
/// The file's inode.
const FILE: INodeNo = INodeNo(2);
/// How long the kernel may cache what it was told about the file, which never changes.
const FOREVER: Duration = Duration::from_secs(1 << 31);
/// Attempts to get a free loop device, because another program may be faster.
const ATTEMPTS: u32 = 16;

/// How a volume is served.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Logical sector size of the loop device in bytes: 512 or 4096.
    pub sector_size: u32,
    /// Whether the loop device takes no writes.
    pub read_only: bool,
}

/// Why a volume cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct ServeError {
    /// The step that failed.
    pub what: String,
    /// The error of the system.
    pub cause: io::Error,
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> ServeError {
    let what = what.into();
    move |cause| ServeError { what, cause: cause.into() }
}

/// A descriptor reserved for the loop device. Its number is the lowest free one, and stays below
/// all that are opened later.
pub struct Reserved(OwnedFd);

impl Reserved {
    /// Reserves the number. Call it before anything else is opened that stays open.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn take() -> io::Result<Reserved> {
        Ok(Reserved(File::open("/dev/null")?.into()))
    }

    /// Makes the number refer to another file from now on.
    fn become_file(&mut self, file: &File) -> io::Result<()> {
        Ok(dup3(file, &mut self.0, DupFlags::CLOEXEC)?)
    }

    /// Fails if the kernel would close this descriptor before one of `others`.
    fn check_below(&self, others: &[RawFd]) -> io::Result<()> {
        match others.iter().all(|&other| self.0.as_raw_fd() < other) {
            true => Ok(()),
            false => Err(io::Error::other("its descriptor is above that of the FUSE connection")),
        }
    }
}

/// The descriptors of this process that lead to FUSE connections.
fn connections() -> io::Result<Vec<RawFd>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|file| file == Path::new(FUSE)) {
            found.extend(entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
        }
    }
    Ok(found)
}

/// A loop device that serves a volume.
pub struct LoopDevice {
    path: PathBuf,
    device: Reserved,
    connection: Option<Arc<Connection>>,
    /// Both live as long as the device: the mount, and the threads that answer its requests.
    _mount: OwnedFd,
    _session: BackgroundSession,
}

impl LoopDevice {
    /// Creates a FUSE file of that name, which shows as the loop device's backing file, and
    /// attaches a loop device to it. Before that, it passes the path to `announce`. If another
    /// program takes the device first, it announces the next one.
    ///
    /// # Errors
    /// Names the step that failed.
    pub fn attach<V: ServedVolume>(
        volume: V,
        runtime: &Handle,
        name: &str,
        options: Options,
        reserved: Reserved,
        announce: impl FnMut(&Path) -> io::Result<()>,
    ) -> Result<LoopDevice, ServeError> {
        let others = connections().map_err(failed("cannot look for FUSE connections"))?;
        let fuse = OpenOptions::new()
            .read(true)
            .write(true)
            .open(FUSE)
            .map_err(failed(format!("cannot open {FUSE}")))?;
        let mount = mount(&fuse).map_err(failed("cannot make a FUSE mount (root is needed)"))?;
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let files = VolumeFile { volume, runtime: runtime.clone(), name: name.into(), options };
        let session = Session::from_fd(files, OwnedFd::from(fuse), SessionACL::Owner, config)
            .and_then(Session::spawn)
            .map_err(failed("cannot start the FUSE session"))?;
        // A loop device on a file that is open only for reading is read-only.
        let access = if options.read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
        let flags = access | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
        let file = openat(&mount, name, flags, Mode::empty())
            .map_err(failed(format!("cannot open the FUSE file '{name}'")))?;
        let (path, device) = configure_loop_device(&File::from(file), options, reserved, announce)?;
        // The file is open, so the session has all its connections.
        let mut own = connections().map_err(failed("cannot look for FUSE connections"))?;
        own.retain(|number| !others.contains(number));
        device.check_below(&own).map_err(failed(format!("cannot serve {}", path.display())))?;
        // Without it, the device still ends, as long as nothing hangs.
        let connection =
            Connection::of(&mount).inspect_err(|e| tracing::warn!("no control of FUSE: {e}"));
        let connection = connection.ok().map(Arc::new);
        Ok(LoopDevice { path, device, connection, _mount: mount, _session: session })
    }

    /// The loop device's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What ends the device even if its threads hang, where the system offers that.
    pub fn connection(&self) -> Option<Arc<Connection>> {
        self.connection.clone()
    }

    /// Takes the loop device down. Its page cache must have been written out before. If a program
    /// still holds the device, its I/O fails once the volume is closed.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn detach(self) -> Result<(), ServeError> {
        // The mount and its session end with their last user, which may be later.
        sys::loop_clear(&self.device.0)
            .map_err(failed(format!("cannot clear {}", self.path.display())))
    }
}

/// The kernel's control over a FUSE connection.
pub struct Connection {
    abort: File,
}

impl Connection {
    fn of(mount: &OwnedFd) -> io::Result<Connection> {
        let number = minor(fstat(mount)?.st_dev);
        let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let control = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let abort = openat(&control, format!("{number}/abort").as_str(), flags, Mode::empty())?;
        Ok(Connection { abort: abort.into() })
    }

    /// Makes all current and later requests fail, even if the daemon's threads hang.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn abort(&self) -> io::Result<()> {
        (&self.abort).write_all(b"1")
    }
}

/// A FUSE mount that is attached to no folder. It ends with its last user.
fn mount(fuse: &File) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [
        ("source", "wb"),
        ("fd", &fuse.as_raw_fd().to_string()),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
    ] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn configure_loop_device(
    file: &File,
    options: Options,
    mut reserved: Reserved,
    mut announce: impl FnMut(&Path) -> io::Result<()>,
) -> Result<(PathBuf, Reserved), ServeError> {
    let control =
        File::open("/dev/loop-control").map_err(failed("cannot open /dev/loop-control"))?;
    let mut last = Errno::EBUSY;
    for _ in 0..ATTEMPTS {
        let number = sys::loop_get_free(&control).map_err(failed("no loop device is free"))?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .and_then(|device| reserved.become_file(&device))
            .map_err(failed(format!("cannot open {}", path.display())))?;
        announce(&path).map_err(failed(format!("cannot announce {}", path.display())))?;
        match sys::loop_configure(&reserved.0, file, options.sector_size) {
            Ok(()) => {
                // A write protection outlives what a loop device was used for before.
                if !options.read_only {
                    let refused = failed(format!("cannot write to {}", path.display()));
                    sys::allow_writes(&reserved.0).map_err(refused)?;
                }
                return Ok((path, reserved));
            }
            // Another program took it first.
            Err(Errno::EBUSY) => {}
            Err(cause) => return Err(failed(format!("cannot set up {}", path.display()))(cause)),
        }
        last = Errno::EBUSY;
    }
    Err(failed("cannot get a loop device")(last))
}

/// The backing file of the loop device, alone in its folder.
struct VolumeFile<V> {
    volume: V,
    runtime: Handle,
    name: String,
    options: Options,
}

impl<V: ServedVolume> VolumeFile<V> {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let is_folder = ino == INodeNo::ROOT;
        let size = if is_folder { 0 } else { self.volume.size() };
        FileAttr {
            ino,
            size,
            blocks: size / to_u64(SECTOR_BYTES),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_folder { FileType::Directory } else { FileType::RegularFile },
            perm: if is_folder { 0o700 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: self.options.sector_size,
            flags: 0,
        }
    }
}

/// The first sector of a request. The kernel sends only whole sectors, since it uses direct I/O.
fn sector(offset: u64, length: usize) -> Result<Sector, fuser::Errno> {
    let aligned =
        offset.is_multiple_of(to_u64(SECTOR_BYTES)) && length.is_multiple_of(SECTOR_BYTES);
    if aligned { Ok(Sector(offset / to_u64(SECTOR_BYTES))) } else { Err(fuser::Errno::EINVAL) }
}

fn to_fuse(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno as i32)
}

impl<V: ServedVolume> Filesystem for VolumeFile<V> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_ASYNC_READ;
        // An old kernel without one of them is only slower.
        let _ = config.add_capabilities(wanted & config.capabilities());
        let too_much = |nearest| {
            io::Error::other(format!("the FUSE connection cannot be set up (nearest: {nearest})"))
        };
        config.set_max_write(MAX_REQUEST).map_err(|n| too_much(u64::from(n)))?;
        config.set_max_background(MAX_BACKGROUND).map_err(|n| too_much(u64::from(n)))?;
        config.set_congestion_threshold(MAX_BACKGROUND).map_err(|n| too_much(u64::from(n)))?;
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == self.name.as_str() {
            reply.entry(&FOREVER, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(fuser::Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(
            FileHandle(0),
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        );
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let started = Instant::now();
        // A read may extend beyond the end; its result is shorter then.
        let length = u64::from(size).min(self.volume.size().saturating_sub(offset));
        let sector = match sector(offset, to_usize(length)) {
            Ok(sector) => sector,
            Err(errno) => return reply.error(errno),
        };
        let volume = self.volume.clone();
        self.runtime.run_now(async move {
            let read = volume.read(sector, IoBuf::zeroed(to_usize(length))).await;
            volume.took(Timed::Read, started.elapsed());
            match read {
                Ok(data) => reply.data(&data),
                Err(errno) => reply.error(to_fuse(errno)),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let started = Instant::now();
        let taken = sector(offset, data.len()).and_then(|sector| {
            Ok((sector, self.volume.write_ready(sector, data).map_err(to_fuse)?))
        });
        let (sector, done) = match taken {
            Ok(taken) => taken,
            Err(errno) => return reply.error(errno),
        };
        // At most MAX_REQUEST.
        let written = u32::try_from(data.len()).unwrap_or(MAX_REQUEST);
        if done == data.len() {
            self.volume.took(Timed::Write, started.elapsed());
            return reply.written(written);
        }
        let rest = data[done..].to_vec();
        let volume = self.volume.clone();
        self.runtime.run_now(async move {
            let rest =
                volume.write_rest(Sector(sector.0 + to_u64(done / SECTOR_BYTES)), rest).await;
            volume.took(Timed::Write, started.elapsed());
            match rest {
                Ok(()) => reply.written(written),
                Err(errno) => reply.error(to_fuse(errno)),
            }
        });
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let started = Instant::now();
        let volume = self.volume.clone();
        self.runtime.run_now(async move {
            let flushed = volume.flush().await;
            volume.took(Timed::Flush, started.elapsed());
            match flushed {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(to_fuse(errno)),
            }
        });
    }

    /// Called at each close; only [`Filesystem::fsync`] makes data durable.
    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    /// Handles discard and write-zeroes. If the volume does not support one, the kernel writes
    /// zeros where it must.
    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const KEEP_SIZE: i32 = nix::libc::FALLOC_FL_KEEP_SIZE;
        let keeps_space = match mode & !KEEP_SIZE {
            nix::libc::FALLOC_FL_PUNCH_HOLE => false,
            nix::libc::FALLOC_FL_ZERO_RANGE => true,
            _ => return reply.error(fuser::Errno::EOPNOTSUPP),
        };
        let sector = match sector(offset, to_usize(length)) {
            Ok(sector) => sector,
            Err(errno) => return reply.error(errno),
        };
        let volume = self.volume.clone();
        self.runtime.run_now(async move {
            let done = match keeps_space {
                true => volume.zero(sector, length).await,
                false => volume.discard(sector, length).await,
            };
            match done {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(to_fuse(errno)),
            }
        });
    }
}
