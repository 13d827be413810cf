//! How busy a device is kept.

use crate::device::{BlockDevice, Device, DeviceLayer, IoBuf, IoFuture, SharedBuf};
use crate::runtime::Runtime;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

#[derive(Default)]
struct Busy {
    in_flight: u32,
    since: Duration,
    total: Duration,
}

/// A device whose use is measured.
pub(crate) struct BusyMeter {
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
    fn new(of: &BusyMeter) -> Use {
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

impl BusyMeter {
    pub(crate) fn new(device: Device, runtime: Arc<dyn Runtime>) -> BusyMeter {
        BusyMeter { device, runtime, busy: Arc::default() }
    }

    /// The total time in which anything was under way through this.
    pub(crate) fn busy_here(&self) -> Duration {
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

impl DeviceLayer for BusyMeter {
    fn below(&self) -> &dyn BlockDevice {
        &*self.device
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
