//! A volume as the only file of a FUSE filesystem. The reactor reads the kernel's requests, and
//! answers in the same turn what needs no waiting.

mod wire;

use super::request::{Answer, Outcome, Request, carry_out, write};
use super::{Options, Owner, Part, ServeError, Volume, failed};
use crate::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use crate::reactor::{Handle, Readiness, Target};
use crate::runtime::Runtime;
use futures_lite::future::{pending, yield_now};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat, minor};
use rustix::event::epoll;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use wire::{Attributes, Call, Limits, Message};

const FUSE: &str = "/dev/fuse";
const LIMITS: Limits = Limits { max_request: 1 << 20, in_flight: 256 };
/// A message is a request and its data, with room for the headers.
const MAX_MESSAGE: usize = LIMITS.max_request as usize + 4096;
/// How many requests are taken before other tasks get a turn.
const BURST: u32 = 16;
/// The inodes of the folder and of the file in it.
const FOLDER: u64 = 1;
const FILE: u64 = 2;

/// What can be made to take no more requests.
pub(super) trait Hold: Send + Sync {
    fn hold(&self);
}

/// A connection to the kernel, with a mount that is attached to no folder.
pub(super) struct Connected {
    /// It ends with its last user.
    pub(super) mount: OwnedFd,
    pub(super) requests: Arc<dyn Hold>,
    /// Whether the kernel hands requests out again.
    pub(super) can_resume: bool,
    /// The number of the descriptor that holds the connection.
    pub(super) descriptor: RawFd,
}

/// Makes a filesystem whose only file, `name`, is the volume. Returns the file, open for direct
/// I/O, as well. The owner hears of a loss once no requests come any more: the mount has ended, or
/// the connection failed.
///
/// # Errors
/// Names the step that failed.
pub(super) fn connect<V: Volume>(
    volume: V,
    runtime: &Handle,
    name: &str,
    options: Options,
    owner: Arc<impl Owner>,
) -> Result<(Connected, File), ServeError> {
    let fuse = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(FUSE)
        .map_err(failed(format!("cannot open {FUSE}")))?;
    let descriptor = fuse.as_raw_fd();
    let mount = mount(&fuse).map_err(failed("cannot make a FUSE mount (root is needed)"))?;
    let keep = |part, kept| owner.keep(part, kept).map_err(failed("cannot hand over a FUSE mount"));
    keep(Part::Fuse, fuse.as_fd())?;
    keep(Part::Mount, mount.as_fd())?;
    let files = VolumeFile::serving(volume, runtime, name, options, fuse, owner)?;
    // A loop device on a file that is open only for reading is read-only.
    let access = if options.read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    let flags = access | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
    let file = openat(&mount, name, flags, Mode::empty())
        .map_err(failed(format!("cannot open the FUSE file '{name}'")))?;
    // The kernel has said so before it opened the file.
    let can_resume = files.can_resume.load(Ordering::SeqCst);
    Ok((Connected { mount, requests: files, can_resume, descriptor }, file.into()))
}

/// Serves a filesystem that [`connect`] has made in another process. All requests that were taken
/// there and not answered come again.
///
/// # Errors
/// Names the step that failed.
pub(super) fn resume<V: Volume>(
    volume: V,
    runtime: &Handle,
    name: &str,
    options: Options,
    fuse: File,
    mount: OwnedFd,
    owner: Arc<impl Owner>,
) -> Result<Connected, ServeError> {
    let descriptor = fuse.as_raw_fd();
    (&fuse)
        .write_all(&wire::resend())
        .map_err(failed("cannot get the requests of an earlier server"))?;
    let requests = VolumeFile::serving(volume, runtime, name, options, fuse, owner)?;
    Ok(Connected { mount, requests, can_resume: true, descriptor })
}

/// A file that can be read when the connection can. If the ring waited for the connection itself,
/// it would hold it: the connection would not end when a killed process closes its descriptor, and
/// that process might wait for the end, see [`Reserved`](super::loopdev::Reserved).
fn watch(fuse: &File) -> rustix::io::Result<File> {
    let watching = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&watching, fuse, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    Ok(watching.into())
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

/// The kernel's control over a FUSE connection.
pub struct Connection {
    abort: File,
}

impl Connection {
    pub(super) fn of(mount: &OwnedFd) -> io::Result<Connection> {
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

/// The file, alone in its folder.
struct VolumeFile<V> {
    volume: V,
    runtime: Handle,
    connection: Target,
    /// See [`watch`].
    news: Target,
    name: String,
    options: Options,
    /// See [`Connected::can_resume`].
    can_resume: AtomicBool,
    /// No more requests are taken or answered.
    is_held: AtomicBool,
}

impl<V: Volume> Hold for VolumeFile<V> {
    fn hold(&self) {
        self.is_held.store(true, Ordering::SeqCst);
    }
}

impl<V: Volume> VolumeFile<V> {
    /// Begins to take the requests of a connection.
    fn serving(
        volume: V,
        runtime: &Handle,
        name: &str,
        options: Options,
        fuse: File,
        owner: Arc<impl Owner>,
    ) -> Result<Arc<VolumeFile<V>>, ServeError> {
        let news = Target::new(watch(&fuse).map_err(failed(format!("cannot watch {FUSE}")))?);
        let files = Arc::new(VolumeFile {
            volume,
            runtime: runtime.clone(),
            connection: Target::new(fuse),
            news,
            name: name.into(),
            options,
            can_resume: AtomicBool::new(false),
            is_held: AtomicBool::new(false),
        });
        let serving = files.clone();
        runtime.spawn(Box::pin(async move {
            let why = serving.serve().await;
            owner.lost(why.desc());
        }));
        Ok(files)
    }

    /// Takes requests until the connection ends. Returns why it did: `ENODEV` when the mount ended.
    async fn serve(self: &Arc<Self>) -> Errno {
        // Each page is there before the kernel copies a request into it. If this process died while
        // the kernel waited for a page, the request would fail, and not come again.
        let mut buffer = vec![0; MAX_MESSAGE];
        buffer.fill(u8::MAX);
        let mut taken = 0;
        loop {
            if self.is_held.load(Ordering::SeqCst) {
                return pending().await;
            }
            match self.connection.file().read(&mut buffer) {
                Ok(length) => {
                    self.take(&buffer[..length]);
                    taken += 1;
                    if taken % BURST == 0 {
                        yield_now().await;
                    }
                }
                Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                    Errno::EAGAIN => {
                        if let Err(errno) =
                            self.runtime.ready(&self.news, Readiness::Readable).await
                        {
                            return errno;
                        }
                    }
                    // A request was interrupted before it could be taken.
                    Errno::EINTR | Errno::ENOENT => {}
                    errno => return errno,
                },
            }
        }
    }

    /// Answers a request, or starts a task that will.
    fn take(self: &Arc<Self>, bytes: &[u8]) {
        let Some(Message { unique, node, call }) = Message::decode(bytes) else {
            tracing::error!(
                "cannot understand a FUSE message of {} bytes from the kernel",
                bytes.len()
            );
            if let Some(unique) = wire::unique(bytes) {
                self.answer(unique, Err(Errno::EIO));
            }
            return;
        };
        match call {
            Call::Init { major, readahead, flags, can_resend } if major >= 7 => {
                self.can_resume.store(can_resend, Ordering::SeqCst);
                self.answer(unique, Ok(&wire::init(readahead, flags, LIMITS)));
            }
            Call::Init { .. } => self.answer(unique, Err(Errno::EPROTO)),
            Call::Lookup { name } if name == self.name.as_bytes() => {
                self.answer(unique, Ok(&self.attributes(FILE).entry()));
            }
            Call::Lookup { .. } => self.answer(unique, Err(Errno::ENOENT)),
            Call::Attributes => self.answer(unique, Ok(&self.attributes(node).encode())),
            Call::Open => self.answer(unique, Ok(&wire::opened())),
            Call::Statistics => self.answer(unique, Ok(&wire::statistics())),
            Call::Close => self.answer(unique, Ok(&[])),
            Call::Forget => {}
            Call::Unknown => self.answer(unique, Err(Errno::ENOSYS)),
            Call::Write { offset, data } => self.write(unique, offset, data),
            Call::Read { offset, size } => {
                // A read may extend beyond the end; its result is shorter then.
                let length = u64::from(size.min(LIMITS.max_request))
                    .min(self.volume.size().saturating_sub(offset));
                let request = whole_sectors(offset, length)
                    .map(|sector| Request::Read { sector, length: to_usize(length) });
                self.begin(unique, request);
            }
            Call::Sync => self.begin(unique, Ok(Request::Flush)),
            Call::Allocate { offset, length, mode } => {
                self.begin(unique, allocation(offset, length, mode));
            }
        }
    }

    fn write(self: &Arc<Self>, unique: u64, offset: u64, data: &[u8]) {
        let length = data.len();
        let done = match whole_sectors(offset, to_u64(length)) {
            Ok(sector) => write(&self.volume, sector, data, false),
            Err(errno) => Answer::Ready(Err(errno)),
        };
        let file = self.clone();
        let answer = move |outcome: Outcome| {
            let written = wire::written(length);
            file.answer(unique, outcome.as_ref().map(|_| &written[..]).map_err(|errno| *errno));
        };
        match done {
            Answer::Ready(outcome) => answer(outcome),
            Answer::Later(rest) => self.runtime.run_now(async move { answer(rest.await) }),
        }
    }

    fn begin(self: &Arc<Self>, unique: u64, request: Result<Request, Errno>) {
        let request = match request {
            Ok(request) => request,
            Err(errno) => return self.answer(unique, Err(errno)),
        };
        let (file, volume) = (self.clone(), self.volume.clone());
        self.runtime.run_now(async move {
            match carry_out(volume, request).await {
                Ok(data) => file.answer(unique, Ok(data.as_deref().unwrap_or_default())),
                Err(errno) => file.answer(unique, Err(errno)),
            }
        });
    }

    fn answer(&self, unique: u64, outcome: Result<&[u8], Errno>) {
        if self.is_held.load(Ordering::SeqCst) {
            return;
        }
        let data = outcome.unwrap_or_default();
        let header = wire::answer(unique, outcome.map(drop), data.len());
        let parts = [IoSlice::new(&header), IoSlice::new(data)];
        // It fails only where no one waits for the answer: the request was interrupted, or the
        // connection has ended.
        let _ = self.connection.file().write_vectored(&parts);
    }

    fn attributes(&self, node: u64) -> Attributes {
        let (size, mode) = match node {
            FOLDER => (0, nix::libc::S_IFDIR | 0o700),
            _ => (self.volume.size(), nix::libc::S_IFREG | 0o600),
        };
        Attributes { node, size, mode, unit: self.options.sector_size }
    }
}

/// The first sector of a request. The kernel sends only whole sectors.
fn whole_sectors(offset: u64, length: u64) -> Result<Sector, Errno> {
    let unit = to_u64(SECTOR_BYTES);
    let is_whole = offset.is_multiple_of(unit) && length.is_multiple_of(unit);
    if is_whole { Ok(Sector(offset / unit)) } else { Err(Errno::EINVAL) }
}

/// Understands `fallocate`, as loop devices use it for discards and zeros. If the volume does not
/// support one, the kernel writes zeros where it must.
fn allocation(offset: u64, length: u64, mode: u32) -> Result<Request, Errno> {
    let sector = whole_sectors(offset, length)?;
    match mode.cast_signed() & !nix::libc::FALLOC_FL_KEEP_SIZE {
        nix::libc::FALLOC_FL_PUNCH_HOLE => Ok(Request::Discard { sector, length }),
        nix::libc::FALLOC_FL_ZERO_RANGE => Ok(Request::Zero { sector, length }),
        _ => Err(Errno::EOPNOTSUPP),
    }
}
