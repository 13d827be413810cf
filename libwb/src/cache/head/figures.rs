//! What the cache has counted, where it outlives the process.

use super::{Head, at};
use crate::format::BLOCK_BYTES;
use std::sync::atomic::{AtomicU64, Ordering};

/// The number of a figure: a word of the head.
#[derive(Clone, Copy)]
pub(crate) struct Figure(pub(crate) usize);

impl Figure {
    pub(crate) const COUNTERS: usize = 0;
    pub(crate) const ACCESSES: usize = 32;
    pub(crate) const LATENCIES: usize = 64;
    /// When the counters started anew, in milliseconds of the wall clock.
    pub(crate) const SINCE: Figure = Figure(255);
}

/// Numbers that a cache counts.
#[derive(Clone)]
pub(crate) struct Figures {
    head: Head,
    /// Where they begin, in bytes.
    start: usize,
}

impl Figures {
    /// How many there are.
    pub(crate) const COUNT: usize = 256;

    /// The present ones.
    pub(crate) fn of(head: Head) -> Figures {
        Figures { head, start: at::FIGURES }
    }

    /// Those of the time when the counters started anew.
    pub(crate) fn baseline(&self) -> Figures {
        Figures { head: self.head.clone(), start: self.start + 8 * Figures::COUNT }
    }

    pub(crate) fn get(&self, figure: Figure) -> u64 {
        self.word(figure).load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, figure: Figure, value: u64) {
        self.word(figure).store(value, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, figure: Figure, n: u64) {
        self.word(figure).fetch_add(n, Ordering::Relaxed);
    }

    fn word(&self, Figure(nth): Figure) -> &AtomicU64 {
        assert!(nth < Figures::COUNT, "a figure beyond the last");
        self.head.memory.word(self.start + 8 * nth)
    }
}

const _: () = assert!(2 * 8 * Figures::COUNT == BLOCK_BYTES);
