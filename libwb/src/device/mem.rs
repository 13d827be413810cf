//! A device in memory, for tests and for benchmarks of the engine alone. Every operation completes
//! at once.

use super::{BlockDevice, DeviceError, IoBuf, IoFuture, Operation, SharedBuf};
use crate::format::{to_u64, to_usize};
use nix::errno::Errno;
use parking_lot::RwLock;
use std::future::ready;
use std::sync::Arc;

/// A device in memory.
pub struct MemDevice {
    name: Arc<str>,
    bytes: RwLock<Vec<u8>>,
    size: u64,
}

impl MemDevice {
    /// A device of zeros, of `size` bytes.
    pub fn new(name: &str, size: u64) -> MemDevice {
        MemDevice::with_content(name, vec![0; to_usize(size)])
    }

    /// A device that holds `content`.
    pub fn with_content(name: &str, content: Vec<u8>) -> MemDevice {
        MemDevice { name: name.into(), size: to_u64(content.len()), bytes: RwLock::new(content) }
    }

    /// A copy of its content.
    pub fn content(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }

    fn range(
        &self,
        operation: Operation,
        offset: u64,
        length: usize,
    ) -> Result<std::ops::Range<usize>, DeviceError> {
        let end = offset.checked_add(to_u64(length)).filter(|&end| end <= self.size);
        end.map(|end| to_usize(offset)..to_usize(end)).ok_or_else(|| DeviceError {
            device: self.name.clone(),
            operation,
            offset,
            length: to_u64(length),
            cause: Errno::EINVAL,
        })
    }
}

impl BlockDevice for MemDevice {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn read(&self, offset: u64, mut buf: IoBuf) -> IoFuture<IoBuf> {
        let done = self.range(Operation::Read, offset, buf.len()).map(|range| {
            buf.copy_from_slice(&self.bytes.read()[range]);
            buf
        });
        Box::pin(ready(done))
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        let done = self
            .range(Operation::Write, offset, data.len())
            .map(|range| self.bytes.write()[range].copy_from_slice(&data));
        Box::pin(ready(done))
    }

    fn flush(&self) -> IoFuture<()> {
        Box::pin(ready(Ok(())))
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        let done = self
            .range(Operation::Discard, offset, to_usize(length))
            .map(|range| self.bytes.write()[range].fill(0));
        Box::pin(ready(done))
    }
}
