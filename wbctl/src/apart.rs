//! What the daemon delegates to another process, about its own device.
//!
//! No one can kill a thread that waits for its own daemon's device. It waits for an answer, or for
//! the end of the FUSE connection, which ends only when all threads have ended. A separate process
//! gets an error instead as soon as the daemon is gone.
//!
//! One such process outlives the daemon: [`guard_of`] starts it.

use crate::keeping::VERSION;
use crate::volume_paths::VolumeName;
use clap::ValueEnum;
use libwb::cli::Exit;
use libwb::runtime::thread;
use libwb::serve::outside;
use libwb::serve::ublk::{self, Removal};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The pauses between checks whether the process has ended: the first one, and the longest.
const OFTEN: Duration = Duration::from_millis(1);
const SELDOM: Duration = Duration::from_millis(100);
/// How long the kernel may take to end the requests of a killed daemon.
const TO_DIE: Duration = Duration::from_secs(60);
/// How long the kernel may take to notice that the last server is dead, and to remove its device.
const TO_REMOVE: Duration = Duration::from_secs(20);
/// How long the daemon retries to start the process.
const TO_START: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Task {
    /// Make durable what was written through the page cache.
    WriteOut,
    /// See whether a program holds it.
    Claim,
    /// Bound the discards of a loop device, and show its partitions.
    CompleteLoop,
    /// When the daemon is gone, remove what it left of the device at the ublk driver.
    Guard,
    /// Remove a device of the process that has started this one, whose server is dead.
    Remove,
    /// Print the name of the volume that a daemon serves as this device.
    Owner,
    /// Say whether this program can go on for one of this version.
    TakeOver,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    task: Task,
    /// The device, or the version
    device: PathBuf,
}

/// Performs the task, and exits with the errno, or with 0.
pub(crate) fn carry_out(args: &Args) -> ! {
    let done = match args.task {
        Task::WriteOut => outside::write_out(&args.device),
        Task::Claim => outside::claim(&args.device),
        Task::CompleteLoop => outside::complete_loop_device(&args.device),
        Task::Guard => guard(&args.device),
        Task::Remove => remove(&args.device),
        Task::Owner => owner(&args.device),
        Task::TakeOver => take_over(&args.device),
    };
    let number = done.err().map(|e| e.raw_os_error().unwrap_or(Errno::EIO as i32));
    std::process::exit(number.unwrap_or(Exit::Done as i32))
}

/// Runs a task in a process of its own as long as `go_on`, called again and again, returns true.
/// Returns `None` if it gave the task up.
pub(crate) fn run(
    task: Task,
    device: &Path,
    mut go_on: impl FnMut() -> bool,
) -> Option<io::Result<()>> {
    wait_for(|| start(task, device), &mut go_on)
}

/// Asks another program whether it can go on for one of this version.
pub(crate) fn ask_program(
    program: &Path,
    version: u32,
    mut go_on: impl FnMut() -> bool,
) -> Option<io::Result<()>> {
    let ask = || {
        let mut command = command_of(program, Task::TakeOver, Path::new(&version.to_string()));
        command.stdin(Stdio::null()).spawn()
    };
    wait_for(ask, &mut go_on)
}

fn wait_for(
    start: impl Fn() -> io::Result<Child>,
    go_on: &mut dyn FnMut() -> bool,
) -> Option<io::Result<()>> {
    let begun = Instant::now();
    let mut child = loop {
        match start() {
            Ok(child) => break child,
            // Memory or process slots are short, which may pass.
            Err(e)
                if [Some(Errno::EAGAIN as i32), Some(Errno::ENOMEM as i32)]
                    .contains(&e.raw_os_error())
                    && begun.elapsed() < TO_START
                    && go_on() =>
            {
                std::thread::sleep(SELDOM);
            }
            Err(e) => return Some(Err(e)),
        }
    };
    let mut pause = OFTEN;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                return Some(match status.code() {
                    Some(0) => Ok(()),
                    Some(number) => Err(io::Error::from_raw_os_error(number)),
                    None => Err(io::Error::other("the process that does it was killed")),
                });
            }
            Ok(None) => {}
            Err(e) => return Some(Err(e)),
        }
        if !go_on() {
            // The process may take the signal only when the device answers or is gone.
            let _ = child.kill();
            let _ = thread("wb-apart").spawn(move || child.wait());
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(SELDOM);
    }
}

/// Starts a process that deletes a ublk device once the other end of the pipe is closed, unless
/// that was done before. The keeper holds that end.
pub(crate) fn guard_of(device: &Path) -> io::Result<OwnedFd> {
    let mut guard = command(Task::Guard, device).stdin(Stdio::piped()).spawn()?;
    guard.stdin.take().map(OwnedFd::from).ok_or_else(|| ErrorKind::BrokenPipe.into())
}

/// Waits until the daemon is gone, then removes its device.
fn guard(device: &Path) -> io::Result<()> {
    // It must outlive the daemon, so it ignores these signals.
    libwb::cli::on_signals([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP], |_| ())?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    let begun = Instant::now();
    // The kernel notices a moment later that the daemon is gone.
    while ublk::remove_dead(device, std::process::id()).map_err(|e| e.cause)? != Removal::Done
        && begun.elapsed() < TO_DIE
    {
        std::thread::sleep(SELDOM);
    }
    Ok(())
}

/// Removes a device of the keeper, which has started this process and starts no server any more.
fn remove(device: &Path) -> io::Result<()> {
    let keeper = std::os::unix::process::parent_id();
    loop {
        match ublk::remove_dead(device, keeper).map_err(|e| e.cause)? {
            Removal::Done | Removal::Alive => return Ok(()),
            Removal::NotYet => std::thread::sleep(SELDOM),
        }
    }
}

/// Has a device of this keeper removed once all of its servers are dead. Waits for that, but only
/// for [`TO_REMOVE`]. The guard alone is not enough: systemd kills it once the keeper has ended.
/// Then the driver would hold the requests of the device's users.
pub(crate) fn remove_own(device: &Path) {
    let begun = Instant::now();
    let why = match run(Task::Remove, device, || begun.elapsed() < TO_REMOVE) {
        Some(Ok(())) => return,
        Some(Err(e)) => e.to_string(),
        None => format!("it took more than {} s", TO_REMOVE.as_secs()),
    };
    tracing::error!(
        "cannot remove {}: {why}. Programs that use it may hang until the next wbctl attach",
        device.display()
    );
}

fn owner(device: &Path) -> io::Result<()> {
    let owner = VolumeName::serving(device).ok_or(io::ErrorKind::NotFound)?;
    println!("{owner}");
    Ok(())
}

fn take_over(version: &Path) -> io::Result<()> {
    match version == Path::new(&VERSION.to_string()) {
        true => Ok(()),
        false => Err(Errno::EPROTONOSUPPORT.into()),
    }
}

fn start(task: Task, device: &Path) -> io::Result<Child> {
    command(task, device).stdin(Stdio::null()).spawn()
}

/// Starts this very program, since another version may be installed by now. The process inherits no
/// descriptor, and no signal of the terminal, which are for the daemon.
fn command(task: Task, device: &Path) -> Command {
    command_of(Path::new("/proc/self/exe"), task, device)
}

fn command_of(program: &Path, task: Task, device: &Path) -> Command {
    let task =
        task.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default();
    let mut command = Command::new(program);
    command.args(["apart", &task]).arg(device);
    command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    command
}
