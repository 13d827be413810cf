//! `wbctl status --dm`: the line that `dmsetup status` shows of the kernel module, after the
//! target's name.

use libwb::control::LiveStatus;
use libwb::format::{BLOCK_BYTES, to_u64};
use std::fmt::Write;

/// The module's tunables. The line shows those that wb has.
const TUNABLES: [&str; 5] = [
    "writeback_threshold",
    "nr_max_batched_writeback",
    "update_sb_record_interval",
    "sync_data_interval",
    "read_cache_threshold",
];

/// The line, as the module's readme describes it.
pub(crate) fn line(live: &LiveStatus) -> String {
    let partial = live.counters.get("partial_segments_written").copied().unwrap_or(0);
    let log = [
        live.next_place,
        live.places,
        live.log_bytes / to_u64(libwb::format::SEGMENT_BYTES),
        live.current_segment,
        live.written_segment,
        live.written_back_segment,
        live.dirty_bytes / to_u64(BLOCK_BYTES),
    ];
    let accesses = live.statistics.accesses.iter().map(|met| met.blocks);
    let numbers: Vec<String> =
        log.into_iter().chain(accesses).chain([partial]).map(|number| number.to_string()).collect();
    let tunables: Vec<_> =
        TUNABLES.iter().filter_map(|key| Some((key, live.tunables.get(*key)?))).collect();
    let mut line = format!("{} {}", numbers.join(" "), tunables.len() * 2);
    for (key, value) in tunables {
        // Writing to a string cannot fail.
        let _ = write!(line, " {key} {value}");
    }
    line
}
