//! A device that really fails below a real daemon: a file in a FUSE mount of the test. Its reads,
//! writes and flushes fail or hang when the test says so. It needs no device mapper.

use fuser::{
    BackgroundSession, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};
use libwb::format::{to_u64, to_usize};
use parking_lot::{Condvar, Mutex};
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

const NAME: &str = "device.img";
const FILE: INodeNo = INodeNo(2);
/// How long the kernel may cache the attributes of the file, which never change.
const FOREVER: Duration = Duration::from_secs(1 << 31);

/// What fails, and with EIO unless noted. By default, nothing.
#[derive(Clone, Debug, Default)]
pub struct FileFaults {
    /// Reads of any byte in this range.
    pub reads: Range<u64>,
    /// All writes. None of their data arrives.
    pub writes: bool,
    /// All writes too, but with ENOSPC, as of a sparse file on a full filesystem.
    pub full: bool,
    /// All flushes.
    pub flushes: bool,
    /// Writes of any byte in this range. They hang until the range changes.
    pub hanging_writes: Range<u64>,
    /// All writes and flushes. They hang until the fault is over.
    pub hangs: bool,
}

/// A file that fails on demand. Its mount goes away with this value.
pub struct FailingFile {
    /// The path under which the daemon opens the file.
    pub path: PathBuf,
    state: Arc<State>,
    _session: BackgroundSession,
}

/// A hang that ends with this value. Rust drops it before a daemon made earlier, so the daemon can
/// end.
pub struct Hang<'a>(&'a FailingFile);

impl Drop for Hang<'_> {
    fn drop(&mut self) {
        self.0.heal();
    }
}

#[derive(Default)]
struct State {
    faults: Mutex<FileFaults>,
    /// The faults have changed.
    changed: Condvar,
}

impl Drop for FailingFile {
    fn drop(&mut self) {
        // A hung request would keep the mount.
        self.heal();
    }
}

impl FailingFile {
    /// Shows the file `content` as one that can fail, in the new folder `on`.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn over(content: &Path, on: &Path) -> FailingFile {
        let file = File::options().read(true).write(true).open(content).expect("a file");
        let size = file.metadata().expect("a file").len();
        std::fs::create_dir(on).expect("a new folder");
        let state = Arc::<State>::default();
        let files = Files { file: Arc::new(file), size, state: state.clone() };
        let session = fuser::spawn_mount(files, on, &Config::default()).expect("a FUSE mount");
        FailingFile { path: on.join(NAME), state, _session: session }
    }

    /// Fails in this way alone from now on.
    pub fn fail(&self, faults: FileFaults) {
        *self.state.faults.lock() = faults;
        self.state.changed.notify_all();
    }

    /// Hangs writes and flushes as long as the value lives.
    pub fn hang(&self) -> Hang<'_> {
        self.fail(FileFaults { hangs: true, ..FileFaults::default() });
        Hang(self)
    }

    /// Hangs writes of any byte in a range as long as the value lives.
    pub fn hang_writes(&self, hanging_writes: Range<u64>) -> Hang<'_> {
        self.fail(FileFaults { hanging_writes, ..FileFaults::default() });
        Hang(self)
    }

    /// Works from now on.
    pub fn heal(&self) {
        self.fail(FileFaults::default());
    }
}

struct Files {
    file: Arc<File>,
    size: u64,
    state: Arc<State>,
}

impl Files {
    /// Answers now, or once the request no longer hangs.
    fn answer(
        &self,
        hangs: impl Fn(&FileFaults) -> bool + Send + 'static,
        answer: impl FnOnce(&FileFaults) + Send + 'static,
    ) {
        let faults = self.state.faults.lock().clone();
        if !hangs(&faults) {
            return answer(&faults);
        }
        let state = self.state.clone();
        std::thread::spawn(move || {
            let mut faults = state.faults.lock();
            while hangs(&faults) {
                state.changed.wait(&mut faults);
            }
            let faults = faults.clone();
            answer(&faults);
        });
    }

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
        // A write that hangs must not delay others.
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
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
        let bad = self.state.faults.lock().reads.clone();
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
        let (file, data) = (self.file.clone(), data.to_vec());
        let end = offset + to_u64(data.len());
        let overlaps = move |range: &Range<u64>| offset < range.end && range.start < end;
        let hangs = move |faults: &FileFaults| faults.hangs || overlaps(&faults.hanging_writes);
        self.answer(hangs, move |faults| match u32::try_from(data.len()) {
            _ if faults.full => reply.error(fuser::Errno::ENOSPC),
            Ok(length) if !faults.writes && file.write_all_at(&data, offset).is_ok() => {
                reply.written(length)
            }
            _ => reply.error(fuser::Errno::EIO),
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
        self.answer(
            |faults| faults.hangs,
            |faults| if faults.flushes { reply.error(fuser::Errno::EIO) } else { reply.ok() },
        );
    }
}
