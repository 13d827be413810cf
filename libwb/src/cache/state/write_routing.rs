//! Which writes go around the log:
//!
//! - all writes, in the modes `through` and `around`;
//! - with `sequential_cutoff`, large writes that continue a long sequence.

use crate::cache::tunables::{Tunables, WriteMode, WritebackOrder};
use crate::format::{SECTOR_BYTES, Sector, to_u64};

/// Sequences that are remembered. Beyond that, the one without a write for longest is forgotten.
const SEQUENCES: usize = 32;
/// Smaller writes of a sequence than this, in bytes, go through the log as others do: around it,
/// each costs a flush of the backing device.
const LARGE: usize = 128 << 10;

/// Which writes go around the log.
#[derive(Default)]
pub(crate) struct WriteRouting {
    mode: WriteMode,
    /// In sectors; 0: there is none.
    cutoff: u64,
    /// Neighbouring sectors that were written one after the other, the latest last.
    sequences: Vec<Sequence>,
}

#[derive(Clone, Copy)]
struct Sequence {
    start: Sector,
    end: Sector,
}

impl Sequence {
    fn length(self) -> u64 {
        self.end.0 - self.start.0
    }
}

impl WriteRouting {
    /// Whether dirty data is to stay in the log until the policy of write-back says otherwise. Else
    /// it is written back at once.
    pub(crate) fn keeps_dirty_data(&self) -> bool {
        self.mode == WriteMode::Back
    }

    pub(crate) fn configure(&mut self, tunables: &Tunables) {
        // What goes around the log is ahead of what strict order has yet to write back.
        let strict = tunables.writeback_order == WritebackOrder::Strict;
        self.mode = if strict { WriteMode::Back } else { tunables.write_mode };
        let kibibytes = if strict { 0 } else { tunables.sequential_cutoff };
        self.cutoff = u64::from(kibibytes) * 1024 / to_u64(SECTOR_BYTES);
        if self.cutoff == 0 {
            self.sequences.clear();
        }
    }

    /// A write comes. Returns whether it is to go around the log.
    #[inline]
    pub(crate) fn arrives(&mut self, sector: Sector, bytes: usize) -> bool {
        if self.cutoff > 0 && bytes > 0 {
            self.remember(Sequence { start: sector, end: end(sector, bytes) });
        }
        self.applies_to(sector, bytes)
    }

    /// The same, of a write that has come, or the rest of it.
    #[inline]
    pub(crate) fn applies_to(&self, sector: Sector, bytes: usize) -> bool {
        let end = end(sector, bytes);
        let has_it = |sequence: &&Sequence| sequence.start <= sector && end <= sequence.end;
        let goes_on =
            || self.sequences.iter().rev().find(has_it).is_some_and(|s| s.length() >= self.cutoff);
        self.mode != WriteMode::Back || (self.cutoff > 0 && bytes >= LARGE && goes_on())
    }

    /// Joins what was written to the sequences that end or begin there, for neighbours may come in
    /// any order.
    fn remember(&mut self, mut written: Sequence) {
        self.sequences.retain(|known| {
            let joins = known.end == written.start || written.end == known.start;
            if joins {
                written.start = written.start.min(known.start);
                written.end = written.end.max(known.end);
            }
            !joins
        });
        if self.sequences.len() == SEQUENCES {
            self.sequences.remove(0);
        }
        self.sequences.push(written);
    }
}

fn end(sector: Sector, bytes: usize) -> Sector {
    Sector(sector.0 + to_u64(bytes / SECTOR_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024 / SECTOR_BYTES as u64;

    fn routing(write_mode: WriteMode, sequential_cutoff: u32) -> WriteRouting {
        let mut routing = WriteRouting::default();
        routing.configure(&Tunables { write_mode, sequential_cutoff, ..Tunables::default() });
        routing
    }

    #[test]
    fn only_large_writes_of_a_long_sequence_go_around_whatever_order_they_come_in() {
        let mut routing = routing(WriteMode::Back, 512);
        let mut arrives =
            |kib: u64, length: usize| routing.arrives(Sector(kib * KIB), length << 10);
        assert!(!arrives(0, 128) && !arrives(256, 128) && !arrives(128, 128), "384 KiB so far");
        assert!(arrives(384, 128));
        assert!(arrives(512, 128), "it goes on");
        assert!(!arrives(10_000, 512 - 4) && !arrives(640, 4), "neither long nor large");
        assert!(arrives(644, 128), "the small one was part of it");
    }

    #[test]
    fn many_sequences_grow_side_by_side_and_the_oldest_is_forgotten() {
        let mut routing = routing(WriteMode::Back, 512);
        for step in 0..3 {
            for nth in 0..32 {
                assert!(!routing.arrives(Sector((nth * 100_000 + step * 128) * KIB), 128 << 10));
            }
        }
        assert!(!routing.arrives(Sector(7), 512), "a 33rd, instead of the first");
        assert!(!routing.arrives(Sector(384 * KIB), 128 << 10));
        assert!(routing.arrives(Sector((200_000 + 384) * KIB), 128 << 10));
    }

    #[test]
    fn strict_order_takes_everything_through_the_log() {
        let mut strict = WriteRouting::default();
        strict.configure(&Tunables {
            write_mode: WriteMode::Around,
            writeback_order: WritebackOrder::Strict,
            ..Tunables::default()
        });
        assert!(
            !strict.arrives(Sector(0), 4096)
                && routing(WriteMode::Around, 0).arrives(Sector(0), 4096)
        );
    }
}
