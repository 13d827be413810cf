//! Which commits are written durably, on a device in memory that notes what is asked of it.

use crate::cache::{Cache, CacheError, OpenOptions};
use crate::device::{
    BlockDevice, Device, DeviceError, IoBuf, IoFuture, MemDevice, Operation, SharedBuf,
};
use crate::format::{BLOCK_BYTES, BlockNo, SEGMENT_BYTES, SuperblockExtension, to_u64};
use crate::log::format_device::create;
use crate::reactor::Reactor;
use nix::errno::Errno;
use parking_lot::Mutex;
use std::future::ready;
use std::sync::Arc;

const BLOCKS: u64 = 512;

struct Noting {
    memory: MemDevice,
    prefers_durable_writes: bool,
    noted: Mutex<Vec<Operation>>,
    failing: Mutex<bool>,
}

impl Noting {
    fn note(&self, operation: Operation) {
        self.noted.lock().push(operation);
    }

    /// How many operations of each of these kinds there were since the last time.
    fn take<const N: usize>(&self, kinds: [Operation; N]) -> [usize; N] {
        let noted = std::mem::take(&mut *self.noted.lock());
        kinds.map(|kind| noted.iter().filter(|&&it| it == kind).count())
    }
}

impl BlockDevice for Noting {
    fn name(&self) -> &Arc<str> {
        self.memory.name()
    }

    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        self.memory.read(offset, buf)
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        self.note(Operation::Write);
        self.memory.write(offset, data)
    }

    fn prefers_durable_writes(&self) -> bool {
        self.prefers_durable_writes
    }

    fn write_durably(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        self.note(Operation::DurableWrite);
        if *self.failing.lock() {
            let (device, operation) = (self.memory.name().clone(), Operation::DurableWrite);
            let length = to_u64(parts.iter().map(|part| part.len()).sum());
            let error = DeviceError { device, operation, offset, length, cause: Errno::EIO };
            return Box::pin(ready(Err(error)));
        }
        self.memory.write_parts(offset, parts)
    }

    fn flush(&self) -> IoFuture<()> {
        self.note(Operation::Flush);
        self.memory.flush()
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.memory.discard(offset, length)
    }
}

struct Rig {
    reactor: Reactor,
    device: Arc<Noting>,
    cache: Cache,
}

impl Rig {
    fn new(prefers_durable_writes: bool) -> Rig {
        let reactor = Reactor::start().unwrap();
        let memory = MemDevice::new("cache", 10 * to_u64(SEGMENT_BYTES));
        let (noted, failing) = Default::default();
        let device = Arc::new(Noting { memory, prefers_durable_writes, noted, failing });
        let cache: Device = device.clone();
        let page = SuperblockExtension::new(uuid::Uuid::from_u128(7), cache.size());
        reactor.block_on(create(&cache, Some(&page), |_| ())).unwrap();
        let backing = Arc::new(MemDevice::new("backing", BLOCKS * to_u64(BLOCK_BYTES)));
        let runtime = Arc::new(reactor.handle().clone());
        let opening = Cache::open(cache, backing, runtime, OpenOptions::serve());
        let cache = reactor.block_on(opening).unwrap();
        cache.pause();
        device.noted.lock().clear();
        Rig { reactor, device, cache }
    }

    fn write(&self, block: u64) -> Result<(), CacheError> {
        self.reactor.block_on(self.cache.write(BlockNo(block).sector(), &[7; BLOCK_BYTES]))
    }

    fn flush(&self) -> Result<(), CacheError> {
        self.reactor.block_on(self.cache.flush())
    }
}

const KINDS: [Operation; 3] = [Operation::Write, Operation::DurableWrite, Operation::Flush];

#[test]
fn a_commit_is_written_durably_if_all_before_it_is_durable_and_the_device_prefers_that() {
    let rig = Rig::new(true);
    // The first block lies beside the header, the others do not.
    for (block, writes) in [(0, 1), (1, 2), (2, 2)] {
        rig.write(block).unwrap();
        rig.flush().unwrap();
        assert_eq!(rig.device.take(KINDS), [0, writes, 0]);
    }
    // What fills this segment up is written, but not durable.
    (3..200).for_each(|block| rig.write(block).unwrap());
    rig.flush().unwrap();
    let [_, durable_writes, flushes] = rig.device.take(KINDS);
    assert_eq!((durable_writes, flushes), (0, 1));
    rig.write(200).unwrap();
    rig.flush().unwrap();
    assert_eq!(rig.device.take(KINDS), [0, 2, 0]);
}

#[test]
fn a_device_that_does_not_prefer_them_gets_no_durable_writes() {
    let rig = Rig::new(false);
    rig.write(0).unwrap();
    rig.flush().unwrap();
    let [_, durable_writes, flushes] = rig.device.take(KINDS);
    assert_eq!((durable_writes, flushes), (0, 1));
}

#[test]
fn a_failed_durable_write_is_final() {
    let rig = Rig::new(true);
    rig.write(0).unwrap();
    *rig.device.failing.lock() = true;
    assert!(matches!(rig.flush(), Err(CacheError::Failed(_))));
    *rig.device.failing.lock() = false;
    assert!(rig.write(1).is_err() && rig.flush().is_err());
    assert_eq!(rig.device.take(KINDS), [0, 1, 0]);
    let read = rig.cache.read(BlockNo(0).sector(), IoBuf::zeroed(BLOCK_BYTES));
    assert_eq!(rig.reactor.block_on(read).unwrap()[..], [7; BLOCK_BYTES]);
}
