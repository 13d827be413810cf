//! What a cache says about itself.

use super::{Cache, Tunables};
use crate::device::{BlockDevice, DeviceError};
use crate::format::{SEGMENT_BYTES, SegmentId, to_u64};
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

#[derive(Default)]
pub(super) struct AtomicCounters {
    pub(super) reads: Counter,
    pub(super) read_bytes: Counter,
    pub(super) backing_read_bytes: Counter,
    pub(super) writes: Counter,
    pub(super) write_bytes: Counter,
    pub(super) flushes: Counter,
    pub(super) segments: Counter,
    pub(super) written_back_bytes: Counter,
    pub(super) discarded_bytes: Counter,
    pub(super) cache_read_errors: Counter,
    pub(super) writeback_errors: Counter,
    last_writeback_error: Mutex<Option<DeviceError>>,
}

impl AtomicCounters {
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

/// What has happened since the cache was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Read requests.
    pub reads: u64,
    /// Bytes read by requests.
    pub read_bytes: u64,
    /// Of these, bytes that came from the backing device.
    pub backing_read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes written by requests.
    pub write_bytes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Segments written to the cache device.
    pub segments: u64,
    /// Bytes written back to the backing device.
    pub written_back_bytes: u64,
    /// Bytes that the backing device was told to discard.
    pub discarded_bytes: u64,
    /// Reads that failed on the cache device.
    pub cache_read_errors: u64,
    /// Batches of write-back that failed; each is tried again.
    pub writeback_errors: u64,
}

/// A cache's state at one moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Size of the volume in bytes.
    pub volume_bytes: u64,
    /// Size of the log in bytes: all its segments.
    pub log_bytes: u64,
    /// Segments that the log holds.
    pub segments: u64,
    /// Segments that can take new data at once.
    pub free_segments: u64,
    /// Segments that are not written back.
    pub dirty_segments: u64,
    /// Blocks of 4 KiB whose newest version is not written back.
    pub dirty_blocks: u64,
    /// Blocks of 4 KiB that the cache holds a version of, dirty or clean.
    pub used_blocks: u64,
    /// The newest segment.
    pub newest: SegmentId,
    /// Every segment up to this one survives a power cut.
    pub durable: SegmentId,
    /// Every segment up to this one is written back.
    pub written_back: SegmentId,
    /// Why writes are refused, if they are.
    pub failure: Option<String>,
    /// Why write-back does not get on, if it does not.
    pub writeback_error: Option<String>,
    /// How long recovery took.
    pub recovery_time: Duration,
    /// The tunables in force.
    pub tunables: Tunables,
    /// What has happened so far.
    pub counters: Counters,
}

impl Cache {
    /// The state at this moment.
    pub fn status(&self) -> Status {
        let inner = &self.inner;
        let c = &inner.counters;
        let counters = Counters {
            reads: c.reads.get(),
            read_bytes: c.read_bytes.get(),
            backing_read_bytes: c.backing_read_bytes.get(),
            writes: c.writes.get(),
            write_bytes: c.write_bytes.get(),
            flushes: c.flushes.get(),
            segments: c.segments.get(),
            written_back_bytes: c.written_back_bytes.get(),
            discarded_bytes: c.discarded_bytes.get(),
            cache_read_errors: c.cache_read_errors.get(),
            writeback_errors: c.writeback_errors.get(),
        };
        let state = inner.lock();
        Status {
            volume_bytes: inner.backing.size(),
            log_bytes: state.geometry.lap() * to_u64(SEGMENT_BYTES),
            segments: state.geometry.lap(),
            free_segments: state.free_slots(),
            dirty_segments: state.dirty_segments(),
            dirty_blocks: state.dirty_blocks,
            used_blocks: to_u64(state.index.len()),
            newest: state.newest,
            durable: state.durable,
            written_back: state.written_back,
            failure: state.failure.as_ref().map(ToString::to_string),
            writeback_error: c.last_writeback_error().map(|error| error.to_string()),
            recovery_time: inner.recovery_time,
            tunables: self.tunables(),
            counters,
        }
    }
}
