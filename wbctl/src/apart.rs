//! What the daemon delegates to another process, about its own device.
//!
//! No one can kill a thread that waits for its own daemon's device. It waits for an answer, or for
//! the end of the FUSE connection, which ends only when all threads have ended. A separate process
//! gets an error instead as soon as the daemon is gone.
//!
//! One such process outlives the daemon: the [`Guard`].

use crate::volume_paths::VolumeName;
use clap::ValueEnum;
use libwb::cli::Exit;
use libwb::runtime::thread;
use libwb::serve::outside;
use libwb::serve::ublk::{self, Removal};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The pauses between checks whether the process has ended: the first one, and the longest.
const OFTEN: Duration = Duration::from_millis(1);
const SELDOM: Duration = Duration::from_millis(100);
/// How long the kernel may take to end the requests of a killed daemon.
const TO_DIE: Duration = Duration::from_secs(60);
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
    /// Print the name of the volume that a daemon serves as this device.
    Owner,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    task: Task,
    device: PathBuf,
}

/// Performs the task, and exits with the errno, or with 0.
pub(crate) fn carry_out(args: &Args) -> ! {
    let done = match args.task {
        Task::WriteOut => outside::write_out(&args.device),
        Task::Claim => outside::claim(&args.device),
        Task::CompleteLoop => outside::complete_loop_device(&args.device),
        Task::Guard => guard(&args.device),
        Task::Owner => owner(&args.device),
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
    let begun = Instant::now();
    let mut child = loop {
        match start(task, device) {
            Ok(child) => break child,
            // Memory or process slots are short, which may pass.
            Err(_) if begun.elapsed() < TO_START && go_on() => std::thread::sleep(SELDOM),
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

/// A process that deletes the daemon's ublk device if the daemon has not done so itself, because it
/// was killed.
pub(crate) struct Guard(#[expect(dead_code, reason = "its end of a pipe closes with us")] Child);

impl Guard {
    /// Guards a device of this process.
    pub(crate) fn of(device: &Path) -> io::Result<Guard> {
        command(Task::Guard, device).stdin(Stdio::piped()).spawn().map(Guard)
    }
}

/// Waits until the daemon is gone, then removes its device.
fn guard(device: &Path) -> io::Result<()> {
    // It must outlive the daemon, so it ignores these signals.
    libwb::cli::on_signals([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP], |_| ())?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    let begun = Instant::now();
    // The kernel notices a moment later that the daemon is gone.
    while ublk::remove_dead(device).map_err(|e| e.cause)? != Removal::Done
        && begun.elapsed() < TO_DIE
    {
        std::thread::sleep(SELDOM);
    }
    Ok(())
}

fn owner(device: &Path) -> io::Result<()> {
    let owner = VolumeName::serving(device).ok_or(io::ErrorKind::NotFound)?;
    println!("{owner}");
    Ok(())
}

fn start(task: Task, device: &Path) -> io::Result<Child> {
    command(task, device).stdin(Stdio::null()).spawn()
}

/// Starts this very program, since another version may be installed by now. The process inherits no
/// descriptor, and no signal of the terminal, which are for the daemon.
fn command(task: Task, device: &Path) -> Command {
    let task =
        task.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default();
    let mut command = Command::new("/proc/self/exe");
    command.args(["apart", &task]).arg(device);
    command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    command
}
