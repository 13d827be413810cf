//! Devices that stand on another device.

use super::{BlockDevice, IoBuf, IoFuture, LinkStatus, SharedBuf};
use std::sync::Arc;
use std::time::Duration;

/// A device that passes every operation on to another one, unless it implements the operation.
///
/// Implement [`DeviceLayer::below`] and the methods that differ. The type is then a
/// [`BlockDevice`]. A layer that must not change the device below implements `write`, `flush`,
/// `discard` and `zero`. A layer has no durable writes: they would pass by its `write`.
pub trait DeviceLayer: Send + Sync + 'static {
    /// The device below.
    fn below(&self) -> &dyn BlockDevice;

    /// As [`BlockDevice::read`].
    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        self.below().read(offset, buf)
    }

    /// As [`BlockDevice::write`].
    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        self.below().write(offset, data)
    }

    /// As [`BlockDevice::flush`].
    fn flush(&self) -> IoFuture<()> {
        self.below().flush()
    }

    /// As [`BlockDevice::discard`].
    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.below().discard(offset, length)
    }

    /// As [`BlockDevice::zero`].
    fn zero(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.below().zero(offset, length)
    }
}

impl<T: DeviceLayer> BlockDevice for T {
    fn name(&self) -> &Arc<str> {
        self.below().name()
    }

    fn size(&self) -> u64 {
        self.below().size()
    }

    fn identity(&self) -> &str {
        self.below().identity()
    }

    fn block_size(&self) -> u32 {
        self.below().block_size()
    }

    fn busy(&self) -> Option<Duration> {
        self.below().busy()
    }

    fn link(&self) -> Option<LinkStatus> {
        self.below().link()
    }

    fn set_timeout(&self, timeout: Option<Duration>) {
        self.below().set_timeout(timeout);
    }

    fn put_writes_first(&self) {
        self.below().put_writes_first();
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        DeviceLayer::read(self, offset, buf)
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        DeviceLayer::write(self, offset, data)
    }

    fn flush(&self) -> IoFuture<()> {
        DeviceLayer::flush(self)
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        DeviceLayer::discard(self, offset, length)
    }

    fn zero(&self, offset: u64, length: u64) -> IoFuture<()> {
        DeviceLayer::zero(self, offset, length)
    }
}
