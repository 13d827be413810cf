//! The engine's state: pure, under one short lock. No I/O, no waiting, no clock.
//!
//! Each part is a struct with private fields, in a file with the rules that keep it true. What
//! needs several parts is a method of [`State`], in this folder.

pub(crate) mod ages;
pub(crate) mod fragment;
pub(crate) mod index;
mod lifecycle;
pub(crate) mod next_batch;
pub(crate) mod pacing;
pub(crate) mod placement;
pub(crate) mod position;
mod range_locks;
pub(crate) mod rate;
pub(crate) mod read_admission;
pub(crate) mod segment_log;
pub(crate) mod shared;
mod stale_segments;
pub(crate) mod stuck;
mod table;
pub(crate) mod wait;
mod write_routing;
pub(crate) mod writeback_state;

use super::figures::accesses::CountedAccesses;
use super::tunables::Tunables;
use crate::format::{PLACES, SegmentId};
use crate::rules::Rules;
use lifecycle::Lifecycle;
use range_locks::RangeLocks;
use read_admission::ReadAdmission;
use segment_log::SegmentLog;
use stale_segments::StaleSegments;
use std::collections::BTreeSet;
use stuck::Stuck;
use write_routing::WriteRouting;
use writeback_state::WritebackState;

pub(crate) struct State {
    /// What is newest, and when a slot may be reused.
    pub(crate) log: SegmentLog,
    /// Who waits for whom while blocks change on the backing device.
    pub(crate) locks: RangeLocks,
    /// What the kernel module must not find.
    pub(crate) stale: StaleSegments,
    /// When to write back, and how fast.
    pub(crate) writeback: WritebackState,
    /// Blocks that cannot be written back while others can.
    pub(crate) stuck: Stuck,
    /// Which reads are worth caching.
    pub(crate) admission: ReadAdmission,
    /// Which writes go around the log.
    pub(crate) routing: WriteRouting,
    /// What requests found in the cache.
    pub(crate) accesses: CountedAccesses,
    /// Whether requests are taken.
    pub(crate) lifecycle: Lifecycle,
    rules: Rules,
}

impl State {
    /// The state of a log that was just opened. The index does not know all that segments up to
    /// `unindexed` hold; `damaged` ones are written back.
    pub(crate) fn new(
        log: SegmentLog,
        unindexed: SegmentId,
        damaged: BTreeSet<SegmentId>,
        accesses: CountedAccesses,
        rules: Rules,
    ) -> State {
        State {
            locks: RangeLocks::new(rules),
            stale: StaleSegments::new(unindexed, damaged),
            writeback: WritebackState::default(),
            stuck: Stuck::default(),
            admission: ReadAdmission::new(log.geometry().lap() * u64::from(PLACES)),
            routing: WriteRouting::default(),
            accesses,
            lifecycle: Lifecycle::default(),
            log,
            rules,
        }
    }

    /// Goes by these tunables from now on.
    pub(crate) fn configure(&mut self, tunables: &Tunables) {
        self.admission.configure(tunables);
        self.routing.configure(tunables);
    }
}
