//! Volumes without a cache: in plain memory, which costs the front end least, and on a plain
//! device.

use libwb::device::{Device, IoBuf, SharedBuf};
use libwb::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use libwb::serve::Volume;
use nix::errno::Errno;
use parking_lot::Mutex;
use std::sync::Arc;

/// Bytes under one lock: few enough that requests hardly ever meet.
const SHARD_BYTES: usize = 1 << 16;

/// A volume in plain memory.
#[derive(Clone)]
pub(crate) struct MemoryVolume(Arc<[Mutex<Box<[u8]>>]>);

impl MemoryVolume {
    /// A volume of at least `bytes` bytes, all of them resident.
    pub(crate) fn new(bytes: u64) -> MemoryVolume {
        let shards = to_usize(bytes).div_ceil(SHARD_BYTES);
        MemoryVolume(
            (0..shards).map(|_| Mutex::new(vec![0xa5; SHARD_BYTES].into_boxed_slice())).collect(),
        )
    }

    /// Visits the memory of a request, shard by shard. `part` gets the offset in the request.
    fn visit(
        &self,
        sector: Sector,
        length: usize,
        mut part: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), Errno> {
        let start = to_usize(sector.0) * SECTOR_BYTES;
        let mut done = 0;
        while done < length {
            let (shard, from) = ((start + done) / SHARD_BYTES, (start + done) % SHARD_BYTES);
            let count = (length - done).min(SHARD_BYTES - from);
            let mut bytes = self.0.get(shard).ok_or(Errno::EINVAL)?.lock();
            part(done, &mut bytes[from..from + count]);
            done += count;
        }
        Ok(())
    }
}

impl Volume for MemoryVolume {
    async fn discard(&self, _sector: Sector, _length: u64) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn size(&self) -> u64 {
        to_u64(self.0.len() * SHARD_BYTES)
    }

    fn write_ready(&self, sector: Sector, data: &[u8]) -> Result<usize, Errno> {
        self.visit(sector, data.len(), |at, bytes| {
            bytes.copy_from_slice(&data[at..at + bytes.len()])
        })?;
        Ok(data.len())
    }

    async fn write_rest(&self, sector: Sector, data: Vec<u8>) -> Result<(), Errno> {
        self.write_ready(sector, &data).map(drop)
    }

    async fn read(&self, sector: Sector, mut buf: IoBuf) -> Result<IoBuf, Errno> {
        let length = buf.len();
        self.visit(sector, length, |at, bytes| buf[at..at + bytes.len()].copy_from_slice(bytes))?;
        Ok(buf)
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }
}

/// A volume on a device that is read and written in place.
#[derive(Clone)]
pub(crate) struct DeviceVolume(pub(crate) Device);

impl Volume for DeviceVolume {
    async fn discard(&self, _sector: Sector, _length: u64) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn write_ready(&self, _sector: Sector, _data: &[u8]) -> Result<usize, Errno> {
        Ok(0)
    }

    async fn write_rest(&self, sector: Sector, data: Vec<u8>) -> Result<(), Errno> {
        let data = SharedBuf::from(IoBuf::copy_of(&data));
        self.0.write(sector.bytes(), data).await.map_err(|error| error.cause)
    }

    async fn read(&self, sector: Sector, buf: IoBuf) -> Result<IoBuf, Errno> {
        self.0.read_alone(sector.bytes(), buf).await.map_err(|error| error.cause)
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.0.flush().await.map_err(|error| error.cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::block_on;

    #[test]
    fn what_is_written_across_shards_is_read_again() {
        let memory = MemoryVolume::new(to_u64(2 * SHARD_BYTES));
        let sector = Sector(to_u64(SHARD_BYTES / SECTOR_BYTES - 1));
        let data: Vec<u8> = (0..=255).cycle().take(4 * SECTOR_BYTES).collect();
        assert_eq!(memory.write_ready(sector, &data), Ok(data.len()));
        assert_eq!(block_on(memory.read(sector, IoBuf::zeroed(data.len()))).unwrap()[..], data);
        assert_eq!(memory.write_ready(Sector(1 << 40), &data), Err(Errno::EINVAL));
    }
}
