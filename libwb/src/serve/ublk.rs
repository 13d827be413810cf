//! Serves a volume as a block device of the kernel's ublk driver: the kernel passes each request to
//! the reactor through its ring, and takes the answer from there.
//!
//! The device has one queue. Each of its tags has a command in the ring. The command completes when
//! the kernel has a request under this tag. The next command answers that request, and waits for
//! another one.
//!
//! A device whose server has died keeps its requests until another process takes over
//! ([`UblkDevice::resume`]). If none will, someone must delete its entry at the driver, or its
//! users wait forever: [`remove_dead`].

mod queue;

use super::{MAX_DISCARD, Options, Owner, ServeError, Volume, failed};
use crate::format::{SECTOR_BYTES, to_u64};
use crate::reactor::Handle;
use crate::sys::{CONTROL, Command, Control, open_queue};
use byteorder::{ByteOrder, NativeEndian};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use queue::{Abort, DEPTH, MAX_REQUEST, Queue};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Marks a device as wb's, in the field that the driver leaves to the server. The low half is the
/// process that answers for it: the keeper, or the server where there is none.
const OURS: u64 = 0x7762_766f_0000_0000; // "wbvo"

const OURS_MASK: u64 = 0xffff_ffff_0000_0000;

/// How long to wait for another process that adds or deletes a device.
const TO_BE_ALONE: Duration = Duration::from_secs(2);

/// Feature: commands are encoded as ioctls. Kernels before 6.4 lack it.
const IOCTL_ENCODED: u64 = 1 << 6;

/// Features: a device outlives its server, and the next one gets also the requests that the last
/// one had taken.
const RECOVERY: u64 = 1 << 3 | 1 << 4;

/// How long the driver may take to notice that a server has died. It looks every few seconds.
const TO_NOTICE: Duration = Duration::from_secs(20);

/// `struct ublksrv_ctrl_dev_info`.
#[derive(Clone, Copy, Debug, Default)]
struct Info {
    queues: u16,
    depth: u16,
    state: u16,
    max_request: u32,
    number: u32,
    flags: u64,
    of_owner: u64,
}

impl Info {
    const BYTES: usize = 64;
    /// The state of a device that was never started, or whose server has ended.
    const DEAD: u16 = 0;
    /// The state of one that waits for another server.
    const QUIESCED: u16 = 2;

    /// The process that answers for it, or did, if it is a device of ours.
    fn owner(&self) -> Option<u32> {
        let (mark, process) = (self.of_owner & OURS_MASK, self.of_owner & !OURS_MASK);
        (mark == OURS).then_some(u32::try_from(process).ok()?)
    }

    /// Refuses a device that is not of this keeper, or not as this program would have made it. The
    /// driver ends a takeover only once a server serves all tags.
    fn refuse_to_resume(&self, keeper: Option<u32>, path: &Path) -> Result<(), ServeError> {
        let path = path.display();
        if self.owner().is_none() || self.owner() != keeper {
            return Err(failed(format!("{path} is not this volume's any more"))(Errno::ENODEV));
        }
        if (self.queues, self.depth, self.max_request) != (1, DEPTH, MAX_REQUEST) {
            let what = format!(
                "{path} was made by another version: {} queues of {} requests of {} bytes",
                self.queues, self.depth, self.max_request
            );
            return Err(failed(what)(Errno::EPROTONOSUPPORT));
        }
        Ok(())
    }

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        NativeEndian::write_u16(&mut bytes[0..], self.queues);
        NativeEndian::write_u16(&mut bytes[2..], self.depth);
        NativeEndian::write_u32(&mut bytes[8..], self.max_request);
        NativeEndian::write_u32(&mut bytes[12..], self.number);
        NativeEndian::write_u64(&mut bytes[24..], self.flags);
        NativeEndian::write_u64(&mut bytes[32..], self.of_owner);
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Info {
        Info {
            queues: NativeEndian::read_u16(&bytes[0..]),
            depth: NativeEndian::read_u16(&bytes[2..]),
            state: NativeEndian::read_u16(&bytes[4..]),
            max_request: NativeEndian::read_u32(&bytes[8..]),
            number: NativeEndian::read_u32(&bytes[12..]),
            flags: NativeEndian::read_u64(&bytes[24..]),
            of_owner: NativeEndian::read_u64(&bytes[32..]),
        }
    }
}

/// `struct ublk_params`, with the parts `basic` and `discard`.
fn parameters(options: &Options, bytes: u64) -> [u8; 60] {
    const READ_ONLY: u32 = 1;
    const ROTATIONAL: u32 = 1 << 1;
    const VOLATILE_CACHE: u32 = 1 << 2;
    const FUA: u32 = 1 << 3;
    let mut attributes = VOLATILE_CACHE | FUA;
    if options.read_only {
        attributes |= READ_ONLY;
    }
    if options.backing.rotational {
        attributes |= ROTATIONAL;
    }
    let physical = options.backing.physical_sector_size.unwrap_or(0).max(options.sector_size);
    let shift = |size: u32| u8::try_from(size.ilog2()).unwrap_or(12);
    let sectors = |bytes: u64| bytes / to_u64(SECTOR_BYTES);
    let most = u32::try_from(sectors(MAX_DISCARD)).unwrap_or(u32::MAX);
    let mut it = [0; 60];
    NativeEndian::write_u32(&mut it[0..], 60);
    NativeEndian::write_u32(&mut it[4..], 1 | 1 << 1); // basic, discard
    NativeEndian::write_u32(&mut it[8..], attributes);
    it[12] = shift(options.sector_size);
    it[13] = shift(physical);
    it[14] = shift(physical); // optimal I/O
    it[15] = shift(physical); // minimal I/O
    NativeEndian::write_u32(&mut it[16..], MAX_REQUEST / 512);
    NativeEndian::write_u64(&mut it[24..], sectors(bytes));
    NativeEndian::write_u32(&mut it[44..], physical.max(4096)); // discard granularity
    NativeEndian::write_u32(&mut it[48..], most);
    NativeEndian::write_u32(&mut it[52..], most); // write-zeroes
    NativeEndian::write_u16(&mut it[56..], 1); // segments of a discard
    it
}

/// Whether the driver is there, usable for this process, and has all that is needed.
///
/// # Errors
/// Says what is missing.
pub fn check_support() -> Result<(), ServeError> {
    let mut control = open_control()?;
    let mut features = [0; 8];
    control.command(Command::GetFeatures, u32::MAX, &mut features).map_err(|cause| {
        let what = match cause.kind() {
            io::ErrorKind::PermissionDenied => "cannot use ublk (root is needed)",
            _ => "the kernel's ublk driver is too old (Linux 6.5 is needed)",
        };
        ServeError { what: what.into(), cause }
    })?;
    if NativeEndian::read_u64(&features) & IOCTL_ENCODED == 0 {
        let what = "the kernel's ublk driver lacks ioctl-encoded commands";
        return Err(failed(what)(Errno::EOPNOTSUPP));
    }
    Ok(())
}

fn open_control() -> Result<Control, ServeError> {
    Control::open().map_err(|cause| {
        let what = match cause.kind() {
            io::ErrorKind::NotFound => {
                format!(
                    "cannot open {CONTROL} (if the kernel has ublk, modprobe ublk_drv loads it)"
                )
            }
            _ => format!("cannot open {CONTROL}"),
        };
        ServeError { what, cause }
    })
}

/// What has become of a dead device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is gone, or the device is none of ours.
    Done,
    /// The process that answers for it lives.
    Alive,
    /// The driver has not noticed yet that the server is dead.
    NotYet,
}

/// The block devices of the driver, whoever serves them.
pub fn devices() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/sys/class/ublk-char").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let numbers = names.filter_map(|name| name.strip_prefix("ublkc")?.parse::<u32>().ok());
    numbers.map(|number| PathBuf::from(format!("/dev/ublkb{number}"))).collect()
}

/// Deletes the entry of a device of ours whose owner has died. Leaves any other device alone. The
/// process `own` is no owner of one: in a container, it may have the number of one that died.
///
/// # Errors
/// When the driver refuses.
pub fn remove_dead(device: &Path, own: u32) -> Result<Removal, ServeError> {
    let Some(number) = number_of(device) else { return Ok(Removal::Done) };
    // Without the driver, none of its devices is left.
    let Ok(mut control) = Control::open() else { return Ok(Removal::Done) };
    if let Some(known) = unless_dead(&mut control, number, own) {
        return Ok(known);
    }
    // Neither is a new device of ours about to start, nor does one get the number in between.
    let Some(_alone) = alone() else { return Ok(Removal::NotYet) };
    if let Some(known) = unless_dead(&mut control, number, own) {
        return Ok(known);
    }
    delete(&mut control, number)
        .map(|()| Removal::Done)
        .map_err(failed(format!("cannot remove the dead device {}", device.display())))
}

/// Whether a device is one of ours whose owner seems to have died. It may also be about to start,
/// for a process that this one cannot see. For `own`, see [`remove_dead`].
pub fn seems_dead(device: &Path, own: u32) -> bool {
    let number = number_of(device);
    number
        .zip(Control::open().ok())
        .is_some_and(|(number, mut control)| unless_dead(&mut control, number, own).is_none())
}

/// Why a device is not to be deleted; `None` if it seems dead.
fn unless_dead(control: &mut Control, number: u32, own: u32) -> Option<Removal> {
    let Ok(info) = info(control, number) else { return Some(Removal::Done) };
    match info.owner() {
        None => Some(Removal::Done),
        Some(owner) if owner != own && is_alive(owner) => Some(Removal::Alive),
        Some(_) if ![Info::DEAD, Info::QUIESCED].contains(&info.state) => Some(Removal::NotYet),
        Some(_) => None,
    }
}

/// Whether a process still runs. A zombie does not.
fn is_alive(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The state comes after the name, which is in parentheses.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// The number of a device, by its path.
fn number_of(device: &Path) -> Option<u32> {
    device.file_name()?.to_str()?.strip_prefix("ublkb")?.parse().ok()
}

fn info(control: &mut Control, number: u32) -> io::Result<Info> {
    let mut bytes = [0; Info::BYTES];
    control.command(Command::GetInfo, number, &mut bytes)?;
    Ok(Info::decode(&bytes))
}

/// Has a device deleted once nothing holds it any more.
fn delete(control: &mut Control, number: u32) -> io::Result<()> {
    /// What old kernels say of an unknown command, as only the kernel knows it.
    const ENOTSUPP: i32 = 524;
    match control.command(Command::DeleteLater, number, &mut []) {
        Err(e) if [Some(ENOTSUPP), Some(Errno::EOPNOTSUPP as i32)].contains(&e.raw_os_error()) => {
            // Before Linux 6.9.
            control.delete(number)
        }
        done => done,
    }
}

/// Keeps other processes of ours from adding and deleting devices, as long as the value lives.
/// Until a device starts, it looks like a dead one. `None` if another process takes long.
fn alone() -> Option<Flock<File>> {
    let begun = Instant::now();
    let mut file = File::open(CONTROL).ok()?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((unlocked, Errno::EWOULDBLOCK)) if begun.elapsed() < TO_BE_ALONE => file = unlocked,
            Err(_) => return None,
        }
        std::thread::sleep(TO_BE_ALONE / 100);
    }
}

/// A block device that serves a volume. Dropping it takes the device down.
pub struct UblkDevice {
    number: u32,
    path: PathBuf,
    requests: Requests,
    can_resume: bool,
    is_down: bool,
}

/// The requests to a device. They can be ended even if the devices that it stands on hang.
#[derive(Clone)]
pub struct Requests(Arc<dyn Abort>);

impl Requests {
    /// Makes all current and later requests fail.
    pub fn abort(&self) {
        self.0.abort();
    }

    /// Takes and answers no more requests, as if the process had died: the next server gets them.
    pub fn hold(&self) {
        self.0.hold();
    }
}

impl UblkDevice {
    /// Makes the block device. The owner hears of its loss when the device was stopped or deleted,
    /// or its queue failed.
    ///
    /// # Errors
    /// Names the step that failed.
    pub fn attach<V: Volume>(
        volume: V,
        runtime: &Handle,
        options: Options,
        owner: impl Owner,
    ) -> Result<UblkDevice, ServeError> {
        check_support()?;
        let mut control = open_control()?;
        let alone = alone();
        let keeper = owner.keeper();
        let (number, flags) =
            add(&mut control, keeper).map_err(failed("cannot add a ublk device"))?;
        let path = path_of(number);
        let bytes = volume.size();
        let served = owner
            .announce(&path)
            .map_err(failed(format!("cannot announce {}", path.display())))
            .and_then(|()| Queue::serve(volume, runtime, number, owner));
        let started = served.and_then(|queue| {
            match start(&mut control, number, &options, bytes, || !queue.has_ended()) {
                Ok(()) => {
                    queue.has_started();
                    Ok(Requests(queue))
                }
                Err(cause) => Err(failed(format!("cannot start {}", path.display()))(cause)),
            }
        });
        drop(alone);
        match started {
            Ok(requests) => {
                let can_resume = keeper.is_some() && flags & RECOVERY == RECOVERY;
                Ok(UblkDevice { number, path, requests, can_resume, is_down: false })
            }
            Err(e) => {
                // On a ring of its own: a command may be under way on the other.
                let _ = open_control().map(|mut control| take_down(&mut control, number));
                Err(e)
            }
        }
    }

    /// Serves a device whose earlier server has ended. What that one had not answered comes again.
    /// On an error, the device still waits for a server.
    ///
    /// # Errors
    /// Names the step that failed.
    pub fn resume<V: Volume>(
        volume: V,
        runtime: &Handle,
        path: &Path,
        owner: impl Owner,
    ) -> Result<UblkDevice, ServeError> {
        let refused = || failed::<io::Error>(format!("cannot take over {}", path.display()));
        let number = number_of(path).ok_or_else(|| Errno::ENODEV.into()).map_err(refused())?;
        let mut control = open_control()?;
        let found = info(&mut control, number).map_err(refused())?;
        found.refuse_to_resume(owner.keeper(), path)?;
        match start_recovery(&mut control, number) {
            Err(e) if e.raw_os_error() == Some(Errno::EINVAL as i32) => {
                end_takeover(&mut control, number)?;
                start_recovery(&mut control, number)
            }
            done => done,
        }
        .map_err(refused())?;
        let queue = Queue::serve(volume, runtime, number, owner)?;
        control.start(Command::EndRecovery, number, || !queue.has_ended()).map_err(refused())?;
        queue.has_started();
        let (path, requests) = (path.to_path_buf(), Requests(queue));
        Ok(UblkDevice { number, path, requests, can_resume: true, is_down: false })
    }

    /// Whether the device waits for another server when this one dies.
    pub fn can_resume(&self) -> bool {
        self.can_resume
    }

    /// The device's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its requests.
    pub fn requests(&self) -> Requests {
        self.requests.clone()
    }

    /// Takes the device down. If a program still holds it, its I/O fails from now on.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn detach(mut self) -> Result<(), ServeError> {
        self.is_down = true;
        take_down(&mut open_control()?, self.number)
            .map_err(failed(format!("cannot take down {}", self.path.display())))
    }
}

impl Drop for UblkDevice {
    fn drop(&mut self) {
        if !self.is_down
            && let Ok(mut control) = open_control()
        {
            let _ = take_down(&mut control, self.number);
        }
    }
}

fn path_of(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{number}"))
}

/// Adds a device of any free number. With a keeper, it outlives its server, where the driver can.
/// Returns its number and features.
fn add(control: &mut Control, keeper: Option<u32>) -> io::Result<(u32, u64)> {
    let recovery = if keeper.is_some() { RECOVERY } else { 0 };
    let wanted = Info {
        queues: 1,
        depth: DEPTH,
        max_request: MAX_REQUEST,
        number: u32::MAX,
        flags: IOCTL_ENCODED | recovery,
        of_owner: OURS | u64::from(keeper.unwrap_or_else(std::process::id)),
        ..Info::default()
    };
    let mut bytes = wanted.encode();
    control.command(Command::Add, u32::MAX, &mut bytes)?;
    let added = Info::decode(&bytes);
    Ok((added.number, added.flags))
}

/// Begins to take over a device, as soon as the driver knows that its server is dead.
fn start_recovery(control: &mut Control, number: u32) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match control.command(Command::StartRecovery, number, &mut []) {
            Err(e)
                if e.raw_os_error() == Some(Errno::EBUSY as i32) && begun.elapsed() < TO_NOTICE =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

/// Ends a takeover whose server was killed before it served all tags. Linux 6.12 allows no
/// further one until it has.
fn end_takeover(control: &mut Control, number: u32) -> Result<(), ServeError> {
    let refused = || failed::<io::Error>(format!("cannot end a takeover of ublk device {number}"));
    if info(control, number).map_err(refused())?.state != Info::QUIESCED {
        return Err(refused()(Errno::EINVAL.into()));
    }
    let begun = Instant::now();
    let file = loop {
        match open_queue(number) {
            // That server's process has not ended yet.
            Err(e)
                if e.raw_os_error() == Some(Errno::EBUSY as i32) && begun.elapsed() < TO_NOTICE =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            opened => break opened.map_err(refused())?,
        }
    };
    queue::serve_for_a_moment(number, file)
}

/// Makes the block device appear. The kernel then looks for partitions on it, so its queue must be
/// served already.
fn start(
    control: &mut Control,
    number: u32,
    options: &Options,
    bytes: u64,
    is_served: impl Fn() -> bool,
) -> io::Result<()> {
    control.command(Command::SetParameters, number, &mut parameters(options, bytes))?;
    control.start(Command::Start, number, is_served)
}

/// Stops a device and deletes it. What this process or others still hold of it goes with their last
/// descriptor.
fn take_down(control: &mut Control, number: u32) -> io::Result<()> {
    let stopped = control.command(Command::Stop, number, &mut []);
    // Even if it has not stopped: it may have been deleted by others.
    let deleted = delete(control, number);
    stopped.and(deleted)
}

#[cfg(test)]
mod tests;
