//! Makes, mounts and checks filesystems on a volume, and writes files that prove to be whole.

use crate::{LoopDevice, system, volume::Attached};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tempfile::TempDir;

/// A kind of filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// ext4
    Ext4,
    /// XFS
    Xfs,
}

impl Filesystem {
    /// The programs that make and check it.
    pub fn programs(self) -> [&'static str; 2] {
        match self {
            Filesystem::Ext4 => ["mkfs.ext4", "e2fsck"],
            Filesystem::Xfs => ["mkfs.xfs", "xfs_repair"],
        }
    }

    /// Makes one.
    ///
    /// # Panics
    /// When that fails.
    pub fn make(self, device: &Path) {
        let quietly: &[&str] = if self == Filesystem::Ext4 { &["-q", "-F"] } else { &["-q", "-f"] };
        succeeds(Command::new(self.programs()[0]).args(quietly).arg(device));
    }

    /// Checks one that is not mounted, without changing it.
    ///
    /// # Panics
    /// When it is not clean.
    pub fn check(self, device: &Path) {
        let options: &[&str] = if self == Filesystem::Ext4 { &["-f", "-n"] } else { &["-n"] };
        succeeds(Command::new(self.programs()[1]).args(options).arg(device));
    }

    /// Mounts an image of a filesystem read-only, and calls `body` with the folder.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn with_image<T>(self, image: &Path, body: impl FnOnce(&Path) -> T) -> T {
        let on = TempDir::with_prefix("wb-test-image-").expect("a temporary folder");
        let device = LoopDevice::attach(image).expect("a loop device");
        // Does not replay the journal: the image must be clean as it is.
        let options = if self == Filesystem::Ext4 { "ro,noload" } else { "ro,norecovery" };
        succeeds(Command::new("mount").args(["-o", options]).arg(&device.path).arg(on.path()));
        let _mounted = Mounted(on.path());
        body(on.path())
    }
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        unmount(self.0);
    }
}

/// Unmounts a folder, even if it is in use.
pub fn unmount(on: &Path) {
    let plain = Command::new("umount").arg(on).output();
    if !plain.is_ok_and(|output| output.status.success()) {
        let _ = Command::new("umount").arg("--lazy").arg(on).status();
    }
}

/// Runs a program of the system.
///
/// # Panics
/// When it fails.
pub fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

/// Whether a program of the system is there.
pub fn has_program(name: &str) -> bool {
    system("sh", &["-c", &format!("command -v {name}")]).is_some()
}

/// A thread that writes files with known content and makes each durable. It goes on until it fails
/// or is stopped.
pub struct Writer {
    thread: JoinHandle<()>,
    /// Files that are durable.
    durable: Arc<Mutex<u32>>,
    stop: Arc<Mutex<bool>>,
}

impl Writer {
    /// Starts to write `0`, `1`, `2` … in a folder.
    pub fn start(dir: &Path) -> Writer {
        let (durable, stop) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(false)));
        let (dir, count, stopped) = (dir.to_path_buf(), durable.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for n in 0.. {
                if *stopped.lock().expect("a lock") || write_durably(&dir, n).is_err() {
                    break;
                }
                *count.lock().expect("a lock") = n + 1;
            }
        });
        Writer { thread, durable, stop }
    }

    /// How many files are durable by now.
    ///
    /// # Panics
    /// When the writer panicked.
    pub fn durable(&self) -> u32 {
        *self.durable.lock().expect("a lock")
    }

    /// Waits for the writer to end, and returns how many files are durable.
    ///
    /// # Panics
    /// When the writer panicked.
    pub fn end(self) -> u32 {
        *self.stop.lock().expect("a lock") = true;
        self.thread.join().expect("a writer that does not panic");
        *self.durable.lock().expect("a lock")
    }
}

fn write_durably(dir: &Path, n: u32) -> io::Result<()> {
    let mut file = File::create(file_name(dir, n))?;
    file.write_all(&content(n))?;
    file.sync_all()?;
    File::open(dir)?.sync_all()
}

fn file_name(dir: &Path, n: u32) -> PathBuf {
    dir.join(n.to_string())
}

/// The content of a file: one byte to 200 KB, no two files alike.
fn content(n: u32) -> Vec<u8> {
    let length = 1 + u64::from(n) * 7919 % 200_000;
    (0..length)
        .flat_map(|i| (u64::from(n) << 32 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .step_by(8)
        .collect()
}

/// Checks that the first `count` files of a [`Writer`] are whole.
///
/// # Panics
/// When one is not.
pub fn check_files(dir: &Path, count: u32) {
    for n in 0..count {
        let found =
            std::fs::read(file_name(dir, n)).unwrap_or_else(|e| panic!("file {n} of {count}: {e}"));
        assert!(found == content(n), "file {n} of {count} is not whole");
    }
}

/// Runs fio with data that verifies itself. It writes one sector to 1 MiB in random order, 32
/// requests at a time, and reads all of it again.
///
/// # Panics
/// When it finds a difference.
pub fn fio_verify(dir: &Path, bytes: u64, sector_size: &str) {
    let settings = [
        "--name=verify",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=32",
        "--rw=randwrite",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randseed=20260",
    ];
    let mut fio = Command::new("fio");
    fio.args(settings).arg(format!("--size={bytes}")).arg("--directory").arg(dir);
    fio.arg(format!("--bsrange={sector_size}-1M")).arg(format!("--blockalign={sector_size}"));
    succeeds(&mut fio);
}

impl Attached<'_> {
    /// The block device's logical sector size.
    ///
    /// # Panics
    /// When it is not there.
    pub fn sector_size(&self) -> String {
        succeeds(Command::new("blockdev").arg("--getss").arg(&self.device)).trim().into()
    }
}
