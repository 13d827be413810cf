//! A device that fails for real, below a real daemon: a file in a FUSE mount of the test's own, whose reads, writes and
//! flushes fail when the test says so. It needs no device mapper.

use fuser::{
    BackgroundSession, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    WriteFlags,
};
use libwb::format::{to_u64, to_usize};
use parking_lot::Mutex;
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

const NAME: &str = "device.img";
/// Requests that are answered at a time.
const THREADS: usize = 8;
const FILE: INodeNo = INodeNo(2);
/// How long the kernel may believe what it was told of the file, which never changes.
const FOREVER: Duration = Duration::from_secs(1 << 31);

/// What fails, with EIO unless it says otherwise. By default, nothing.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Reads of any byte in this range.
    pub reads: Range<u64>,
    /// All writes. None of their data arrives.
    pub writes: bool,
    /// All writes too, but with ENOSPC, as of a sparse file on a full filesystem.
    pub full: bool,
    /// All flushes.
    pub flushes: bool,
    /// Writes of any byte in this range do not fail but hang, until this range is another one.
    pub hanging_writes: Range<u64>,
}

/// A file that fails on demand. Its mount goes away with this value.
pub struct FailingFile {
    /// The file, as the daemon is to open it.
    pub path: PathBuf,
    faults: Arc<Mutex<Faults>>,
    _session: BackgroundSession,
}

impl FailingFile {
    /// Shows the file `content` as one that can fail, in a new folder `on`.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn over(content: &Path, on: &Path) -> FailingFile {
        let file = File::options().read(true).write(true).open(content).expect("a file");
        let size = file.metadata().expect("a file").len();
        std::fs::create_dir(on).expect("a new folder");
        let faults = Arc::<Mutex<Faults>>::default();
        let files = Files { file, size, faults: faults.clone() };
        let mut config = Config::default();
        // One that hangs must not keep the others waiting.
        config.n_threads = Some(THREADS);
        let session = fuser::spawn_mount(files, on, &config).expect("a FUSE mount");
        FailingFile { path: on.join(NAME), faults, _session: session }
    }

    /// Fails from now on, and in no other way.
    pub fn fail(&self, faults: Faults) {
        *self.faults.lock() = faults;
    }

    /// Writes of any byte in a range hang, until the value that this returns is dropped.
    pub fn hang(&self, hanging_writes: Range<u64>) -> Hanging<'_> {
        self.fail(Faults { hanging_writes, ..Faults::default() });
        Hanging(self)
    }

    /// Works from now on.
    pub fn heal(&self) {
        self.fail(Faults::default());
    }
}

/// Writes hang as long as this lives. To be made after the daemon that it hangs, so that it goes
/// away first.
pub struct Hanging<'a>(&'a FailingFile);

impl Drop for Hanging<'_> {
    fn drop(&mut self) {
        self.0.heal();
    }
}

struct Files {
    file: File,
    size: u64,
    faults: Arc<Mutex<Faults>>,
}

impl Files {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let is_folder = ino == INodeNo::ROOT;
        FileAttr {
            ino,
            size: if is_folder { 0 } else { self.size },
            blocks: 0,
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
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Files {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&FOREVER, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(fuser::Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
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
        let length = u64::from(size).min(self.size.saturating_sub(offset));
        let bad = self.faults.lock().reads.clone();
        let mut data = vec![0; to_usize(length)];
        let fails = offset < bad.end && bad.start < offset + length;
        if fails || self.file.read_exact_at(&mut data, offset).is_err() {
            return reply.error(fuser::Errno::EIO);
        }
        reply.data(&data);
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
        let hangs = || {
            let range = self.faults.lock().hanging_writes.clone();
            offset < range.end && range.start < offset + to_u64(data.len())
        };
        while hangs() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let Faults { writes: fails, full, .. } = *self.faults.lock();
        if full {
            return reply.error(fuser::Errno::ENOSPC);
        }
        match u32::try_from(data.len()) {
            Ok(length) if !fails && self.file.write_all_at(data, offset).is_ok() => reply.written(length),
            _ => reply.error(fuser::Errno::EIO),
        }
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        if self.faults.lock().flushes { reply.error(fuser::Errno::EIO) } else { reply.ok() }
    }
}
