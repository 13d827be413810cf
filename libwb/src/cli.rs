//! What the programs share: exit codes, error messages, standard output, progress bars, and opening devices.

use crate::device::probe::{Access, OpenError, Opened, open};
use crate::device::{Device, UringDevice};
use crate::reactor::{Handle, Reactor};
use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Display;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, StdoutLock, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    /// wbcheck: errors were found and are still there.
    ErrorsLeft = 4,
    /// wbcheck: could not check.
    CouldNotCheck = 8,
}

impl Exit {
    /// wbcheck: errors were found, and all repaired.
    #[allow(non_upper_case_globals)] // named as the others
    pub const Repaired: Exit = Exit::Failed;
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Runs a program. An error becomes one line on standard error and the exit code `on_error`.
pub fn run<E: Display>(
    program: &str,
    on_error: Exit,
    body: impl FnOnce(&mut Output) -> Result<Exit, E>,
) -> ExitCode {
    let mut output = Output { stdout: BufWriter::new(io::stdout().lock()), closed: false };
    let ended = body(&mut output);
    let flushed = output.flush();
    // The alternate form gives an error's causes as well.
    let (exit, message) = match (ended, flushed) {
        (Ok(exit), Ok(())) => (exit, None),
        (Ok(_), Err(e)) => (on_error, Some(format!("cannot write the output: {e}"))),
        (Err(e), _) => (on_error, Some(format!("{e:#}"))),
    };
    if let Some(message) = message {
        complain(program, &message);
    }
    exit.into()
}

/// Prints one line on standard error, as far as that can be written.
pub fn complain(program: &str, message: impl Display) {
    let _ = writeln!(io::stderr(), "{program}: {message}");
}

/// Standard output. A reader that goes away early is no error: what would follow is thrown away, and the program's
/// exit code still says what it found.
pub struct Output {
    stdout: BufWriter<StdoutLock<'static>>,
    closed: bool,
}

impl Output {
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

/// A progress bar on standard error. It shows up only on a terminal, and only when the work has taken a second.
pub struct Progress {
    bar: ProgressBar,
    hidden_until: Option<Instant>,
}

impl Progress {
    const PATIENCE: Duration = Duration::from_secs(1);

    /// A bar for `total` units of work.
    pub fn new(what: &'static str, total: u64) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:40}] {percent}%, {eta} left") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what);
        let hidden_until = io::stderr().is_terminal().then(|| Instant::now() + Self::PATIENCE);
        Progress { bar, hidden_until }
    }

    /// A bar that never shows.
    pub fn none() -> Progress {
        Progress { bar: ProgressBar::hidden(), hidden_until: None }
    }

    /// Notes that `done` units are done in all.
    pub fn set(&mut self, done: u64) {
        if self.hidden_until.is_some_and(|when| Instant::now() >= when) {
            self.hidden_until = None;
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A size for people, such as "8 MiB" or "1.46 TiB".
pub fn human_size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string().replace(".00 ", " ")
}

/// A number with its noun, such as "1 segment" or "14 segments".
pub fn count(n: u64, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
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
        let reactor = Reactor::start()
            .map_err(|e| io::Error::new(e.kind(), format!("cannot use io_uring, which wb needs: {e}")))?;
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

    /// Runs a future to its end.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.reactor.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(human_size(0), "0 B");
        assert_eq!(human_size(8 << 20), "8 MiB");
        assert_eq!(human_size(3 << 39), "1.50 TiB");
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(count(1, "segment"), "1 segment");
        assert_eq!(count(0, "segment"), "0 segments");
    }
}
