//! Flushes of a device that its users share.

use super::busy_meter::BusyMeter;
use crate::device::{BlockDevice, DeviceError, Operation};
use futures_util::lock::Mutex as AsyncMutex;
use nix::errno::Errno;
use std::sync::atomic::{AtomicU64, Ordering};

/// The flushes of a device with several users. A failed flush may lose any data that it covers,
/// whoever wrote the data, and no later flush reports the loss. So each user must know of every
/// failure.
#[derive(Default)]
pub(crate) struct SharedFlush {
    /// Held during a flush.
    alone: AsyncMutex<()>,
    failed: AtomicU64,
    /// Flushes are numbered in the order in which they begin, from 1 on.
    begun: AtomicU64,
    /// The newest one that did not fail.
    succeeded: AtomicU64,
}

/// How many flushes had failed at some moment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failures(u64);

impl SharedFlush {
    /// To be noted before the first of the writes that a flush is to cover.
    pub(crate) fn failures(&self) -> Failures {
        Failures(self.failed.load(Ordering::Acquire))
    }

    /// Makes durable what was written since `before`. Those who wait at the same time share a
    /// flush.
    ///
    /// # Errors
    /// When this flush fails, or another one has since. The writes must be repeated, then.
    pub(crate) async fn flush(
        &self,
        device: &BusyMeter,
        before: Failures,
    ) -> Result<(), DeviceError> {
        // One that begins from now on covers what was written.
        let enough = self.begun.load(Ordering::Acquire) + 1;
        let _alone = self.alone.lock().await;
        if self.succeeded.load(Ordering::Acquire) < enough {
            let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
            let flushed = device.flush().await;
            if flushed.is_err() {
                self.failed.fetch_add(1, Ordering::AcqRel);
            }
            flushed?;
            self.succeeded.store(number, Ordering::Release);
        }
        if self.failures() == before {
            return Ok(());
        }
        let device = device.name().clone();
        Err(DeviceError {
            device,
            operation: Operation::Flush,
            offset: 0,
            length: 0,
            cause: Errno::EIO,
        })
    }
}
