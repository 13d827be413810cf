//! What the measurements share. Nothing that takes space outlives the program, however it ends:
//! files lose their names as soon as they are open, and mounts and loop devices go away with their
//! last user. The exception is a file that wbcheck opens, which outlives a SIGKILL.

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use libwb::cache::{Cache, OpenOptions};
use libwb::cli;
use libwb::device::probe::{Access, Opened, open};
use libwb::device::{Device, IoBuf, SharedBuf, UringDevice};
use libwb::format::{SuperblockExtension, to_u64, to_usize};
use libwb::log::LogError;
use libwb::log::format_device::create;
use libwb::reactor::Reactor;
use libwb::runtime::Runtime;
use libwb::serve::guard_against_reclaim;
use nix::sys::signal::Signal;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tempfile::{NamedTempFile, TempPath};
use uuid::Uuid;

/// The bytes of a write of a whole segment.
pub(crate) const SEGMENT: usize = 512 * 1024;
/// How many writes to a cache device are in flight: as many segments as the engine keeps in flight.
pub(crate) const SEGMENTS_IN_FLIGHT: usize = 8;

static SIGNALLED: AtomicBool = AtomicBool::new(false);

/// Lets signals end the measurement in order, in this thread and all that start later.
pub(crate) fn watch_signals() -> Result<()> {
    let signals = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    Ok(cli::on_signals(signals, |_| SIGNALLED.store(true, Ordering::Relaxed))?)
}

/// Makes memory resident from the beginning, as the daemon does. Otherwise its first use would be
/// measured as well.
pub(crate) fn lock_memory() {
    if let Err(why) = guard_against_reclaim() {
        eprintln!("wb-bench: {why}; the figures may be less than the daemon's");
    }
}

/// Fails if a signal has arrived.
pub(crate) fn check_signals() -> Result<()> {
    ensure!(!SIGNALLED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// Makes a file of `bytes` bytes of allocated, written space, as a device has it, and opens it for
/// direct I/O.
///
/// The first write to a hole or to preallocated space changes the file's metadata, which would be
/// measured.
pub(crate) fn file(reactor: &Reactor, dir: &Path, name: &str, bytes: u64) -> Result<Device> {
    let file = unnamed_file(dir, name, bytes)?;
    let device: Device = Arc::new(UringDevice::new(reactor.handle(), file));
    reactor.block_on(write_sequentially(&device, bytes))?;
    Ok(device)
}

/// Makes a file that reads as zeros and takes space only for what is written.
pub(crate) fn sparse_file(reactor: &Reactor, dir: &Path, name: &str, bytes: u64) -> Result<Device> {
    let temporary = temporary_file(dir, name, bytes)?;
    opened(reactor, temporary.path())
}

/// The same, with a name, to be opened again. It goes away with its path.
pub(crate) fn named_sparse_file(
    reactor: &Reactor,
    dir: &Path,
    name: &str,
    bytes: u64,
) -> Result<(TempPath, Device)> {
    let path = temporary_file(dir, name, bytes)?.into_temp_path();
    let device = opened(reactor, &path)?;
    Ok((path, device))
}

/// Makes a file that other programs can open. It goes away with its path.
pub(crate) fn named_file(
    reactor: &Reactor,
    dir: &Path,
    name: &str,
    bytes: u64,
) -> Result<(TempPath, Device)> {
    let temporary = temporary_file(dir, name, bytes)?;
    check_space(temporary.as_file(), bytes)?;
    let device = opened(reactor, temporary.path())?;
    Ok((temporary.into_temp_path(), device))
}

/// Opens a file for direct I/O.
pub(crate) fn opened(reactor: &Reactor, path: &Path) -> Result<Device> {
    Ok(Arc::new(UringDevice::new(reactor.handle(), open(path, Access::Write)?)))
}

fn unnamed_file(dir: &Path, name: &str, bytes: u64) -> Result<Opened> {
    let temporary = temporary_file(dir, name, bytes)?;
    check_space(temporary.as_file(), bytes)?;
    // The name goes at the end of this function, and the space when the device is closed.
    Ok(open(temporary.path(), Access::Write)?)
}

fn temporary_file(dir: &Path, name: &str, bytes: u64) -> Result<NamedTempFile> {
    let temporary = tempfile::Builder::new()
        .prefix(&format!("wb-bench-{name}-"))
        .tempfile_in(dir)
        .with_context(|| format!("cannot make a file in {}", dir.display()))?;
    temporary.as_file().set_len(bytes)?;
    Ok(temporary)
}

fn check_space(file: &File, bytes: u64) -> Result<()> {
    let stat = nix::sys::statvfs::fstatvfs(file)?;
    let free = stat.blocks_available() * stat.fragment_size();
    if free < bytes {
        bail!("{} MiB are needed, but only {} MiB are free; use --dir", bytes >> 20, free >> 20);
    }
    Ok(())
}

/// Writes a device from its start on, as the log is written, and flushes it.
pub(crate) async fn write_sequentially(device: &Device, bytes: u64) -> Result<()> {
    let mut buf = IoBuf::zeroed(SEGMENT);
    buf.fill(0xa5);
    let data = SharedBuf::from(buf);
    let count = to_usize(bytes) / SEGMENT;
    stream::iter((0..count).map(|nth| device.write(to_u64(nth * SEGMENT), data.clone())))
        .buffer_unordered(SEGMENTS_IN_FLIGHT)
        .try_for_each(async |()| Ok(()))
        .await?;
    Ok(device.flush().await?)
}

/// MB per second, on average since `started`.
#[allow(clippy::cast_precision_loss)] // a figure
pub(crate) fn megabytes_per_second(bytes: u64, started: Instant) -> f64 {
    bytes as f64 / 1e6 / started.elapsed().as_secs_f64()
}

/// Makes a cache of a device, as wbformat does.
pub(crate) async fn format(device: &Device) -> Result<(), LogError> {
    create(device, Some(&extension(device)), |_| ()).await.map(|_| ())
}

/// Formats a device and opens the cache on it, with default tunables.
pub(crate) async fn new_cache(
    device: Device,
    backing: Device,
    runtime: Arc<dyn Runtime>,
) -> Result<Cache> {
    format(&device).await?;
    Ok(Cache::open(device, backing, runtime, OpenOptions::serve()).await?)
}

/// The superblock extension that [`format`](fn@format) writes.
pub(crate) fn extension(device: &Device) -> SuperblockExtension {
    SuperblockExtension::new(Uuid::from_u128(1), device.size())
}
