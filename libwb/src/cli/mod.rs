//! What the programs share: exit codes, error messages, standard output, JSON, tables, numbers for
//! people, progress bars, interruption, the records of volumes, and opening devices.

mod backing;
mod numbers;
mod own;
mod progress;
mod recorded;
mod salvage;
mod table;
mod text;
mod workers;

pub use backing::{Backing, InTheClear, place, refuse_in_the_clear};
pub use numbers::{LAST_SECOND, count, human_rate, human_size, human_time, parse_label, percent};
pub use own::{open_no_link, read_own, refuse_others};
pub use progress::Progress;
pub use recorded::{MAX_NAME, MAX_RECORD, RECORD_SUFFIX, VolumeDevices, is_volume_name};
pub use salvage::SalvageOption;
pub use table::{Table, properties, table};
pub use text::read_text;

use crate::control;
use crate::device::probe::{Access, OpenError, Opened, open};
use crate::device::{Device, UringDevice};
use crate::format::{Geometry, SEGMENT_BYTES, Slot};
use crate::log::scan::{SlotContent, SlotState, scan_by};
use crate::log::superblock::Superblock;
use crate::log::{LogError, live};
use crate::reactor::{Handle, Reactor};
use crate::runtime::thread;
use crate::sys;
use nix::sys::signal::{SigSet, Signal};
use serde::Serialize;
use std::error::Error;
use std::fmt::Display;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, StdoutLock, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use workers::Workers;

/// How a program ends. The values are those of fsck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done; for wbcheck: nothing wrong.
    Done = 0,
    /// Failed; for wbcheck, [`Exit::Repaired`].
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// wbctl status: the volume is not attached.
    NotAttached = 3,
    /// wbcheck: errors were found and are still there; for wbctl status, [`Exit::VolumeFailed`].
    ErrorsLeft = 4,
    /// wbctl status: the volume works, but something is wrong with it.
    Degraded = 5,
    /// wbcheck: could not check.
    CouldNotCheck = 8,
}

impl Exit {
    /// wbcheck: errors were found, and all repaired.
    #[allow(non_upper_case_globals)] // named as the others
    pub const Repaired: Exit = Exit::Failed;
    /// wbctl status: the volume refuses writes, or its daemon does not answer.
    #[allow(non_upper_case_globals)] // named as the others
    pub const VolumeFailed: Exit = Exit::ErrorsLeft;
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// What the help of programs other than wbcheck says about [`Exit`].
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed or refused
  2  the command line makes no sense";

/// Runs a program. An error becomes a message on standard error, usually of one line, and the exit
/// code `on_error`.
pub fn run<E: Display + AsRef<dyn Error + Send + Sync>>(
    program: &str,
    on_error: Exit,
    body: impl FnOnce(&mut Output) -> Result<Exit, E>,
) -> ExitCode {
    sys::ignore_file_size_signal();
    let mut output = Output { stdout: BufWriter::new(io::stdout().lock()), closed: false };
    let ended = body(&mut output);
    let flushed = output.flush();
    let (exit, message) = match (ended, flushed) {
        (Ok(exit), Ok(())) => (exit, None),
        (Ok(_), Err(e)) => (on_error, Some(format!("cannot write the output: {e}"))),
        (Err(e), _) => (on_error, Some(explain(&e))),
    };
    if let Some(message) = message {
        complain(program, without_numbers(&message));
    }
    exit.into()
}

/// What [`run`] says of an error.
pub fn explain<E: Display + AsRef<dyn Error + Send + Sync>>(error: &E) -> String {
    // The alternate form includes the causes of an error.
    without_numbers(&with_holder(format!("{error:#}"), error.as_ref()))
}

/// The message of an error. For a device in use, it names the volume that uses it, if one does.
fn with_holder(message: String, error: &(dyn Error + 'static)) -> String {
    let mut causes = std::iter::successors(Some(error), |&cause| cause.source());
    let in_use = causes.find_map(|cause| match cause.downcast_ref() {
        Some(error @ OpenError::InUse { path }) => Some((error, path)),
        _ => None,
    });
    let held = in_use.and_then(|(error, path)| Some((error, path, control::volume_of(path)?)));
    held.map_or(message.clone(), |(error, path, name)| {
        let path = path.display();
        let better = format!(
            "{path}: in use: it is attached as volume '{name}'; to release it: wbctl detach {name}"
        );
        message.replace(&error.to_string(), &better)
    })
}

/// Removes the numbers that Rust adds to system errors, such as in "No such file or directory (os
/// error 2)".
fn without_numbers(message: &str) -> String {
    const BEFORE: &str = " (os error ";
    let mut parts = message.split(BEFORE);
    let mut text = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        match part[digits..].strip_prefix(')') {
            Some(rest) if digits > 0 => text += rest,
            _ => text += &format!("{BEFORE}{part}"),
        }
    }
    text
}

/// Prints one line on standard error, if that is possible.
pub fn complain(program: &str, message: impl Display) {
    let _ = writeln!(io::stderr(), "{program}: {message}");
}

/// From now on, a signal to end (as from Ctrl-C) prints one line on standard error and ends the
/// program. The line tells the state of the work and how to continue. Call it before other threads
/// start.
///
/// # Errors
/// When the system has no room for a thread.
pub fn on_interrupt(
    program: &'static str,
    message: impl FnOnce() -> String + Send + 'static,
) -> io::Result<()> {
    let mut message = Some(message);
    on_signals([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP], move |_| {
        if let Some(message) = message.take() {
            if io::stderr().is_terminal() {
                // Past the progress bar.
                eprintln!();
            }
            complain(program, message());
            std::process::exit(Exit::Failed as i32);
        }
    })
}

/// From now on, blocks these signals in this thread and all that it starts later. A thread of its
/// own passes each signal to `act`.
///
/// # Errors
/// When the system has no room for a thread.
pub fn on_signals(
    signals: impl IntoIterator<Item = Signal>,
    mut act: impl FnMut(Signal) + Send + 'static,
) -> io::Result<()> {
    let signals: SigSet = signals.into_iter().collect();
    signals.thread_block()?;
    thread("wb-signals").spawn(move || {
        while let Ok(signal) = signals.wait() {
            act(signal);
        }
    })?;
    Ok(())
}

/// Whether a terminal may have colours: not if its user has set `NO_COLOR` (no-color.org).
pub fn wants_colours() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
}

fn wrapped(text: &str, indent: &str, columns: u16) -> String {
    let options = textwrap::Options::new(columns.into())
        .subsequent_indent(indent)
        // Paths and options must not be split.
        .word_splitter(textwrap::WordSplitter::NoHyphenation)
        .break_words(false);
    textwrap::fill(text, options)
}

/// Standard output. If its reader goes away early, that is not an error: the rest is discarded, and
/// the exit code still tells what the program found.
pub struct Output {
    stdout: BufWriter<StdoutLock<'static>>,
    closed: bool,
}

impl Output {
    /// Prints a value as one line of JSON.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        let line = serde_json::to_string(value)?;
        writeln!(self, "{line}")
    }

    /// Prints a text on one line. On a terminal that is too narrow, breaks it between words, and
    /// starts each line but the first with `indent`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn text(&mut self, text: &str, indent: &str) -> io::Result<()> {
        match self.columns() {
            Some(columns) => writeln!(self, "{}", wrapped(text, indent, columns)),
            None => writeln!(self, "{text}"),
        }
    }

    /// Whether colours may be used: on a terminal, if [`wants_colours`].
    pub fn is_coloured(&self) -> bool {
        wants_colours() && io::stdout().is_terminal()
    }

    /// The number of columns of the terminal; `None` if the output is not a terminal.
    pub fn columns(&self) -> Option<u16> {
        table::columns()
    }

    /// Whether the reader has gone away.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    fn unless_closed<T>(&mut self, done: io::Result<T>, when_closed: T) -> io::Result<T> {
        match done {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(when_closed)
            }
            other => other,
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.closed {
            return Ok(bytes.len());
        }
        let done = self.stdout.write(bytes);
        self.unless_closed(done, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let done = self.stdout.flush();
        self.unless_closed(done, ())
    }
}

/// Reads and writes devices.
pub struct Io {
    reactor: Reactor,
}

impl Io {
    /// Starts io_uring.
    ///
    /// # Errors
    /// When the kernel offers no io_uring or forbids it.
    pub fn start() -> io::Result<Io> {
        let reactor = Reactor::start().map_err(|e| {
            let hint = match e.kind() {
                ErrorKind::PermissionDenied => "; see the sysctl kernel.io_uring_disabled",
                _ => "",
            };
            io::Error::new(e.kind(), format!("cannot use io_uring, which wb needs: {e}{hint}"))
        })?;
        Ok(Io { reactor })
    }

    /// Opens and locks a device.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(&self, path: &Path, access: Access) -> Result<Device, OpenError> {
        Ok(self.serve(open(path, access)?))
    }

    /// Serves a device that is open already.
    pub fn serve(&self, opened: Opened) -> Device {
        Arc::new(UringDevice::new(self.reactor.handle(), opened))
    }

    /// What runs the background tasks of a cache.
    pub fn runtime(&self) -> Arc<Handle> {
        Arc::new(self.reactor.handle().clone())
    }

    /// Reads and verifies every slot, on all processors, and passes each to `visit` in device
    /// order.
    ///
    /// # Errors
    /// When the system has no room for threads.
    pub fn scan(
        &self,
        device: &Device,
        geometry: Geometry,
        visit: impl FnMut(Slot, &SlotContent),
    ) -> io::Result<Vec<SlotState>> {
        let workers = Workers::start()?;
        Ok(self.block_on(scan_by(device, geometry, |read| workers.run(read), visit)))
    }

    /// How many dirty blocks the log of a device holds. Shows progress.
    ///
    /// # Errors
    /// As [`live::dirty_blocks`].
    pub fn dirty_blocks(&self, device: &Device, superblock: &Superblock) -> Result<u64, LogError> {
        let lap = superblock.geometry.lap();
        let mut progress = Progress::new("looking for dirty blocks", lap, SEGMENT_BYTES);
        let visit = |slot: Slot| progress.set(u64::from(slot.0));
        self.block_on(live::dirty_blocks(device, superblock, visit))
    }

    /// Runs a future to its end.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.reactor.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use super::{without_numbers, wrapped};

    #[test]
    fn a_message_says_in_words_what_the_system_said() {
        let error = std::io::Error::from_raw_os_error(2);
        assert_eq!(without_numbers(&format!("a: {error}; b: {error}")), {
            let words = "No such file or directory";
            format!("a: {words}; b: {words}")
        });
        for kept in ["", "a (os error x)", "b (os error )", "c (os error 5"] {
            assert_eq!(without_numbers(kept), kept);
        }
    }

    #[test]
    fn a_long_text_breaks_between_words_and_never_within_one() {
        let text = "  - copy /dev/disk/by-id/nvme-very-long-name first";
        let lines = ["  - copy", "    /dev/disk/by-id/nvme-very-long-name", "    first"];
        assert_eq!(wrapped(text, "    ", 20), lines.join("\n"));
        assert_eq!(wrapped(text, "    ", 80), text);
    }
}
