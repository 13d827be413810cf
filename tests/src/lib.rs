//! What the end-to-end tests share: the programs, the golden devices, damage, and loop devices.
//!
//! A test that cannot run here must say so with [`skip!`], and not pass silently.

use libwb::device::IoBuf;
use libwb::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, Metablock, SUPERBLOCK_REGION_BYTES, SegmentId,
    encode_header, to_u64, to_usize,
};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub mod bit_flip;
mod certificates;
pub mod crafted;
pub mod crashed;
pub mod damage_script;
mod failing;
mod filesystem;
pub mod fuzzed;
pub mod fuzzed_head;
pub mod fuzzed_nbd;
mod nbd_server;
mod process;
pub mod recovered_view;
pub mod sim;
mod volume;

pub use certificates::certificates;
pub use failing::{FailingFile, FileFaults, Hang};
pub use filesystem::{Filesystem, Writer, check_files, fio_verify, has_program, succeeds, unmount};
pub use nbd_server::{NbdServer, free_port};
pub use volume::{Attached, PATIENCE, Volume};

/// Bytes of a mebibyte.
pub const MIB: u64 = 1 << 20;

/// The devices in `tests/golden`. The real kernel module wrote each of them.
pub const GOLDEN: [&str; 9] = [
    "fresh",
    "few-1",
    "partial-1",
    "lapped-1",
    "unflushed-1",
    "readcache-1",
    "sbrecord-1",
    "cleaned-1",
    "around-1",
];

/// The id of a user and a group that own nothing.
pub const NOBODY: u32 = 65534;

/// Ends the test as skipped: prints `SKIPPED test-name: reason` on standard error, and appends that
/// line to the file that `WB_SKIP_LOG` names.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::note_skip(&format!($($reason)*));
        return;
    }};
}

/// What [`skip!`] does before it ends the test.
pub fn note_skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("SKIPPED {}: {reason}\n", thread.name().unwrap_or("?"));
    // The handle, unlike eprint!, is not captured by the test runner.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(log) = std::env::var_os("WB_SKIP_LOG") {
        let mut log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(log)
            .expect("the file in WB_SKIP_LOG");
        log.write_all(line.as_bytes()).expect("writing to the file in WB_SKIP_LOG");
    }
}

/// Ends the test as skipped unless this machine can serve volumes and has the named programs.
#[macro_export]
macro_rules! needs_serving {
    ($($program:expr),* $(,)?) => {
        if let Some(why) = $crate::what_is_missing(&[$($program),*]) {
            $crate::skip!("{why}");
        }
    };
}

/// What [`needs_serving!`] finds missing.
pub fn what_is_missing(programs: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    let device =
        ["/dev/fuse", "/dev/loop-control"].into_iter().find(|path| File::open(path).is_err());
    let program = programs.iter().find(|program| !has_program(program));
    device.or(program.copied()).map(|missing| format!("needs {missing}"))
}

/// How to run the test of this thread alone.
pub fn how_to_repeat() -> String {
    let exe = std::env::current_exe().unwrap_or_default();
    let file = exe.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let target = file.rsplit_once('-').map_or(file.as_str(), |(target, _hash)| target);
    let thread = std::thread::current();
    format!(
        "cargo test -p wb-tests --test {target} {} -- --exact --nocapture",
        thread.name().unwrap_or("")
    )
}

/// Waits until a condition holds; returns false if it does not hold within [`PATIENCE`].
pub fn wait_for(mut so: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while !so() {
        if started.elapsed() > PATIENCE {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// The path of one of the workspace's programs, which `cargo test --workspace` and `cargo build
/// --workspace` put beside the test programs. Testing this package alone does not build them again.
///
/// # Panics
/// When it has not been built.
pub fn bin(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of the test program");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps");
    let program = profile.join(name);
    assert!(program.exists(), "{} is not there: build the workspace first", program.display());
    program
}

/// The text of a file in `dist`, with the paths of installed programs replaced by those of the
/// built ones.
///
/// # Panics
/// When the file does not name a program.
pub fn dist(file: &str, programs: &[&str]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist").join(file);
    let mut text = std::fs::read_to_string(path).expect("a file in dist");
    for program in programs {
        let installed = format!("/usr/bin/{program}");
        assert!(text.contains(&installed), "{installed} is not in {text}");
        text = text.replace(&installed, bin(program).to_str().expect("UTF-8"));
    }
    text
}

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Runs a command to its end.
    ///
    /// # Panics
    /// When it cannot be started, hangs, or is ended by a signal.
    pub fn of(command: Command) -> Outcome {
        let name = format!("{command:?}");
        let output = assert_cmd::Command::from_std(command).timeout(PATIENCE).output();
        let output = output.unwrap_or_else(|e| panic!("{name}: {e}"));
        let text = |bytes| String::from_utf8(bytes).expect("output in UTF-8");
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        let code = output.status.code();
        Outcome {
            code: code.unwrap_or_else(|| panic!("{name} hangs or was killed: {stdout}{stderr}")),
            stdout,
            stderr,
        }
    }

    /// The first line of standard output, or an empty text.
    pub fn first_line(&self) -> &str {
        self.stdout.lines().next().unwrap_or_default()
    }

    /// Standard output as one JSON value.
    ///
    /// # Panics
    /// When it is not JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// Runs one of the programs to its end. The program keeps no notes about caches.
///
/// # Panics
/// When it cannot be started, hangs, or is ended by a signal.
pub fn run<A: AsRef<std::ffi::OsStr>>(program: &str, args: impl IntoIterator<Item = A>) -> Outcome {
    let mut command = Command::new(bin(program));
    command.env("WB_STATE_DIR", "").args(args);
    Outcome::of(command)
}

/// Runs one of the programs to its end, as [`run`], with arguments that may be texts or references
/// to paths.
#[macro_export]
macro_rules! wb {
    ($program:expr $(, $arg:expr)* $(,)?) => {
        $crate::run($program, [$(::std::ffi::OsString::from($arg)),*])
    };
}

/// A `wbctl` command for a volume, run by an ordinary user who owns nothing. If the test does not
/// run as root, its own user runs the command. If only root can reach the programs, the command
/// runs copies of them beside the volume.
///
/// # Panics
/// When they cannot be copied.
pub fn as_nobody(volume: &Volume, args: &[&str]) -> Command {
    let wanted = volume.command(args);
    if !nix::unistd::geteuid().is_root() {
        return wanted;
    }
    let can_run = |program: &Path| {
        let mut version = Command::new(program);
        version.arg("--version").uid(NOBODY).gid(NOBODY).stdout(Stdio::null());
        version.status().is_ok_and(|status| status.success())
    };
    let mut program = bin("wbctl");
    if !can_run(&program) {
        program = volume.path("wbctl");
        // wbctl create runs the other one.
        for name in ["wbctl", "wbformat"] {
            let copy = volume.path(name);
            if !copy.exists() {
                let linked = std::fs::hard_link(bin(name), &copy);
                linked
                    .or_else(|_| std::fs::copy(bin(name), &copy).map(drop))
                    .expect("room for a program");
            }
        }
        // Another thread's new process may still have the copy open for writing, which prevents
        // execution.
        assert!(wait_for(|| can_run(&program)), "{} cannot be run by others", program.display());
    }
    let mut command = Command::new(program);
    command.envs(wanted.get_envs().filter_map(|(key, value)| Some((key, value?))));
    command.args(args).uid(NOBODY).gid(NOBODY);
    command
}

/// A command whose shell first runs `shell`, such as to set a limit.
pub fn after(shell: &str, command: &Command) -> Command {
    let mut inside = Command::new("sh");
    inside.args(["-c", &format!("{shell} && exec \"$@\""), "sh"]).arg(command.get_program());
    inside.args(command.get_args());
    inside.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    inside
}

/// Runs a program of the system; `None` if it is missing or fails.
pub fn system(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A copy of a golden pair of devices, removed with this value.
pub struct Golden {
    /// The cache device.
    pub cache: PathBuf,
    /// The backing device.
    pub backing: PathBuf,
    _dir: TempDir,
}

/// Unpacks a golden pair.
///
/// # Panics
/// When it is not there.
pub fn golden(name: &str) -> Golden {
    let dir = TempDir::new().expect("a temporary folder");
    let unpack = |which: &str| {
        let path = dir.path().join(which);
        std::fs::write(&path, golden_bytes(name, which)).expect("room for an image");
        path
    };
    Golden { cache: unpack("cache.img"), backing: unpack("backing.img"), _dir: dir }
}

/// The content of one device, `cache.img` or `backing.img`, of a golden pair.
///
/// # Panics
/// When it is not there.
pub fn golden_bytes(name: &str, which: &str) -> Vec<u8> {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
        .join(format!("{which}.zst"));
    let packed = File::open(&packed).unwrap_or_else(|e| panic!("{}: {e}", packed.display()));
    zstd::stream::decode_all(packed).expect("an image packed with zstd")
}

/// A file of zeros in a folder.
///
/// # Panics
/// When it cannot be made.
pub fn zeros(dir: &TempDir, name: &str, bytes: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).and_then(|file| file.set_len(bytes)).expect("a new file");
    path
}

/// The SHA-256 of a file or device, in hexadecimal.
///
/// # Panics
/// When it cannot be read.
pub fn sha256(path: &Path) -> String {
    let mut file = File::open(path).expect("a file to read");
    let mut hasher = Sha256::new();
    let mut buf = vec![0; 1 << 20];
    loop {
        match file.read(&mut buf).expect("a file to read") {
            0 => return hex(hasher),
            n => hasher.update(&buf[..n]),
        }
    }
}

/// Writes bytes over part of a file or device.
///
/// # Panics
/// When it cannot be written.
pub fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("a file to write");
    file.write_all_at(bytes, offset).expect("writing to a file");
}

/// Flips one bit of a file or device.
///
/// # Panics
/// When it cannot be read or written.
pub fn flip_bit(path: &Path, offset: u64) {
    let mut file = OpenOptions::new().read(true).write(true).open(path).expect("a file to write");
    let mut byte = [0];
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_exact(&mut byte))
        .expect("a byte to flip");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("writing to a file");
}

/// Where segment `id` begins on a cache device, in bytes.
///
/// # Panics
/// When the file cannot be a cache device.
pub fn segment_offset(cache: &Path, id: u64) -> u64 {
    let size = std::fs::metadata(cache).expect("a cache").len();
    let geometry = Geometry::of_device(size).expect("the size of a cache");
    geometry.slot_offset(geometry.slot_of(SegmentId(id)))
}

/// An entry of a block with these dirty bits, without a CRC.
pub fn entry(block: u64, dirty: u8) -> Metablock {
    Metablock { block: BlockNo(block), dirty: DirtyBits(dirty), crc: None, lost: false }
}

/// Writes a valid segment to where it belongs; its data blocks are filled with `fill`.
///
/// # Panics
/// When the file cannot be a cache device.
pub fn write_segment(cache: &Path, id: u64, metablocks: &[Metablock], fill: u8) {
    let data = vec![fill; metablocks.len() * BLOCK_BYTES];
    let mut header = [0; BLOCK_BYTES];
    encode_header(&mut header, SegmentId(id), metablocks, &data, None);
    let offset = segment_offset(cache, id);
    overwrite(cache, offset, &header);
    overwrite(cache, offset + to_u64(BLOCK_BYTES), &data);
}

/// Writes the superblock record, as the kernel module does.
///
/// # Panics
/// When the file cannot be written.
pub fn write_record(cache: &Path, id: u64) {
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(&id.to_le_bytes());
    overwrite(cache, SUPERBLOCK_REGION_BYTES - 512, &sector);
}

/// A loop device over a file, detached when this value is dropped.
pub struct LoopDevice {
    /// Such as `/dev/loop3`.
    pub path: PathBuf,
}

impl LoopDevice {
    /// Attaches a file. `None` if the test is not root or there are no loop devices.
    pub fn attach(file: &Path) -> Option<LoopDevice> {
        LoopDevice::attach_with(&[], file)
    }

    /// Attaches a file read-only. (`blockdev --setro` would outlast the file: it stays with the
    /// loop device.)
    pub fn attach_read_only(file: &Path) -> Option<LoopDevice> {
        LoopDevice::attach_with(&["--read-only"], file)
    }

    fn attach_with(options: &[&str], file: &Path) -> Option<LoopDevice> {
        let name = system("losetup", &[options, &["--find", "--show", file.to_str()?]].concat())?;
        Some(LoopDevice { path: PathBuf::from(name.trim()) })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// Bytes of a device that holds `segments` segments.
pub fn cache_bytes(segments: u32) -> u64 {
    SUPERBLOCK_REGION_BYTES + u64::from(segments) * to_u64(libwb::format::SEGMENT_BYTES)
}

/// The bytes of a file from `offset` on.
///
/// # Panics
/// When it cannot be read.
pub fn read_at(path: &Path, offset: u64, bytes: u64) -> Vec<u8> {
    let mut buf = vec![0; to_usize(bytes)];
    File::open(path).and_then(|file| file.read_exact_at(&mut buf, offset)).expect("bytes to read");
    buf
}

/// The SHA-256 that the volume of a golden pair has once the kernel module has recovered it.
///
/// # Panics
/// When the pair is not there.
pub fn golden_volume_sha256(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name).join("expect.json");
    let text = std::fs::read_to_string(path).expect("a golden pair");
    let expect: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    // The pair in write-around mode has no recovery: its volume did not change.
    let sha256 = expect["after_recovery"]["volume_sha256"].as_str();
    sha256.or(expect["volume_sha256_before_power_cut"].as_str()).expect("a SHA-256").into()
}

/// The SHA-256 of a block device as direct I/O reads it, past the page cache.
///
/// # Panics
/// When it cannot be read.
pub fn sha256_direct(device: &Path) -> String {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(device)
        .expect("a device");
    let mut hasher = Sha256::new();
    let mut buf = IoBuf::zeroed(1 << 20);
    loop {
        match file.read(&mut buf).expect("a device to read") {
            0 => return hex(hasher),
            n => hasher.update(&buf[..n]),
        }
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that look random, the same for the same seed.
pub fn noise(seed: u64, bytes: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut word = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    (0..bytes.div_ceil(8)).flat_map(|_| word()).take(to_usize(bytes)).collect()
}
