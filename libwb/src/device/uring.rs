//! Files and block devices on io_uring.

use super::probe::Opened;
use super::{BlockDevice, DeviceError, IoBuf, IoFuture, Operation, Pending, SharedBuf};
use crate::format::to_u64;
use crate::pending::Requests;
use crate::reactor::{Addresses, Handle, OpKind, Target};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use std::future::ready;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A file or a block device, opened by [`super::probe::open`].
pub struct UringDevice {
    handle: Handle,
    name: Arc<str>,
    target: Target,
    size: u64,
    block_size: u32,
    identity: String,
    /// The file in which the system counts the busy time of a block device.
    stat: Option<PathBuf>,
    prefers_durable_writes: bool,
    requests: Arc<Requests>,
}

impl UringDevice {
    /// An opened device on a reactor's io_uring. It stays locked.
    pub fn new(handle: &Handle, opened: Opened) -> UringDevice {
        UringDevice {
            handle: handle.clone(),
            name: opened.path.to_string_lossy().into(),
            size: opened.size,
            block_size: opened.block_size,
            identity: opened.identity_text,
            stat: opened.stat,
            prefers_durable_writes: opened.prefers_durable_writes,
            requests: Arc::default(),
            target: Target::new(opened.file),
        }
    }

    fn submit(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        kind: OpKind,
    ) -> IoFuture<Option<IoBuf>> {
        let (handle, target, device) =
            (self.handle.clone(), self.target.clone(), self.name.clone());
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.size);
        let requests = self.requests.clone();
        Box::pin(async move {
            let fail =
                |cause| DeviceError { device: device.clone(), operation, offset, length, cause };
            if !fits {
                return Err(fail(Errno::EINVAL));
            }
            match handle.submit(target, Some(requests.begin()), kind).await {
                (Ok(()), buf) => Ok(buf),
                (Err(cause), _) => Err(fail(cause)),
            }
        })
    }

    fn write_all(&self, offset: u64, parts: Vec<SharedBuf>, durably: bool) -> IoFuture<()> {
        let operation = if durably { Operation::DurableWrite } else { Operation::Write };
        let length = to_u64(parts.iter().map(|part| part.len()).sum());
        let kind = OpKind::WriteParts { offset, parts, addresses: Addresses::default(), durably };
        Box::pin(unit(self.submit(operation, offset, length, kind)))
    }

    /// Zeroes or discards, as the mode says.
    fn fallocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> IoFuture<()> {
        let kind = OpKind::Zero { mode, offset, length };
        Box::pin(unit(self.submit(Operation::Discard, offset, length, kind)))
    }
}

async fn unit(future: IoFuture<Option<IoBuf>>) -> Result<(), DeviceError> {
    future.await.map(|_| ())
}

impl BlockDevice for UringDevice {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn identity(&self) -> &str {
        &self.identity
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn busy(&self) -> Option<Duration> {
        // Documentation/block/stat.rst of the kernel: the tenth field is milliseconds.
        let text = std::fs::read_to_string(self.stat.as_ref()?).ok()?;
        text.split_whitespace().nth(9)?.parse().ok().map(Duration::from_millis)
    }

    fn pending(&self) -> Pending {
        self.requests.pending()
    }

    fn put_writes_first(&self) {
        self.target.put_writes_first();
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        let length = to_u64(buf.len());
        let handle = self.handle.clone();
        let done = self.submit(Operation::Read, offset, length, OpKind::Read { offset, buf });
        Box::pin(async move {
            let _reading = handle.reading();
            Ok(done.await?.expect("a read gives its buffer back"))
        })
    }

    fn read_alone(&self, offset: u64, mut buf: IoBuf) -> IoFuture<IoBuf> {
        let length = to_u64(buf.len());
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.size);
        let Some(_reading) = self.handle.reading_alone().filter(|_| fits) else {
            return self.read(offset, buf);
        };
        let in_flight = self.requests.begin();
        let read = self.target.file().read_exact_at(&mut buf, offset);
        if read.is_ok() {
            in_flight.succeeded();
        }
        let read = read.map(|()| buf).map_err(|error| DeviceError {
            device: self.name.clone(),
            operation: Operation::Read,
            offset,
            length,
            // An error without a number means that the device has shrunk.
            cause: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        });
        Box::pin(ready(read))
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        let length = to_u64(data.len());
        Box::pin(unit(self.submit(
            Operation::Write,
            offset,
            length,
            OpKind::Write { offset, data },
        )))
    }

    fn write_parts(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        self.write_all(offset, parts, false)
    }

    fn prefers_durable_writes(&self) -> bool {
        self.prefers_durable_writes
    }

    fn write_durably(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        self.write_all(offset, parts, true)
    }

    fn flush(&self) -> IoFuture<()> {
        Box::pin(unit(self.submit(Operation::Flush, 0, 0, OpKind::Sync)))
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length)
    }

    fn zero(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::super::probe::{Access, open};
    use super::*;
    use crate::reactor::Reactor;

    #[test]
    fn a_durable_write_of_several_pieces_is_read_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16384).unwrap();
        let reactor = Reactor::start().unwrap();
        let device = UringDevice::new(reactor.handle(), open(file.path(), Access::Write).unwrap());
        let parts = [1, 2].map(|with| IoBuf::copy_of(&[with; 4096]).into());
        reactor.block_on(device.write_durably(4096, parts.into())).unwrap();
        let read = reactor.block_on(device.read(0, IoBuf::zeroed(16384))).unwrap();
        assert_eq!(read[..], [[0; 4096], [1; 4096], [2; 4096], [0; 4096]].concat());
        assert!(!device.prefers_durable_writes(), "a file says nothing of that");
    }
}
