//! Why clients are no longer served.

use crate::nbd::{ExportName, OptionError, WireError};
use std::io;
use std::time::Duration;

/// How much of a name that a client has sent is shown, in characters.
const MOST_SHOWN: usize = 100;

/// How long a client may take until it says which export it wants.
pub(super) const TO_NEGOTIATE: Duration = Duration::from_secs(30);

/// Why a client is no longer served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// It sent something that is not NBD.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// It set unknown flags.
    #[error("the client wants unknown flags: {0:#x}")]
    ClientFlags(u32),
    /// It asked for an export that does not exist.
    #[error("the client wants the unknown export '{}'", shown(.0))]
    UnknownExport(ExportName),
    /// It sent an option that makes no sense, and cannot be told so.
    #[error("an option of the client is not in order ({error:?}): {message}")]
    Option {
        /// What it would have been told.
        error: OptionError,
        /// Text for people.
        message: String,
    },
    /// It does not start TLS.
    #[error("the client does not start TLS")]
    NoTls,
    /// TLS cannot be started.
    #[error("cannot start TLS: {0}")]
    Tls(io::Error),
    /// It never chooses an export.
    #[error("the client has sent {0} options and chosen no export")]
    TooManyOptions(usize),
    /// It never chooses an export.
    #[error("the client has chosen no export within {} seconds", TO_NEGOTIATE.as_secs())]
    TooSlow,
    /// The server ends, and the client has not chosen an export yet.
    #[error("the server ends")]
    Stopped,
    /// It does not take its last replies.
    #[error("the client does not take its last replies")]
    NotTaken,
}

/// A name, without what would move the cursor or begin a new line, and not all of a long one.
fn shown(name: &ExportName) -> String {
    let mut characters = name.as_str().chars();
    let head: String = characters.by_ref().take(MOST_SHOWN).collect();
    let rest = if characters.next().is_some() { "…" } else { "" };
    format!("{}{rest}", head.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_shown_on_one_line_that_is_not_long() {
        let text = |name: &str| SessionError::UnknownExport(ExportName::new(name).unwrap());
        assert_eq!(
            text("a\n\x1b[2J").to_string(),
            r"the client wants the unknown export 'a\n\u{1b}[2J'"
        );
        let long = text(&"\u{1}".repeat(4096)).to_string();
        assert!(long.ends_with("…'") && long.len() < 10 * MOST_SHOWN, "{long}");
    }
}
