//! A crash cuts an acknowledged write only between blocks: each block survives whole or not at all,
//! and no block survives without those before it.

use super::version::{NEVER, Version};
use crate::sim::stamp::WriteId;
use libwb::format::SECTORS_PER_BLOCK;
use std::collections::HashMap;

/// Checks each acknowledged write: the last sector that shows it ends a block, and no sector before
/// that shows anything older. `shown` is what each sector shows, `sectors` what it might show.
pub(super) fn check(sectors: &[Vec<Version>], shown: &[Version]) -> Result<(), (u64, String)> {
    let mut ends: HashMap<WriteId, u64> = HashMap::new();
    for (sector, version) in (0..).zip(shown) {
        // Several discards look the same, and all are durable once acknowledged.
        if is_acknowledged(version) && !version.zeros {
            ends.insert(version.write, (sector / SECTORS_PER_BLOCK + 1) * SECTORS_PER_BLOCK);
        }
    }
    for ((sector, versions), shown) in (0..).zip(sectors).zip(shown) {
        // Any of the discards that might show.
        let may_show =
            |version: &&Version| version.write == shown.write || shown.zeros && version.zeros;
        let is_cut_off = |lost: &&Version| {
            is_acknowledged(lost)
                && ends.get(&lost.write).is_some_and(|&end| sector < end)
                && versions.iter().filter(may_show).all(|version| version.precedes(lost))
        };
        if let Some(lost) = versions.iter().find(is_cut_off) {
            let text = format!(
                "shows {} and lacks {}, which a sector beyond it shows, or one of the same block",
                shown.write, lost.write
            );
            return Err((sector, text));
        }
    }
    Ok(())
}

fn is_acknowledged(version: &Version) -> bool {
    version.acknowledged != NEVER && !version.failed
}
