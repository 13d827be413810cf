//! The engine behind a [`Cache`](super::Cache): its devices, its state, its counters. Its methods
//! are in the folders beside this file, grouped by task.

use super::busy_meter::BusyMeter;
use super::error::CacheError;
use super::figures::counters::AtomicCounters;
use super::figures::latency::AtomicLatencies;
use super::figures::statistics::Baseline;
use super::shared_flush::SharedFlush;
use super::state::shared::SharedState;
use super::tunables::{Tunables, WritebackOrder};
use crate::device::{BlockDevice, Device, DeviceError};
use crate::format::{SECTOR_BYTES, SUPERBLOCK_REGION_BYTES, Sector, SuperblockExtension, to_u64};
use crate::rules::Rules;
use crate::runtime::Runtime;
use futures_lite::future::yield_now;
use futures_util::lock::Mutex as AsyncMutex;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

const _: () = assert!(SUPERBLOCK_REGION_BYTES.is_multiple_of(SECTOR_BYTES as u64));

pub(super) struct Engine {
    pub(super) cache: Device,
    /// The backing device, as requests use it.
    pub(super) backing: BusyMeter,
    /// The same, as write-back uses it.
    pub(super) writeback_device: BusyMeter,
    pub(super) backing_flushes: SharedFlush,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) tunables: Mutex<Tunables>,
    pub(super) state: SharedState,
    pub(super) counters: AtomicCounters,
    pub(super) latencies: AtomicLatencies,
    pub(super) baseline: Baseline,
    /// Held while the cache device is flushed, or written durably, which may flush it. An error
    /// might be reported to only one of two concurrent flushes.
    pub(super) flushing: AsyncMutex<()>,
    pub(super) recovery_time: Duration,
    /// Bytes of the log that recovery read.
    pub(super) recovery_bytes: u64,
    /// Held while segments are emptied for a discard.
    pub(super) emptying: AsyncMutex<()>,
    /// The backing device has refused a discard.
    pub(super) cannot_discard: AtomicBool,
    /// The same for zeros that keep their space.
    pub(super) cannot_zero: AtomicBool,
    /// What the cache device carries beyond the base format, if it does.
    pub(super) extension: Option<SuperblockExtension>,
    /// The generation of its newest page that is durable.
    pub(super) generation: AtomicU64,
    /// What segments carry of its UUID.
    pub(super) digest: Option<u32>,
    pub(super) rules: Rules,
}

impl Engine {
    /// Refuses all writes from now on: nothing is acknowledged any more that is not durable.
    pub(super) fn fail(&self, error: DeviceError) {
        let mut state = self.state.lock();
        let is_first = state.lifecycle.fail(error.clone());
        if is_first {
            state.log.note_failure(&error);
        }
        drop(state);
        if is_first {
            tracing::error!("the cache device failed, writes are refused from now on: {error}");
        }
    }

    /// Refuses a request that does not lie within the volume. `length` is in bytes.
    pub(super) fn check_range(&self, sector: Sector, length: u64) -> Result<(), CacheError> {
        let aligned = length.is_multiple_of(to_u64(SECTOR_BYTES));
        let end = sector.0.checked_add(length / to_u64(SECTOR_BYTES));
        if aligned && end.is_some_and(|end| end <= self.backing.size() / to_u64(SECTOR_BYTES)) {
            return Ok(());
        }
        Err(CacheError::OutOfRange { sector, length })
    }

    /// Whether a flush makes a commit; otherwise it closes the segment. In strict order, each batch
    /// must end where a flush did, and the superblock record can only name whole segments.
    pub(super) fn commits(&self) -> bool {
        self.digest.is_some() && self.tunables.lock().writeback_order != WritebackOrder::Strict
    }

    /// Lets other tasks run between two visits to the state, if any wait for this thread.
    pub(super) async fn let_others(&self) {
        if self.runtime.is_thread_shared() {
            yield_now().await;
        }
    }

    /// A background task is over.
    pub(super) fn task_ended(&self) {
        self.state.lock().lifecycle.task_ended();
    }
}
