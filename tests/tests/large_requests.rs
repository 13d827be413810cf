//! Large requests are not chopped: what lies in one piece is moved in one piece.

use libwb::cache::{Cache, OpenOptions};
use libwb::device::{BlockDevice, Device, IoBuf, IoFuture, MemDevice, SharedBuf};
use libwb::format::{
    BLOCK_BYTES, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector, encode_superblock_block, to_u64,
    to_usize,
};
use libwb::reactor::Reactor;
use parking_lot::Mutex;
use std::sync::Arc;

const SEGMENTS: usize = 4;
/// Data that fills a number of segments.
const REQUEST_BYTES: usize = SEGMENTS * 127 * BLOCK_BYTES;

/// A device that notes where it was read and written, and how much.
struct Noted {
    device: Arc<MemDevice>,
    reads: Mutex<Vec<(u64, usize)>>,
    writes: Mutex<Vec<(u64, usize)>>,
}

impl Noted {
    fn new(device: MemDevice) -> Arc<Noted> {
        Arc::new(Noted {
            device: Arc::new(device),
            reads: Mutex::default(),
            writes: Mutex::default(),
        })
    }

    /// The reads and writes of the data that there were since the last time.
    fn take(&self, data_from: u64) -> [Vec<(u64, usize)>; 2] {
        [&self.reads, &self.writes].map(|noted| {
            let mut all = std::mem::take(&mut *noted.lock());
            all.retain(|&(offset, _)| offset >= data_from);
            all.sort_unstable();
            all
        })
    }
}

impl BlockDevice for Noted {
    fn name(&self) -> &Arc<str> {
        self.device.name()
    }

    fn size(&self) -> u64 {
        self.device.size()
    }

    fn block_size(&self) -> u32 {
        self.device.block_size()
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        self.reads.lock().push((offset, buf.len()));
        self.device.read(offset, buf)
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        self.writes.lock().push((offset, data.len()));
        self.device.write(offset, data)
    }

    fn write_parts(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        let length = parts.iter().map(|part| part.len()).sum();
        self.writes.lock().push((offset, length));
        self.device.write_parts(offset, parts)
    }

    fn flush(&self) -> IoFuture<()> {
        self.device.flush()
    }

    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.device.discard(offset, length)
    }
}

#[test]
fn a_large_request_is_one_write_or_read_for_each_piece_that_it_lies_in() {
    let reactor = Reactor::start().unwrap();
    let mut formatted = vec![0; to_usize(SUPERBLOCK_REGION_BYTES) + 4 * SEGMENTS * SEGMENT_BYTES];
    encode_superblock_block(formatted.first_chunk_mut().unwrap());
    let cache_device = Noted::new(MemDevice::with_content("cache", formatted));
    let backing = Noted::new(MemDevice::new("backing", to_u64(2 * REQUEST_BYTES)));
    let (cache, backing_device): (Device, Device) = (cache_device.clone(), backing.clone());
    let runtime = Arc::new(reactor.handle().clone());
    let cache = reactor
        .block_on(Cache::open(cache, backing_device, runtime, OpenOptions::serve()))
        .unwrap();
    cache.pause();
    let data: Vec<u8> = (0..=250u8).cycle().flat_map(|of| [of; 512]).take(REQUEST_BYTES).collect();
    cache_device.take(0);

    reactor.block_on(cache.write(Sector(0), &data)).unwrap();
    reactor.block_on(cache.flush()).unwrap();
    let slot = |nth: usize| SUPERBLOCK_REGION_BYTES + to_u64(nth * SEGMENT_BYTES);
    let segments: Vec<_> = (0..SEGMENTS).map(|nth| (slot(nth), SEGMENT_BYTES)).collect();
    assert_eq!(
        cache_device.take(SUPERBLOCK_REGION_BYTES),
        [vec![], segments],
        "a segment is one write"
    );

    let read = |sector| {
        reactor.block_on(cache.read(Sector(sector), IoBuf::zeroed(REQUEST_BYTES))).unwrap()
    };
    assert!(read(0)[..] == data[..]);
    let blocks: Vec<_> = (0..SEGMENTS)
        .map(|nth| (slot(nth) + to_u64(BLOCK_BYTES), SEGMENT_BYTES - BLOCK_BYTES))
        .collect();
    assert_eq!(cache_device.take(SUPERBLOCK_REGION_BYTES)[0], blocks, "and one read");
    assert_eq!(backing.take(0), [vec![], vec![]]);

    assert!(read(to_u64(REQUEST_BYTES / 512)).iter().all(|&byte| byte == 0));
    assert_eq!(
        backing.take(0)[0],
        [(to_u64(REQUEST_BYTES), REQUEST_BYTES)],
        "what is not cached is one read"
    );

    reactor.block_on(cache.drain()).unwrap();
    let [_, written_back] = backing.take(0);
    let (longest, rest) = (1 << 20, REQUEST_BYTES - (1 << 20));
    assert_eq!(written_back, [(0, longest), (to_u64(longest), rest)], "1 MiB is the longest write");
    assert!(backing.device.content()[..REQUEST_BYTES] == data[..]);
    reactor.block_on(cache.close()).unwrap();
}
