//! How much of a corrupt log a salvage keeps.

use serde::Serialize;
use std::fmt;
use std::str::FromStr;

/// What to keep of a corrupt log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SalvageMode {
    /// Keep every valid segment. The blocks of a lost segment fall back to older versions, so the
    /// volume may end up in a state that it never had.
    Skip,
    /// Go back to the last consistent point, and give up the valid segments after it. The volume
    /// ends up in a state that it had before.
    Stop,
}

impl SalvageMode {
    /// Both modes.
    pub const ALL: [SalvageMode; 2] = [SalvageMode::Skip, SalvageMode::Stop];
}

impl FromStr for SalvageMode {
    type Err = String;

    fn from_str(text: &str) -> Result<SalvageMode, String> {
        let mode = SalvageMode::ALL.into_iter().find(|mode| mode.to_string() == text);
        mode.ok_or_else(|| "must be skip or stop".into())
    }
}

impl fmt::Display for SalvageMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SalvageMode::Skip => "skip",
            SalvageMode::Stop => "stop",
        })
    }
}
