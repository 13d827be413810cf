//! A device that keeps writes in memory and leaves the device below as it is.

use super::{BlockDevice, Device, DeviceError, DeviceLayer, IoBuf, IoFuture, Operation, SharedBuf};
use crate::format::{SECTOR_BYTES, to_u64, to_usize};
use nix::errno::Errno;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::future::ready;
use std::sync::Arc;

/// The most that the overlay keeps in memory, in bytes.
const LIMIT: usize = 1 << 30;

/// A device with the writes to it, which are lost when this is dropped. It keeps up to 1 GiB; then
/// writes fail with `ENOSPC`. Discards fail with `EROFS`.
pub struct Overlay {
    device: Device,
    /// The sectors that were written, by number.
    written: Arc<Mutex<BTreeMap<u64, [u8; SECTOR_BYTES]>>>,
    limit: usize,
}

impl Overlay {
    /// An overlay without any writes.
    pub fn over(device: Device) -> Overlay {
        Overlay { device, written: Arc::default(), limit: LIMIT }
    }

    fn error(&self, operation: Operation, offset: u64, length: usize, cause: Errno) -> DeviceError {
        DeviceError {
            device: self.device.name().clone(),
            operation,
            offset,
            length: to_u64(length),
            cause,
        }
    }

    fn keep(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let error = |cause| self.error(Operation::Write, offset, data.len(), cause);
        let end = offset.checked_add(to_u64(data.len())).filter(|&end| end <= self.device.size());
        end.ok_or_else(|| error(Errno::EINVAL))?;
        let mut written = self.written.lock();
        if written.len() * SECTOR_BYTES + data.len() > self.limit {
            return Err(error(Errno::ENOSPC));
        }
        for (sector, bytes) in (offset / to_u64(SECTOR_BYTES)..).zip(data.as_chunks().0) {
            written.insert(sector, *bytes);
        }
        Ok(())
    }
}

impl DeviceLayer for Overlay {
    fn below(&self) -> &dyn BlockDevice {
        &*self.device
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        let (reading, written) = (self.device.read(offset, buf), self.written.clone());
        Box::pin(async move {
            let mut buf = reading.await?;
            let first = offset / to_u64(SECTOR_BYTES);
            let end = first + to_u64(buf.len() / SECTOR_BYTES);
            for (sector, bytes) in written.lock().range(first..end) {
                let at = to_usize(sector - first) * SECTOR_BYTES;
                buf[at..at + SECTOR_BYTES].copy_from_slice(bytes);
            }
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        Box::pin(ready(self.keep(offset, &data)))
    }

    fn flush(&self) -> IoFuture<()> {
        Box::pin(ready(Ok(())))
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        Box::pin(ready(Err(self.error(Operation::Discard, offset, to_usize(length), Errno::EROFS))))
    }

    fn zero(&self, offset: u64, length: u64) -> IoFuture<()> {
        DeviceLayer::discard(self, offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemDevice;
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn writes_are_read_back_up_to_a_limit_and_the_device_stays_as_it_is() {
        let device = Arc::new(MemDevice::with_content("d", vec![1; 4096]));
        let overlay = Overlay { limit: 1024, ..Overlay::over(device.clone()) };
        let write = |offset, data: &[u8]| {
            BlockDevice::write(&overlay, offset, IoBuf::copy_of(data).into())
                .now_or_never()
                .expect("at once")
        };
        write(1024, &[2; 512]).unwrap();
        write(1024, &[3; 512]).unwrap();
        let read = BlockDevice::read(&overlay, 512, IoBuf::zeroed(1536))
            .now_or_never()
            .expect("at once")
            .unwrap();
        assert_eq!(read[..], [[1; 512], [3; 512], [1; 512]].concat());
        assert_eq!(write(0, &[2; 1024]).unwrap_err().cause, Errno::ENOSPC);
        assert_eq!(write(4096, &[2; 512]).unwrap_err().cause, Errno::EINVAL);
        assert!(BlockDevice::discard(&overlay, 0, 512).now_or_never().expect("at once").is_err());
        assert_eq!(device.content(), [1; 4096]);
    }
}
