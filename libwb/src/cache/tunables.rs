//! What an administrator may set. Names and ranges are the kernel module's.

use std::fmt;
use std::ops::RangeInclusive;

/// A cache's tunables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunables {
    /// How many segments write-back takes at a time; more of them merge better.
    pub nr_max_batched_writeback: u32,
}

impl Default for Tunables {
    fn default() -> Tunables {
        Tunables { nr_max_batched_writeback: 32 }
    }
}

/// Why a tunable cannot be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunableError {
    /// There is none of that name.
    #[error("unknown tunable '{key}'; known: {}", Tunables::KEYS.join(", "))]
    Unknown {
        /// The name.
        key: String,
    },
    /// Not a number, or out of range.
    #[error("{key}={value}: must be a number from {} to {}", range.start(), range.end())]
    Range {
        /// The name.
        key: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        range: RangeInclusive<u32>,
    },
    /// Not of the form KEY=VALUE.
    #[error("'{text}': must be KEY=VALUE")]
    Syntax {
        /// What was given.
        text: String,
    },
}

impl Tunables {
    const NR_MAX_BATCHED_WRITEBACK: &str = "nr_max_batched_writeback";
    /// The names of all tunables.
    pub const KEYS: [&str; 1] = [Self::NR_MAX_BATCHED_WRITEBACK];

    /// Sets one tunable from its name and value.
    ///
    /// # Errors
    /// When there is no such tunable, or the value is out of its range.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), TunableError> {
        match key {
            Self::NR_MAX_BATCHED_WRITEBACK => {
                self.nr_max_batched_writeback = number(Self::NR_MAX_BATCHED_WRITEBACK, value, 1..=1024)?;
            }
            _ => return Err(TunableError::Unknown { key: key.into() }),
        }
        Ok(())
    }

    /// Sets one tunable from `KEY=VALUE`.
    ///
    /// # Errors
    /// As [`Tunables::set`], and when the text has no `=`.
    pub fn set_pair(&mut self, text: &str) -> Result<(), TunableError> {
        let (key, value) = text.split_once('=').ok_or_else(|| TunableError::Syntax { text: text.into() })?;
        self.set(key, value)
    }

    /// Names and values of all tunables.
    pub fn pairs(&self) -> [(&'static str, u32); 1] {
        [(Self::NR_MAX_BATCHED_WRITEBACK, self.nr_max_batched_writeback)]
    }
}

impl fmt::Display for Tunables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, (key, value)) in self.pairs().iter().enumerate() {
            write!(f, "{}{key}={value}", if nth == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

fn number(key: &'static str, value: &str, range: RangeInclusive<u32>) -> Result<u32, TunableError> {
    let parsed = value.parse().ok().filter(|n| range.contains(n));
    parsed.ok_or_else(|| TunableError::Range { key, value: value.into(), range })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_and_values_out_of_range_are_refused_by_name() {
        let mut tunables = Tunables::default();
        tunables.set_pair("nr_max_batched_writeback=1024").unwrap();
        assert_eq!(tunables.to_string(), "nr_max_batched_writeback=1024");
        let message = |text| Tunables::default().set_pair(text).unwrap_err().to_string();
        assert_eq!(
            message("nr_max_batched_writeback=0"),
            "nr_max_batched_writeback=0: must be a number from 1 to 1024"
        );
        assert_eq!(message("colour=red"), "unknown tunable 'colour'; known: nr_max_batched_writeback");
        assert_eq!(message("colour"), "'colour': must be KEY=VALUE");
    }
}
