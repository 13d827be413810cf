//! A device that several use: how busy it is kept, and which flushes have failed.

use crate::device::{BlockDevice, Device, DeviceError, IoBuf, IoFuture, Operation, SharedBuf};
use crate::runtime::Runtime;
use futures_util::lock::Mutex as AsyncMutex;
use nix::errno::Errno;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[derive(Default)]
struct Busy {
    in_flight: u32,
    since: Duration,
    total: Duration,
}

/// The flushes of a device that several use. A failed flush gives up what it should have made
/// durable, whoever wrote that, and no later one reports it: so each user must know of the failures
/// of all.
#[derive(Default)]
pub(super) struct Flushes {
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
pub(super) struct Failures(u64);

impl Flushes {
    /// To be noted before the first of the writes that a flush is to cover.
    pub(super) fn failures(&self) -> Failures {
        Failures(self.failed.load(Ordering::Acquire))
    }

    /// Makes durable what was written since `before`. Those who wait at the same time share a
    /// flush.
    ///
    /// # Errors
    /// When this flush fails, or another one has since. The writes must be repeated, then.
    pub(super) async fn flush(
        &self,
        device: &Metered,
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

/// A device whose use is measured.
pub(super) struct Metered {
    device: Device,
    runtime: Arc<dyn Runtime>,
    busy: Arc<Mutex<Busy>>,
}

/// An operation under way.
struct Use {
    runtime: Arc<dyn Runtime>,
    busy: Arc<Mutex<Busy>>,
}

impl Use {
    fn new(of: &Metered) -> Use {
        let mut busy = of.busy.lock();
        if busy.in_flight == 0 {
            busy.since = of.runtime.now();
        }
        busy.in_flight += 1;
        Use { runtime: of.runtime.clone(), busy: of.busy.clone() }
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut busy = self.busy.lock();
        busy.in_flight -= 1;
        if busy.in_flight == 0 {
            let since = busy.since;
            busy.total += self.runtime.now().saturating_sub(since);
        }
    }
}

impl Metered {
    pub(super) fn new(device: Device, runtime: Arc<dyn Runtime>) -> Metered {
        Metered { device, runtime, busy: Arc::default() }
    }

    /// For how long anything was under way through this, all in all.
    pub(super) fn busy_here(&self) -> Duration {
        let busy = self.busy.lock();
        let now = if busy.in_flight > 0 {
            self.runtime.now().saturating_sub(busy.since)
        } else {
            Duration::ZERO
        };
        busy.total + now
    }

    fn metered<T: Send + 'static>(&self, operation: IoFuture<T>) -> IoFuture<T> {
        let using = Use::new(self);
        Box::pin(async move {
            let done = operation.await;
            drop(using);
            done
        })
    }
}

impl BlockDevice for Metered {
    fn name(&self) -> &Arc<str> {
        self.device.name()
    }

    fn size(&self) -> u64 {
        self.device.size()
    }

    fn identity(&self) -> &str {
        self.device.identity()
    }

    fn block_size(&self) -> u32 {
        self.device.block_size()
    }

    fn busy(&self) -> Option<Duration> {
        self.device.busy()
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        self.metered(self.device.read(offset, buf))
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        self.metered(self.device.write(offset, data))
    }

    fn flush(&self) -> IoFuture<()> {
        self.metered(self.device.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.metered(self.device.discard(offset, length))
    }

    fn zero(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.metered(self.device.zero(offset, length))
    }
}
