//! The daemon's log: one line per event on standard error. For the journal, each line carries its
//! level.
//!
//! The reader of the log may stall, go away, or depend on the volume itself. So a thread of its own
//! writes the lines, and no other thread waits for it. It counts lines that it cannot keep up with,
//! and reports their number. Lines that it cannot write are lost.

mod limits;

use crate::logging::limits::Limits;
use libwb::cli::wants_colours;
use libwb::runtime::thread;
use nix::errno::Errno;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use tracing::callsite::Identifier;
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// The environment variable that sets what is logged.
const VARIABLE: &str = "WB_LOG";
/// The maximum number of lines that wait to be written. Further lines are dropped.
const ROOM: usize = 1024;
/// How often the thread checks for held-back lines that it may write now.
const TICK: Duration = Duration::from_secs(1);
/// How long the shutdown waits for the last lines.
const LAST: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<Queue> = OnceLock::new();

struct Queue {
    to_journal: bool,
    lines: SyncSender<Message>,
    lost: AtomicU64,
    limits: Mutex<Limits<Identifier>>,
}

enum Message {
    Line(Vec<u8>),
    /// Asks to write everything before it, and then to confirm.
    Flush(SyncSender<()>),
}

/// Starts the log. Call it once.
///
/// # Errors
/// When the system has no room for a thread.
pub(crate) fn to_stderr() -> io::Result<()> {
    let (filter, wrong) = filter();
    let (lines, waiting) = sync_channel(ROOM);
    // Not through the handle of std: its lock would be held as long as a write blocks.
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let queue = QUEUE.get_or_init(|| Queue {
        to_journal: is_journal(),
        lines,
        lost: AtomicU64::new(0),
        limits: Mutex::default(),
    });
    thread("wb-log").spawn(move || write_lines(&waiting, queue, stderr))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_level(!queue.to_journal)
        .without_time()
        .with_ansi(io::stderr().is_terminal() && wants_colours())
        .log_internal_errors(false)
        .with_writer(queue)
        .init();
    if let Some(wrong) = wrong {
        tracing::warn!("{wrong}; the default is used");
    }
    Ok(())
}

/// The filter, and the error in the user's setting, if there is one.
fn filter() -> (EnvFilter, Option<String>) {
    let default = EnvFilter::new("warn,libwb=info,wbctl=info");
    let Some(wanted) = std::env::var_os(VARIABLE) else { return (default, None) };
    match EnvFilter::try_from_env(VARIABLE) {
        Ok(filter) => (filter, None),
        Err(why) => (default, Some(format!("{VARIABLE}={}: {why}", wanted.display()))),
    }
}

/// Whether standard error is the stream to the journal that systemd opened, and was not redirected
/// since.
fn is_journal() -> bool {
    let told = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    nix::sys::stat::fstat(io::stderr())
        .is_ok_and(|stat| told == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Writes lines until the process ends.
fn write_lines(waiting: &Receiver<Message>, queue: &Queue, mut stderr: File) {
    // There is nowhere to report an error to.
    let mut write = |line: &[u8]| _ = stderr.write_all(line);
    let mut may_hold_back = false;
    loop {
        let message = match may_hold_back {
            true => waiting.recv_timeout(TICK),
            // No line is held back before others were written.
            false => waiting.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let flushed = match message {
            Ok(Message::Line(line)) => {
                write(&line);
                None
            }
            Ok(Message::Flush(flushed)) => Some(flushed),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let lost = queue.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let text =
                format!("{lost} lines of the log were lost here: it was not read fast enough\n");
            write(&queue.raw(Level::WARN, &text));
        }
        let due;
        (due, may_hold_back) = queue.due(flushed.is_some());
        due.iter().for_each(|line| write(line));
        if let Some(flushed) = flushed {
            let _ = flushed.try_send(());
        }
    }
}

/// Writes a line that is exempt from the limits, such as the last one.
pub(crate) fn line(text: &str) {
    if let Some(queue) = QUEUE.get() {
        queue.push(queue.raw(Level::ERROR, &format!("{text}\n")));
    }
}

/// Waits a moment until everything logged is written.
pub(crate) fn finish() {
    let Some(queue) = QUEUE.get() else { return };
    let until = Instant::now() + LAST;
    let (flushed, done) = sync_channel(1);
    let mut message = Message::Flush(flushed);
    while let Err(TrySendError::Full(again)) = queue.lines.try_send(message) {
        if Instant::now() > until {
            return;
        }
        message = again;
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = done.recv_timeout(until.saturating_duration_since(Instant::now()));
}

impl Queue {
    fn push(&self, line: Vec<u8>) {
        if self.lines.try_send(Message::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The summaries that are due, at the `end` all, and whether more may be soon.
    fn due(&self, end: bool) -> (Vec<Vec<u8>>, bool) {
        let Ok(mut limits) = self.limits.lock() else { return (Vec::new(), false) };
        (limits.due(Instant::now(), end), limits.may_hold_back())
    }

    /// A line as it is written; for the journal, with its level.
    fn raw(&self, level: Level, line: &str) -> Vec<u8> {
        [self.prefix(level), line].concat().into_bytes()
    }

    /// A level as the journal reads it at the beginning of a line; see sd-daemon(3).
    fn prefix(&self, level: Level) -> &'static str {
        match level {
            _ if !self.to_journal => "",
            Level::ERROR => "<3>",
            Level::WARN => "<4>",
            Level::INFO => "<6>",
            Level::DEBUG | Level::TRACE => "<7>",
        }
    }
}

impl<'a> MakeWriter<'a> for &'static Queue {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { queue: self, of: None }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Line {
        Line { queue: self, of: Some((event.callsite(), *event.level())) }
    }
}

/// Takes one event, which arrives in one piece.
struct Line {
    queue: &'static Queue,
    /// The place in the code that logs it, and its level.
    of: Option<(Identifier, Level)>,
}

impl Write for Line {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let Some((place, level)) = self.of.clone() else {
            self.queue.push(event.to_vec());
            return Ok(event.len());
        };
        let line = [self.queue.prefix(level).as_bytes(), event].concat();
        let mut limits = self.queue.limits.lock().map_err(|_| Errno::EIO)?;
        let said = limits.admit(place, line, Instant::now());
        drop(limits);
        said.into_iter().for_each(|line| self.queue.push(line));
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, pipe};
    use std::os::fd::OwnedFd;

    #[test]
    fn what_there_is_no_room_for_is_counted_and_the_count_is_said_in_its_place() {
        let (lines, waiting) = sync_channel(2);
        let (lost, limits) = (AtomicU64::new(0), Mutex::default());
        let queue: &Queue = Box::leak(Box::new(Queue { to_journal: true, lines, lost, limits }));
        (0..5).for_each(|n| queue.push(queue.raw(Level::INFO, &format!("line {n}\n"))));
        let (reader, writer) = pipe().expect("a pipe");
        std::thread::spawn(move || write_lines(&waiting, queue, File::from(OwnedFd::from(writer))));
        let written: Vec<String> =
            BufReader::new(reader).lines().take(3).map_while(Result::ok).collect();
        let lost = "<4>3 lines of the log were lost here: it was not read fast enough";
        assert_eq!(written, ["<6>line 0", lost, "<6>line 1"]);
    }
}
