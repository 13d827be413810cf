//! The daemon's log: one line per event on standard error. To the journal, each goes with its level.

use libwb::cli::wants_colours;
use std::io::{self, IsTerminal, Write};
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Where the user says what is to be logged.
const VARIABLE: &str = "WB_LOG";

/// Starts the log.
pub(crate) fn to_stderr() {
    let (filter, wrong) = filter();
    let to_journal = is_journal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_level(!to_journal)
        .without_time()
        .with_ansi(io::stderr().is_terminal() && wants_colours())
        .with_writer(Stderr { to_journal })
        .init();
    if let Some(wrong) = wrong {
        tracing::warn!("{wrong}; the default is used");
    }
}

/// What is to be logged, and what is wrong with what the user wants.
fn filter() -> (EnvFilter, Option<String>) {
    let default = EnvFilter::new("warn,libwb=info,wbctl=info");
    let Some(wanted) = std::env::var_os(VARIABLE) else { return (default, None) };
    match EnvFilter::try_from_env(VARIABLE) {
        Ok(filter) => (filter, None),
        Err(why) => (default, Some(format!("{VARIABLE}={}: {why}", wanted.display()))),
    }
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
