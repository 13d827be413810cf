//! What an administrator may set. Names and ranges are the kernel module's (from its readme and its
//! own test suite). Here `nr_max_batched_writeback` may be larger, and some tunables are new.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

/// A cache's tunables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunables {
    /// Write-back leaves the backing device alone when others kept it busy for at least this many
    /// percent of the last second. 0: nothing is written back until the log is nearly full.
    pub writeback_threshold: u32,
    /// The most segments that write-back takes at a time; more of them merge better.
    pub nr_max_batched_writeback: u32,
    /// In which order data is written back, and so what the backing device alone holds meanwhile.
    pub writeback_order: WritebackOrder,
    /// Where writes go first.
    pub write_mode: WriteMode,
    /// Large writes of sequences longer than this many KiB go around the cache. 0: none do.
    pub sequential_cutoff: u32,
    /// How many seconds a write may stay volatile without a flush; 0: for ever.
    pub sync_data_interval: u32,
    /// How many seconds requests wait for a lost connection to the server of the backing device
    /// before they fail; 0: no limit.
    pub backing_timeout: u32,
    /// Blocks that are read repeatedly from the backing device are put into the cache, except in
    /// sequences of more neighbouring blocks than this. 0: none are.
    pub read_cache_threshold: u32,
    /// The most blocks that wait in memory to be put into the cache for reads, 4 KiB each.
    pub nr_read_cache_cells: u32,
    /// The kernel module updates the superblock record every this many seconds. Here the record is
    /// always up to date; the tunable is kept for scripts that set or read it.
    pub update_sb_record_interval: u32,
}

/// Where writes go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WriteMode {
    /// To the log.
    #[default]
    Back,
    /// To the backing device; what is written is cached for reads.
    Through,
    /// To the backing device; the cache drops what it holds of it.
    Around,
}

/// What the backing device alone holds while write-back is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WritebackOrder {
    /// Everything up to the last batch, and any part of the batch under way, which writes the
    /// newest version of each block.
    Sorted,
    /// Everything up to some flush, and any part of what was written between that flush and the
    /// next.
    Strict,
}

/// The value of a tunable, as people and files write it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TunableValue {
    /// A number.
    Number(u32),
    /// One of a few words.
    Word(String),
}

impl fmt::Display for TunableValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TunableValue::Number(number) => number.fmt(f),
            TunableValue::Word(word) => word.fmt(f),
        }
    }
}

/// Why a tunable cannot be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TunableError {
    /// No tunable has that name.
    #[error("unknown tunable '{key}'; known: {}", Tunables::keys().collect::<Vec<_>>().join(", "))]
    Unknown {
        /// The name.
        key: String,
    },
    /// Not a number, or out of range.
    #[error(
        "{key}={value}: must be a number from {} to {}{}",
        range.start(),
        range.end(),
        counting(unit)
    )]
    Range {
        /// The name.
        key: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        range: RangeInclusive<u32>,
        /// What the number counts; empty for a plain one.
        unit: &'static str,
    },
    /// Not one of the words that it takes.
    #[error("{key}={value}: must be one of: {}", words.join(", "))]
    Word {
        /// The name.
        key: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        words: &'static [&'static str],
    },
    /// It would break what another promises.
    #[error(
        "with writeback_order=strict all writes go through the log; set {key}={} first, or \
         writeback_order=sorted",
        if *key == "write_mode" { "back" } else { "0" }
    )]
    Conflict {
        /// The name.
        key: &'static str,
    },
    /// Not of the form KEY=VALUE.
    #[error("'{text}': must be KEY=VALUE")]
    Syntax {
        /// What was given.
        text: String,
    },
}

const KIB: &str = "KiB";

/// The unit of a number, in brackets.
fn counting(unit: &str) -> String {
    match unit {
        "" => String::new(),
        KIB => format!(" ({KIB}; or a size such as 4M)"),
        unit => format!(" ({unit})"),
    }
}

/// Reads a size such as "4096", "512M" or "10GiB", in bytes. Units are powers of 1024: K, M, G, T,
/// with or without "iB"; "B" stands for bytes. `None` when it is no such size, or too large for
/// 64 bits.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let powers = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 1,
        "m" | "mib" => 2,
        "g" | "gib" => 3,
        "t" | "tib" => 4,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << (10 * powers))
}

/// The values that a tunable takes, and how it is read and set. Words stand for numbers from 0 on.
struct Definition {
    key: &'static str,
    default: u32,
    range: RangeInclusive<u32>,
    /// What a number counts, for people.
    unit: &'static str,
    words: &'static [&'static str],
    get: fn(&Tunables) -> u32,
    set: fn(&mut Tunables, u32),
}

const DEFINITIONS: &[Definition] = &[
    Definition {
        key: "writeback_threshold",
        default: 70,
        range: 0..=100,
        unit: "%",
        words: &[],
        get: |t| t.writeback_threshold,
        set: |t, value| t.writeback_threshold = value,
    },
    Definition {
        key: "nr_max_batched_writeback",
        default: 4096,
        range: 1..=4096,
        unit: "segments",
        words: &[],
        get: |t| t.nr_max_batched_writeback,
        set: |t, value| t.nr_max_batched_writeback = value,
    },
    Definition {
        key: "writeback_order",
        default: 0,
        range: 0..=1,
        unit: "",
        words: &["sorted", "strict"],
        get: |t| u32::from(t.writeback_order == WritebackOrder::Strict),
        set: |t, value| {
            t.writeback_order =
                if value == 1 { WritebackOrder::Strict } else { WritebackOrder::Sorted };
        },
    },
    Definition {
        key: "write_mode",
        default: 0,
        range: 0..=2,
        unit: "",
        words: &["back", "through", "around"],
        get: |t| match t.write_mode {
            WriteMode::Back => 0,
            WriteMode::Through => 1,
            WriteMode::Around => 2,
        },
        set: |t, value| {
            t.write_mode = match value {
                0 => WriteMode::Back,
                1 => WriteMode::Through,
                _ => WriteMode::Around,
            };
        },
    },
    Definition {
        key: "sequential_cutoff",
        default: 0,
        range: 0..=1 << 20,
        unit: KIB,
        words: &[],
        get: |t| t.sequential_cutoff,
        set: |t, value| t.sequential_cutoff = value,
    },
    Definition {
        key: "sync_data_interval",
        default: 0,
        range: 0..=3600,
        unit: "s",
        words: &[],
        get: |t| t.sync_data_interval,
        set: |t, value| t.sync_data_interval = value,
    },
    Definition {
        key: "backing_timeout",
        default: 0,
        range: 0..=30 * 86400,
        unit: "s",
        words: &[],
        get: |t| t.backing_timeout,
        set: |t, value| t.backing_timeout = value,
    },
    Definition {
        key: "read_cache_threshold",
        default: 0,
        range: 0..=127,
        unit: "blocks",
        words: &[],
        get: |t| t.read_cache_threshold,
        set: |t, value| t.read_cache_threshold = value,
    },
    Definition {
        key: "nr_read_cache_cells",
        default: 2048,
        range: 1..=2048,
        unit: "blocks",
        words: &[],
        get: |t| t.nr_read_cache_cells,
        set: |t, value| t.nr_read_cache_cells = value,
    },
    Definition {
        key: "update_sb_record_interval",
        default: 0,
        range: 0..=3600,
        unit: "s",
        words: &[],
        get: |t| t.update_sb_record_interval,
        set: |t, value| t.update_sb_record_interval = value,
    },
];

/// The kernel module's name for a mode: 1 is `around`, 0 is `back`. It can be set, and shows as
/// `write_mode`.
const WRITE_AROUND: Definition = Definition {
    key: "write_around_mode",
    default: 0,
    range: 0..=1,
    unit: "",
    words: &[],
    get: |t| u32::from(t.write_mode == WriteMode::Around),
    set: |t, value| t.write_mode = if value == 1 { WriteMode::Around } else { WriteMode::Back },
};

fn definition(key: &str) -> Option<&'static Definition> {
    DEFINITIONS.iter().chain([&WRITE_AROUND]).find(|definition| definition.key == key)
}

impl Default for Tunables {
    fn default() -> Tunables {
        let mut tunables = Tunables {
            writeback_threshold: 0,
            nr_max_batched_writeback: 0,
            writeback_order: WritebackOrder::Sorted,
            sync_data_interval: 0,
            backing_timeout: 0,
            read_cache_threshold: 0,
            nr_read_cache_cells: 0,
            write_mode: WriteMode::Back,
            sequential_cutoff: 0,
            update_sb_record_interval: 0,
        };
        for definition in DEFINITIONS {
            (definition.set)(&mut tunables, definition.default);
        }
        tunables
    }
}

impl Definition {
    fn parse(&self, value: &str) -> Result<u32, TunableError> {
        if self.words.is_empty() {
            let number = value.parse().ok().or_else(|| self.parse_size(value));
            let number = number.filter(|number| self.range.contains(number));
            let (key, range, unit) = (self.key, self.range.clone(), self.unit);
            return number.ok_or_else(|| TunableError::Range {
                key,
                value: value.into(),
                range,
                unit,
            });
        }
        let (key, words) = (self.key, self.words);
        let word = self.range.clone().zip(words).find(|(_, word)| **word == value);
        word.map(|(number, _)| number).ok_or_else(|| TunableError::Word {
            key,
            value: value.into(),
            words,
        })
    }

    /// Reads a size with its unit, in KiB, where that is what the number counts.
    fn parse_size(&self, value: &str) -> Option<u32> {
        let bytes =
            parse_size(value).filter(|bytes| self.unit == KIB && bytes.is_multiple_of(1024))?;
        u32::try_from(bytes / 1024).ok()
    }

    fn value(&self, number: u32) -> TunableValue {
        let word = self.range.clone().zip(self.words).find(|(n, _)| *n == number);
        word.map_or(TunableValue::Number(number), |(_, word)| TunableValue::Word((*word).into()))
    }
}

impl Tunables {
    /// The names of all tunables.
    pub fn keys() -> impl Iterator<Item = &'static str> {
        DEFINITIONS.iter().map(|definition| definition.key)
    }

    /// The name under which a tunable shows that can be set under this one.
    pub fn name_of(key: &str) -> &str {
        if key == WRITE_AROUND.key { "write_mode" } else { key }
    }

    /// What the numbers of a tunable count, for people. Empty for a plain number, a word, and an
    /// unknown tunable.
    pub fn unit(key: &str) -> &'static str {
        definition(key).map_or("", |definition| definition.unit)
    }

    /// How long requests wait for a lost connection to the backing device; `None`: no limit.
    pub(crate) fn link_timeout(&self) -> Option<Duration> {
        (self.backing_timeout > 0).then(|| Duration::from_secs(self.backing_timeout.into()))
    }

    /// Whether the tunables go together.
    ///
    /// # Errors
    /// When one promises what another breaks.
    pub fn check(&self) -> Result<(), TunableError> {
        let around = match (self.write_mode, self.sequential_cutoff) {
            (WriteMode::Back, 0) => None,
            (WriteMode::Back, _) => Some("sequential_cutoff"),
            _ => Some("write_mode"),
        };
        match around.filter(|_| self.writeback_order == WritebackOrder::Strict) {
            None => Ok(()),
            Some(key) => Err(TunableError::Conflict { key }),
        }
    }

    /// Sets one tunable from its name and value.
    ///
    /// # Errors
    /// When there is no such tunable, or it does not take the value.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), TunableError> {
        let definition =
            definition(key).ok_or_else(|| TunableError::Unknown { key: key.into() })?;
        (definition.set)(self, definition.parse(value)?);
        Ok(())
    }

    /// Sets one tunable from `KEY=VALUE`.
    ///
    /// # Errors
    /// As [`Tunables::set`], and when the text has no `=`.
    pub fn set_pair(&mut self, text: &str) -> Result<(), TunableError> {
        let (key, value) =
            text.split_once('=').ok_or_else(|| TunableError::Syntax { text: text.into() })?;
        self.set(key, value)
    }

    /// Names and values of all tunables.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, TunableValue)> {
        DEFINITIONS
            .iter()
            .map(|definition| (definition.key, definition.value((definition.get)(self))))
    }
}

impl fmt::Display for Tunables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, (key, value)) in self.pairs().enumerate() {
            write!(f, "{}{key}={value}", if nth == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}
