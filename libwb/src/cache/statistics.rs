//! What a cache counts, since it was opened or its counters were told to start anew.

use super::access::Accesses;
use super::latency::{Latencies, Timed};
use super::{Cache, Inner};
use crate::device::DeviceError;
use crate::format::{BLOCK_BYTES, PLACES, Reason, to_u64};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows.
#[derive(Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters as they are counted, and as they are reported.
macro_rules! counters {
    ($($(#[doc = $what:literal])+ $name:ident,)*) => {
        #[derive(Default)]
        pub(super) struct AtomicCounters {
            $(pub(super) $name: Counter,)*
            last_writeback_error: Mutex<Option<DeviceError>>,
        }

        impl AtomicCounters {
            fn get(&self) -> Counters {
                Counters { $($name: self.$name.get(),)* }
            }
        }

        /// What has happened.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[doc = $what])+ pub $name: u64,)*
        }

        impl Counters {
            fn since(&self, earlier: &Counters) -> Counters {
                Counters { $($name: self.$name - earlier.$name,)* }
            }

            /// Each counter: its name, what it counts, and how much that is.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
                [$((stringify!($name), concat!($($what),+).trim_ascii(), self.$name),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Read requests.
    reads,
    /// Bytes read by requests.
    read_bytes,
    /// Bytes read from the backing device for requests.
    backing_read_bytes,
    /// Write requests.
    writes,
    /// Bytes written by requests.
    write_bytes,
    /// Flush requests.
    flushes,
    /// Commits of segments that were not closed yet, each made by a flush, or several that share
    /// it.
    commits,
    /// Segments written to the cache device, and closed.
    segments_written,
    /// Of these, segments that were closed before they were full.
    partial_segments_written,
    /// Bytes written to the cache device: segments, superblock records, emptied segments.
    cache_write_bytes,
    /// Blocks read, or written through the cache, that were kept for reads, on their way to the
    /// cache device.
    staged_blocks,
    /// Clean blocks put into the log by read caching.
    injected_blocks,
    /// Bytes written back to the backing device.
    written_back_bytes,
    /// Bytes that went to the backing device at once, around the cache.
    direct_write_bytes,
    /// Bytes that the backing device was told to discard.
    discarded_bytes,
    /// Reads that failed on the cache device.
    cache_read_errors,
    /// Batches of write-back that failed, in whole or in part; each is tried again.
    writeback_errors,
    /// Blocks that could not be written back, each time that they were kept in the log beyond their
    /// segment's turn.
    moved_blocks,
}

impl AtomicCounters {
    /// A commit, or the rest of a segment that is closed for this reason, was written to the cache
    /// device: so many bytes and a header. The segment has so many blocks.
    pub(super) fn appended(&self, reason: Reason, blocks: usize, bytes: usize) {
        self.cache_write_bytes.add(to_u64(BLOCK_BYTES + bytes));
        if reason == Reason::Open {
            return self.commits.add(1);
        }
        self.segments_written.add(1);
        self.partial_segments_written.add(u64::from(blocks < usize::from(PLACES)));
    }

    pub(super) fn writeback_failed(&self, error: &DeviceError) {
        *self.last_writeback_error.lock() = Some(error.clone());
        self.writeback_errors.add(1);
    }

    pub(super) fn writeback_succeeded(&self) {
        *self.last_writeback_error.lock() = None;
    }

    pub(super) fn last_writeback_error(&self) -> Option<DeviceError> {
        self.last_writeback_error.lock().clone()
    }
}

/// All that was counted in a time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// How long was counted.
    pub time: Duration,
    /// What has happened.
    pub counters: Counters,
    /// What requests found in the cache.
    pub accesses: Accesses,
    /// How long requests took.
    pub latencies: Latencies,
}

impl Statistics {
    fn since(&self, earlier: &Statistics) -> Statistics {
        Statistics {
            time: self.time - earlier.time,
            counters: self.counters.since(&earlier.counters),
            accesses: self.accesses.since(&earlier.accesses),
            latencies: self.latencies.since(&earlier.latencies),
        }
    }
}

/// What the counters were when they last started anew. They themselves only grow: the engine goes
/// by some of them.
pub(super) struct Baseline(Mutex<Statistics>);

impl Baseline {
    /// Counters start at this time.
    pub(super) fn at(time: Duration) -> Baseline {
        Baseline(Mutex::new(Statistics { time, ..Statistics::default() }))
    }
}

impl Inner {
    fn counted(&self) -> Statistics {
        Statistics {
            time: self.runtime.now(),
            counters: self.counters.get(),
            accesses: self.lock().accesses,
            latencies: self.latencies.get(),
        }
    }

    pub(super) fn statistics(&self) -> Statistics {
        // The baseline first: what is counted meanwhile is no less.
        let baseline = self.baseline.0.lock();
        self.counted().since(&baseline)
    }
}

impl Cache {
    /// Lets all counters start anew.
    pub fn clear_statistics(&self) {
        let mut baseline = self.inner.baseline.0.lock();
        *baseline = self.inner.counted();
    }

    /// Notes how long a request took, as its front end saw it.
    pub fn took(&self, request: Timed, time: Duration) {
        self.inner.latencies.add(request, time);
    }
}
