//! The daemon's log: one line per event on standard error. To the journal, each goes with its level.

use std::io::{self, IsTerminal, Write};
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Starts the log.
pub(crate) fn to_stderr() {
    let filter =
        EnvFilter::try_from_env("WB_LOG").unwrap_or_else(|_| EnvFilter::new("warn,libwb=info,wbctl=info"));
    let to_journal = is_journal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_level(!to_journal)
        .without_time()
        .with_ansi(io::stderr().is_terminal())
        .with_writer(Stderr { to_journal })
        .init();
}

/// Whether standard error is the stream that systemd has made to the journal, and not, say, redirected since.
fn is_journal() -> bool {
    let told = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    nix::sys::stat::fstat(io::stderr()).is_ok_and(|stat| told == format!("{}:{}", stat.st_dev, stat.st_ino))
}

struct Stderr {
    to_journal: bool,
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { prefix: "" }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Line {
        Line { prefix: if self.to_journal { priority(*event.level()) } else { "" } }
    }
}

/// A level as the journal reads it at the beginning of a line; see sd-daemon(3).
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Takes an event, which comes as one piece.
struct Line {
    prefix: &'static str,
}

impl Write for Line {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = [self.prefix.as_bytes(), event].concat();
        io::stderr().write_all(&line).map(|()| event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
