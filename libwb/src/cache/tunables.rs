//! What an administrator may set. Names and ranges are the kernel module's (its readme and its own test suite), but
//! for `nr_max_batched_writeback`, which may be larger here, and for what the module lacks.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;

/// A cache's tunables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunables {
    /// Write-back leaves the backing device alone while that was busy for at least so many percent of the last second.
    /// 0: nothing is written back until the log is nearly full.
    pub writeback_threshold: u32,
    /// How many segments write-back takes at a time, at most; more of them merge better.
    pub nr_max_batched_writeback: u32,
    /// Whether the backing device alone is a true prefix of the write history at all times, flush by flush.
    pub writeback_order: WritebackOrder,
    /// How many seconds a write may stay volatile without a flush; 0: for ever.
    pub sync_data_interval: u32,
    /// Blocks that are read again and again from the backing device are put into the cache, but for sequences of more
    /// neighbouring blocks than this. 0: none are.
    pub read_cache_threshold: u32,
    /// How many such blocks wait in memory at a time for their way into the cache, 4 KiB each.
    pub nr_read_cache_cells: u32,
}

/// What the backing device alone holds while write-back is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WritebackOrder {
    /// All up to the last batch, and any part of the batch under way: the newest version of each block.
    Sorted,
    /// All up to some flush, and any part of what was written between that and the next.
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
pub enum TunableError {
    /// There is none of that name.
    #[error("unknown tunable '{key}'; known: {}", Tunables::keys().collect::<Vec<_>>().join(", "))]
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
    /// None of the words that it takes.
    #[error("{key}={value}: must be one of: {}", words.join(", "))]
    Word {
        /// The name.
        key: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        words: &'static [&'static str],
    },
    /// Not of the form KEY=VALUE.
    #[error("'{text}': must be KEY=VALUE")]
    Syntax {
        /// What was given.
        text: String,
    },
}

/// The values that a tunable takes, and how it is read and set. Words stand for numbers from 0 on.
struct Definition {
    key: &'static str,
    default: u32,
    range: RangeInclusive<u32>,
    words: &'static [&'static str],
    get: fn(&Tunables) -> u32,
    set: fn(&mut Tunables, u32),
}

const DEFINITIONS: &[Definition] = &[
    Definition {
        key: "writeback_threshold",
        default: 70,
        range: 0..=100,
        words: &[],
        get: |t| t.writeback_threshold,
        set: |t, value| t.writeback_threshold = value,
    },
    Definition {
        key: "nr_max_batched_writeback",
        default: 1024,
        range: 1..=1024,
        words: &[],
        get: |t| t.nr_max_batched_writeback,
        set: |t, value| t.nr_max_batched_writeback = value,
    },
    Definition {
        key: "writeback_order",
        default: 0,
        range: 0..=1,
        words: &["sorted", "strict"],
        get: |t| u32::from(t.writeback_order == WritebackOrder::Strict),
        set: |t, value| {
            t.writeback_order = if value == 1 { WritebackOrder::Strict } else { WritebackOrder::Sorted };
        },
    },
    Definition {
        key: "sync_data_interval",
        default: 0,
        range: 0..=3600,
        words: &[],
        get: |t| t.sync_data_interval,
        set: |t, value| t.sync_data_interval = value,
    },
    Definition {
        key: "read_cache_threshold",
        default: 0,
        range: 0..=127,
        words: &[],
        get: |t| t.read_cache_threshold,
        set: |t, value| t.read_cache_threshold = value,
    },
    Definition {
        key: "nr_read_cache_cells",
        default: 2048,
        range: 1..=2048,
        words: &[],
        get: |t| t.nr_read_cache_cells,
        set: |t, value| t.nr_read_cache_cells = value,
    },
];

impl Default for Tunables {
    fn default() -> Tunables {
        let mut tunables = Tunables {
            writeback_threshold: 0,
            nr_max_batched_writeback: 0,
            writeback_order: WritebackOrder::Sorted,
            sync_data_interval: 0,
            read_cache_threshold: 0,
            nr_read_cache_cells: 0,
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
            let number = value.parse().ok().filter(|number| self.range.contains(number));
            let (key, range) = (self.key, self.range.clone());
            return number.ok_or_else(|| TunableError::Range { key, value: value.into(), range });
        }
        let (key, words) = (self.key, self.words);
        let word = self.range.clone().zip(words).find(|(_, word)| **word == value);
        word.map(|(number, _)| number).ok_or_else(|| TunableError::Word { key, value: value.into(), words })
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

    /// Sets one tunable from its name and value.
    ///
    /// # Errors
    /// When there is no such tunable, or the value is none that it takes.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), TunableError> {
        let definition = DEFINITIONS.iter().find(|definition| definition.key == key);
        let definition = definition.ok_or_else(|| TunableError::Unknown { key: key.into() })?;
        (definition.set)(self, definition.parse(value)?);
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
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, TunableValue)> {
        DEFINITIONS.iter().map(|definition| (definition.key, definition.value((definition.get)(self))))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tunable_keeps_what_it_is_set_to() {
        for definition in DEFINITIONS {
            let mut tunables = Tunables::default();
            assert_eq!((definition.get)(&tunables), definition.default, "{}", definition.key);
            for number in [*definition.range.start(), *definition.range.end()] {
                tunables.set(definition.key, &definition.value(number).to_string()).unwrap();
                assert_eq!((definition.get)(&tunables), number, "{}", definition.key);
            }
        }
    }

    #[test]
    fn unknown_keys_and_values_out_of_range_are_refused_by_name() {
        let mut tunables = Tunables::default();
        tunables.set_pair("nr_max_batched_writeback=1024").unwrap();
        assert!(tunables.to_string().contains("nr_max_batched_writeback=1024 writeback_order=sorted"));
        let message = |text| Tunables::default().set_pair(text).unwrap_err().to_string();
        assert_eq!(
            message("nr_max_batched_writeback=0"),
            "nr_max_batched_writeback=0: must be a number from 1 to 1024"
        );
        assert_eq!(message("writeback_order=odd"), "writeback_order=odd: must be one of: sorted, strict");
        assert!(message("colour=red").starts_with("unknown tunable 'colour'; known: writeback_threshold, "));
        assert_eq!(message("colour"), "'colour': must be KEY=VALUE");
    }
}
