//! What a map draws: the slots of the log in order, and where the dirty blocks lie.

use crate::blocks::DirtyBlocks;
use crate::log::Log;
use crate::segments::{State, Summaries, Summary, order};
use libwb::format::{BlockNo, SegmentId, to_u64, to_usize};

/// How a slot is drawn. If several slots share a cell, the greatest kind counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Empty,
    Clean,
    Dirty,
    /// The newest segment, if it was not closed: the log continues in it, or after it.
    Open,
    Dropped,
    Damaged,
}

impl Kind {
    pub(super) const ALL: [Kind; 6] =
        [Kind::Clean, Kind::Dirty, Kind::Open, Kind::Dropped, Kind::Damaged, Kind::Empty];

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Empty => "empty",
            Kind::Clean => "written back",
            Kind::Dirty => "dirty",
            Kind::Open => "open",
            Kind::Dropped => "dropped",
            Kind::Damaged => "damaged",
        }
    }
}

/// What is drawn.
pub(super) struct Map {
    pub(super) device: String,
    /// In log order: the oldest first, empty ones last.
    pub(super) slots: Vec<Kind>,
    /// The recovery point, which is the last segment that attaching would apply: its index in that
    /// order, and its id.
    pub(super) point: Option<(usize, SegmentId)>,
    /// When the oldest dirty segment and the recovery point were written, if the headers tell.
    pub(super) oldest_dirty: Option<String>,
    pub(super) point_time: Option<String>,
    /// In order of address.
    pub(super) blocks: Vec<BlockNo>,
    /// The size of the backing device in blocks, if the cache knows it.
    pub(super) backing_blocks: Option<u64>,
}

impl Map {
    pub(super) fn of(log: &Log) -> (Map, Option<libwb::log::LogError>) {
        let mut headers = Summaries::default();
        let (states, recovery) = log.scan(|slot, content| headers.visit(slot, content));
        log.warn_of(&recovery);
        let mut slots: Vec<_> = log
            .geometry()
            .all_slots()
            .zip(&states)
            .map(|(slot, state)| {
                let is_open = state.valid_id().is_some() && state.valid_id() == recovery.open_end();
                let has_dirty = headers.get(slot).is_some_and(|header| header.dirty > 0);
                let kind = match State::of(state, &recovery) {
                    State::Live if is_open => Kind::Open,
                    State::Live if has_dirty => Kind::Dirty,
                    State::Live | State::WrittenBack => Kind::Clean,
                    State::Dropped => Kind::Dropped,
                    State::Damaged => Kind::Damaged,
                    State::Empty => Kind::Empty,
                };
                (order(&recovery, slot, state), slot, kind)
            })
            .collect();
        slots.sort_unstable_by_key(|&(order, slot, _)| (order, slot));
        let time = |at: usize| headers.get(slots[at].1).and_then(Summary::time);
        let dirty = slots.iter().position(|(_, _, kind)| matches!(kind, Kind::Dirty | Kind::Open));
        let point = slots.iter().rposition(|(id, _, kind)| {
            *id == recovery.point && matches!(kind, Kind::Dirty | Kind::Open | Kind::Clean)
        });
        let blocks = DirtyBlocks::find(log, &recovery);
        let backing_sectors =
            log.superblock.extension().map_or(0, |extension| extension.backing_sectors);
        let map = Map {
            device: log.device.name().to_string(),
            oldest_dirty: dirty.and_then(time),
            point_time: point.and_then(time),
            point: point.map(|at| (at, recovery.point)),
            slots: slots.into_iter().map(|(_, _, kind)| kind).collect(),
            blocks: blocks.newest.into_keys().collect(),
            backing_blocks: (backing_sectors > 0).then(|| backing_sectors.div_ceil(8)),
        };
        (map, blocks.stopped)
    }

    pub(super) fn count(&self, kind: Kind) -> usize {
        self.slots.iter().filter(|&&slot| slot == kind).count()
    }

    /// Puts the slots into at most `most` cells.
    pub(super) fn cells(&self, most: usize) -> Cells {
        let slots = self.slots.len().div_ceil(most.max(1)).max(1);
        let kinds =
            self.slots.chunks(slots).filter_map(|cell| cell.iter().copied().max()).collect();
        Cells { kinds, slots, point: self.point.map(|(at, _)| at / slots) }
    }

    /// How many blocks of the backing device are drawn: all of them, or those up to the last dirty
    /// block.
    pub(super) fn extent(&self) -> u64 {
        self.backing_blocks.unwrap_or_else(|| self.blocks.last().map_or(0, |last| last.0 + 1))
    }

    /// How many dirty blocks lie beyond the end of the backing device that the cache was made for.
    pub(super) fn beyond(&self) -> usize {
        self.blocks.len() - self.blocks.partition_point(|block| block.0 < self.extent())
    }

    /// The number of dirty blocks in each of `parts` equal parts of the backing device.
    pub(super) fn density(&self, parts: usize) -> Vec<usize> {
        let mut density = vec![0; parts];
        let extent = self.extent();
        for block in self.blocks.iter().take_while(|block| block.0 < extent) {
            let part = u128::from(block.0) * u128::from(to_u64(parts)) / u128::from(extent);
            if let Some(count) =
                u64::try_from(part).ok().and_then(|part| density.get_mut(to_usize(part)))
            {
                *count += 1;
            }
        }
        density
    }
}

pub(super) struct Cells {
    pub(super) kinds: Vec<Kind>,
    /// The number of slots in a cell.
    pub(super) slots: usize,
    pub(super) point: Option<usize>,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn map() -> Map {
        let mut slots = vec![Kind::Clean; 3];
        slots.extend([Kind::Dirty, Kind::Damaged, Kind::Dirty, Kind::Empty, Kind::Empty]);
        Map {
            device: "a<b".into(),
            slots,
            point: Some((5, SegmentId(6))),
            oldest_dirty: None,
            point_time: None,
            blocks: [0, 1, 2, 99, 100].map(BlockNo).to_vec(),
            backing_blocks: Some(100),
        }
    }

    #[test]
    fn a_cell_shows_the_worst_of_its_slots() {
        let cells = map().cells(4);
        assert_eq!(cells.kinds, [Kind::Clean, Kind::Dirty, Kind::Damaged, Kind::Empty]);
        assert_eq!((cells.slots, cells.point), (2, Some(2)));
        assert_eq!(map().cells(100).kinds.len(), 8);
    }

    #[test]
    fn dirty_blocks_are_counted_where_they_lie() {
        let map = map();
        assert_eq!(map.density(4), [3, 0, 0, 1]);
        assert_eq!(map.beyond(), 1);
        let unknown = Map { backing_blocks: None, ..map };
        assert_eq!((unknown.extent(), unknown.beyond(), unknown.density(1)), (101, 0, vec![5]));
        let last = Map { blocks: vec![BlockNo(u64::MAX / 8)], ..unknown };
        assert_eq!(last.density(3), [0, 0, 1]);
        assert_eq!(Map { blocks: Vec::new(), ..last }.density(2), [0, 0]);
    }
}
