//! A device that counts what is read and may limit the rate of writes.

use libwb::device::{BlockDevice, Device, DeviceLayer, IoBuf, IoFuture, SharedBuf};
use libwb::format::to_u64;
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A device that counts.
pub(crate) struct MeteredDevice {
    device: Device,
    read_bytes: AtomicU64,
    pace: Option<Pace>,
}

struct Pace {
    runtime: Arc<dyn Runtime>,
    bytes_per_second: f64,
    /// When all requests so far are done.
    until: Mutex<Duration>,
}

impl MeteredDevice {
    pub(crate) fn new(device: Device) -> MeteredDevice {
        MeteredDevice { device, read_bytes: AtomicU64::new(0), pace: None }
    }

    /// A device that writes at most `bytes_per_second`, one request after the other.
    pub(crate) fn throttled(
        device: Device,
        runtime: Arc<dyn Runtime>,
        bytes_per_second: f64,
    ) -> MeteredDevice {
        let until = Mutex::new(runtime.now());
        MeteredDevice {
            pace: Some(Pace { runtime, bytes_per_second, until }),
            ..MeteredDevice::new(device)
        }
    }

    /// Bytes read since the beginning.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }
}

impl DeviceLayer for MeteredDevice {
    fn below(&self) -> &dyn BlockDevice {
        &*self.device
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        self.read_bytes.fetch_add(to_u64(buf.len()), Ordering::Relaxed);
        self.device.read(offset, buf)
    }

    #[allow(clippy::cast_precision_loss)] // a time
    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        let Some(pace) = &self.pace else { return self.device.write(offset, data) };
        let now = pace.runtime.now();
        let takes = Duration::from_secs_f64(data.len() as f64 / pace.bytes_per_second);
        let end = {
            let mut until = pace.until.lock();
            *until = (*until).max(now) + takes;
            *until
        };
        let sleep = pace.runtime.sleep(end - now);
        let write = self.device.write(offset, data);
        Box::pin(async move {
            sleep.await;
            write.await
        })
    }
}
