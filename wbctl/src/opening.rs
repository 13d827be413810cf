//! How a server opens the two devices, and the cache on them: for the first time, or where an
//! earlier server has left it.

use crate::attach_args::Args;
use crate::config::RecordedVolume;
use crate::older::Past;
use crate::standing::Standing;
use crate::volume_paths::VolumeName;
use crate::{rival, salvage};
use anyhow::Result;
use libwb::cache::{Cache, CacheError, Head, OpenOptions};
use libwb::cli::{Backing, Io, human_size};
use libwb::device::Device;
use libwb::device::probe::{Access, OpenError, Opened};
use libwb::format::{BLOCK_BYTES, SegmentId, to_u64};
use libwb::log::pairing::{BackingFacts, accept_growth};
use std::io::ErrorKind;
use std::time::{Duration, Instant};

/// How long attach retries to open a device that is in use.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same after a daemon was killed: its I/O may still be under way, and holds the devices until
/// it ends.
const PATIENCE_AFTER_KILL: Duration = Duration::from_secs(15);

/// Opens both devices for the first time.
pub(crate) fn open_devices(
    io: &Io,
    name: &VolumeName,
    volume: &RecordedVolume,
    args: &Args,
) -> Result<(Opened, Backing)> {
    // A daemon that ends in order removes its socket.
    let in_use = if name.socket().exists() { PATIENCE_AFTER_KILL } else { PATIENCE };
    let wait = Duration::from_secs(args.wait.into());
    let access = access(args.read_only);
    patiently(in_use, wait, || io.open_pair(&volume.cache, &volume.backing, [access; 2]))
}

/// Opens both devices after an earlier server. Its I/O may still be under way, and no one else can
/// go on before that has ended.
pub(crate) fn reopen_devices(
    io: &Io,
    standing: &Standing,
    read_only: bool,
) -> Result<(Opened, Backing)> {
    let RecordedVolume { cache, backing, .. } = &standing.volume;
    let open = || io.reopen_pair(cache, backing, access(read_only), standing.backing_terms);
    loop {
        let opened = patiently(PATIENCE_AFTER_KILL, PATIENCE_AFTER_KILL, open);
        match opened.as_ref().map_err(|e| e.downcast_ref()) {
            Err(Some(OpenError::InUse { .. })) => {
                let why = opened.err().map(|e| format!("{e:#}")).unwrap_or_default();
                tracing::warn!("{why}; the volume waits until its I/O has ended");
            }
            _ => return opened,
        }
    }
}

fn access(read_only: bool) -> Access {
    if read_only { Access::Read } else { Access::Write }
}

fn patiently<T>(
    in_use: Duration,
    wait: Duration,
    open: impl Fn() -> Result<T, OpenError>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        match open() {
            Err(e) if started.elapsed() < patience(&e, in_use, wait) => {
                std::thread::sleep(Duration::from_millis(100))
            }
            other => return Ok(other?),
        }
    }
}

/// How long attach retries after an error. For a device that is not there, the user decides.
fn patience(error: &OpenError, in_use: Duration, wait: Duration) -> Duration {
    match error {
        OpenError::InUse { .. } => in_use,
        OpenError::System { cause, .. } if cause.kind() == ErrorKind::NotFound => wait,
        OpenError::Export { cause, .. } if cause.may_pass() => wait,
        _ => Duration::ZERO,
    }
}

/// Opens the cache, unless it is an older copy, or a second cache in front of a dirty one.
pub(crate) fn recover(
    io: &Io,
    args: &Args,
    volume: &RecordedVolume,
    [cache, backing]: &[Device; 2],
    head: Option<&Head>,
) -> Result<Cache> {
    let past = Past::look_up(io, cache, args.older, |why| tracing::warn!("{why}"))?;
    if !args.read_only {
        rival::refuse(io, &volume.cache, past.uuid.as_deref(), &volume.backing)?;
    }
    if args.grown {
        let accepted = io.block_on(accept_growth(cache, &BackingFacts::of(backing), past.reach));
        accepted.map_err(|e| past.explain(CacheError::Log(e).into()))?;
    }
    let tunables = volume.tunables()?;
    let open = async |known| {
        let (cache, backing) = (cache.clone(), backing.clone());
        let options = options(head).knowing(known).tunables(tunables.clone());
        Cache::open(cache, backing, io.runtime(), options).await
    };
    let opened = io.block_on(salvage::open(&args.salvage, cache, backing, past.reach, open));
    let (cache, salvaged) = opened.map_err(|e| past.explain(e))?;
    for line in salvaged.iter().flat_map(salvage::outcome) {
        tracing::warn!("the log was corrupt: {line}");
    }
    let status = cache.status();
    if status.newest == SegmentId::NONE {
        tracing::info!("the cache is new: there was nothing to recover");
        return Ok(cache);
    }
    tracing::info!(
        "recovered in {:.2} s, {} of the log read: {} in the cache still await write-back",
        status.recovery_time.as_secs_f64(),
        human_size(status.recovery_bytes),
        human_size(status.dirty_blocks * to_u64(BLOCK_BYTES))
    );
    Ok(cache)
}

/// Opens the cache as an earlier server has left it. Its questions were answered then.
pub(crate) fn recover_again(
    io: &Io,
    standing: &Standing,
    [cache, backing]: &[Device; 2],
    head: Option<&Head>,
) -> Result<Cache> {
    let options = options(head).tunables(standing.tunables()?);
    let cache = io.block_on(Cache::open(cache.clone(), backing.clone(), io.runtime(), options))?;
    if standing.paused {
        cache.pause();
    }
    tracing::info!("took over in {:.2} s", cache.status().recovery_time.as_secs_f64());
    Ok(cache)
}

/// Without a head, only reads are served.
fn options(head: Option<&Head>) -> OpenOptions {
    match head {
        Some(head) => OpenOptions::serve().head(head.clone()),
        None => OpenOptions::read_only(),
    }
}
