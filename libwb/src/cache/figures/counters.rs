//! What a cache counts, since it was opened or its counters were told to start anew.

use crate::cache::head::{Figure, Figures};
use crate::device::DeviceError;
use crate::format::{BLOCK_BYTES, PLACES, Reason, to_u64};
use parking_lot::Mutex;

/// A number that only grows.
pub(crate) struct Counter {
    figures: Figures,
    figure: Figure,
}

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.figures.add(self.figure, n);
    }

    pub(crate) fn get(&self) -> u64 {
        self.figures.get(self.figure)
    }
}

/// The counters as they are counted, and as they are reported. New ones come last: by its place in
/// the log's head, another version of the program finds each.
macro_rules! counters {
    ($($(#[doc = $what:literal])+ $name:ident,)*) => {
        pub(crate) struct AtomicCounters {
            $(pub(crate) $name: Counter,)*
            last_writeback_error: Mutex<Option<DeviceError>>,
        }

        impl AtomicCounters {
            pub(crate) fn of(figures: &Figures) -> AtomicCounters {
                let mut numbers = Figure::COUNTERS..Figure::ACCESSES;
                let mut next = || Counter {
                    figures: figures.clone(),
                    figure: Figure(numbers.next().expect("there is room for more")),
                };
                AtomicCounters { $($name: next(),)* last_writeback_error: Mutex::default() }
            }

            pub(crate) fn get(&self) -> Counters {
                Counters { $($name: self.$name.get(),)* }
            }
        }

        /// What has happened.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[doc = $what])+ pub $name: u64,)*
        }

        impl Counters {
            pub(crate) fn since(&self, earlier: &Counters) -> Counters {
                Counters { $($name: self.$name.saturating_sub(earlier.$name),)* }
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
    /// Commits of segments that were not closed yet. One or several flushes share each.
    commits,
    /// Segments written to the cache device, and closed.
    segments_written,
    /// Of these, segments that were closed before they were full.
    partial_segments_written,
    /// Bytes written to the cache device: segments, superblock records, emptied segments.
    cache_write_bytes,
    /// Blocks read, or written through the cache, that were kept to be cached for reads.
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
    /// Batches of write-back that failed at least in part; each is tried again.
    writeback_errors,
    /// How often a block that could not be written back was moved to the end of the log.
    moved_blocks,
}

impl AtomicCounters {
    /// A commit, or the rest of a segment that is closed for this reason, was written to the cache
    /// device: a header and this many bytes. The segment has this many blocks.
    pub(crate) fn appended(&self, reason: Reason, blocks: usize, bytes: usize) {
        self.cache_write_bytes.add(to_u64(BLOCK_BYTES + bytes));
        if reason == Reason::Open {
            return self.commits.add(1);
        }
        self.segments_written.add(1);
        self.partial_segments_written.add(u64::from(blocks < usize::from(PLACES)));
    }

    pub(crate) fn writeback_failed(&self, error: &DeviceError) {
        *self.last_writeback_error.lock() = Some(error.clone());
        self.writeback_errors.add(1);
    }

    pub(crate) fn writeback_succeeded(&self) {
        *self.last_writeback_error.lock() = None;
    }

    pub(crate) fn last_writeback_error(&self) -> Option<DeviceError> {
        self.last_writeback_error.lock().clone()
    }
}
