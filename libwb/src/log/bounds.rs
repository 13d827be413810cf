//! Entries of the log that do not fit on the backing device.

use crate::format::{BlockNo, DirtyBits, SECTORS_PER_BLOCK, Sector, SegmentId, to_u64};
use std::fmt::Display;

/// An entry of the log with data beyond the end of the backing device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beyond {
    /// The segment.
    pub id: SegmentId,
    /// The first dirty sector of the entry beyond the end.
    pub sector: Sector,
}

impl Beyond {
    /// What is wrong, as a sentence. `backing` is the name of the backing device.
    pub fn text(&self, backing: impl Display, sectors: u64) -> String {
        let Beyond { id, sector } = self;
        format!(
            "segment {id} holds data for sector {sector}, but {backing} has only {sectors} sectors"
        )
    }
}

/// The first dirty sector of a block beyond the end of a backing device with `sectors` sectors.
pub(crate) fn first_outside(block: BlockNo, dirty: DirtyBits, sectors: u64) -> Option<Sector> {
    // This cannot overflow: a block's first sector is at most `u64::MAX - 7`, its last one 7
    // higher.
    if block.sector().0 + (SECTORS_PER_BLOCK - 1) < sectors {
        return None;
    }
    let mut runs = dirty.runs().map(|(from, count)| [from, from + count - 1]);
    let sector = |nth: usize| block.sector().0 + to_u64(nth);
    let [first, _] = runs.find(|&[_, last]| sector(last) >= sectors)?;
    Some(Sector(sector(first).max(sectors)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_dirty_sector_outside_is_named() {
        let first =
            |dirty, end| first_outside(BlockNo(2), DirtyBits(dirty), end).map(|sector| sector.0);
        // Sectors 16 to 23.
        for (dirty, end, outside) in [
            (0xff, 24, None),
            (0xff, 23, Some(23)),
            (0xff, 20, Some(20)),
            (0xff, 3, Some(16)),
            (0b0110_0011, 18, Some(21)),
            (0b0110_0011, 17, Some(17)),
            (0b0000_0011, 18, None),
            (0, 0, None),
        ] {
            assert_eq!(first(dirty, end), outside, "{dirty:#b} {end}");
        }
        let last = first_outside(BlockNo(u64::MAX / 8), DirtyBits(0x80), u64::MAX);
        assert_eq!(last, Some(Sector(u64::MAX)));
    }
}
