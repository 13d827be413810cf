//! Logs in memory for tests to damage, and what recovery and salvage should make of them.

use crate::device::{
    BlockDevice, Device, DeviceError, DeviceLayer, IoBuf, IoFuture, MemDevice, Operation, SharedBuf,
};
use crate::format::{
    BLOCK_BYTES, BlockNo, Commit, DirtyBits, EXTENSION_OFFSETS, Geometry, Metablock,
    RECORD_BLOCK_OFFSET, Reason, Record, SECTOR_BYTES, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES,
    SegmentExtension, SegmentId, SuperblockExtension, crc32c, encode_header, encode_record_block,
    encode_superblock_block, to_u64, to_usize,
};
use crate::log::Use;
use crate::log::live::visit_headers;
use crate::log::salvage::{Plan, SalvageMode, Scanned};
use futures_lite::future::block_on;
use nix::errno::Errno;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) const SLOTS: u64 = 14;
/// Blocks in a segment of these logs.
pub(super) const LENGTH: u64 = 5;

/// The content of a block: this byte, repeated. In a short log, it differs from block to block.
pub(super) fn stamp(id: u64, nth: u64) -> u8 {
    u8::try_from((id * LENGTH + nth) % 256).expect("a byte")
}

/// A write: its offset, its data, and the number of flushes before it.
pub(super) type Write = (u64, Vec<u8>, usize);

/// A device in memory that records every write. Some offsets are unreadable until they are written.
pub(super) struct Recorder {
    pub(super) memory: MemDevice,
    pub(super) writes: Mutex<Vec<Write>>,
    pub(super) flushes: Mutex<usize>,
    pub(super) unreadable: Mutex<Vec<u64>>,
}

impl DeviceLayer for Recorder {
    fn below(&self) -> &dyn BlockDevice {
        &self.memory
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        let end = offset + to_u64(buf.len());
        if self.unreadable.lock().iter().any(|&at| offset <= at && at < end) {
            let (device, length) = (self.memory.name().clone(), to_u64(buf.len()));
            let error = DeviceError {
                device,
                operation: Operation::Read,
                offset,
                length,
                cause: Errno::EIO,
            };
            return Box::pin(std::future::ready(Err(error)));
        }
        self.memory.read(offset, buf)
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        let end = offset + to_u64(data.len());
        self.unreadable.lock().retain(|&at| !(offset <= at && at < end));
        self.writes.lock().push((offset, data.to_vec(), *self.flushes.lock()));
        self.memory.write(offset, data)
    }

    fn flush(&self) -> IoFuture<()> {
        *self.flushes.lock() += 1;
        self.memory.flush()
    }
}

/// A cache device with a log that a test can damage.
#[derive(Clone)]
pub(super) struct TestLog {
    pub(super) image: Vec<u8>,
    pub(super) page: Option<SuperblockExtension>,
    pub(super) unreadable: Vec<u64>,
}

impl TestLog {
    pub(super) fn empty(slots: u64, extended: bool) -> TestLog {
        let size = SUPERBLOCK_REGION_BYTES + slots * to_u64(SEGMENT_BYTES);
        let page = extended.then(|| SuperblockExtension::new(uuid::Uuid::from_u128(7), size));
        let mut log = TestLog { image: vec![0; to_usize(size)], page, unreadable: Vec::new() };
        encode_superblock_block(log.image.first_chunk_mut().unwrap());
        log.write_pages(None);
        log
    }

    /// Segments 1 to `newest`, each with a few whole blocks. Every segment rewrites the first two
    /// blocks.
    pub(super) fn new(newest: u64, extended: bool) -> TestLog {
        let mut log = TestLog::empty(SLOTS, extended);
        for id in 1..=newest {
            log.put(id, extended, id.saturating_sub(2));
        }
        log
    }

    pub(super) fn write_pages(&mut self, clean: Option<SegmentId>) {
        let Some(page) = &self.page else { return };
        for (generation, at) in (0..).zip(EXTENSION_OFFSETS) {
            let page = SuperblockExtension { generation, clean, ..page.clone() };
            page.encode(self.image[to_usize(at)..].first_chunk_mut().unwrap());
        }
    }

    pub(super) fn put(&mut self, id: u64, extended: bool, durable: u64) {
        self.put_segment(id, extended, Reason::Full, None, durable);
    }

    /// An open segment. Its header names a commit of its first `before` blocks as the previous one.
    pub(super) fn put_open(&mut self, id: u64, before: u8, durable: u64) {
        self.put_segment(id, true, Reason::Open, Some(before), durable);
    }

    fn put_segment(
        &mut self,
        id: u64,
        extended: bool,
        reason: Reason,
        before: Option<u8>,
        durable: u64,
    ) {
        let blocks = (0..LENGTH).map(|nth| if nth < 2 { nth } else { 100 * id + nth });
        let data: Vec<u8> = (0..LENGTH).flat_map(|nth| [stamp(id, nth); BLOCK_BYTES]).collect();
        let entry = |(nth, block)| {
            let crc = extended.then(|| crc32c(&data[nth * BLOCK_BYTES..][..BLOCK_BYTES]));
            Metablock { block: BlockNo(block), dirty: DirtyBits::ALL, crc, lost: false }
        };
        let metablocks: Vec<_> = blocks.enumerate().map(entry).collect();
        let before = before.map(|length| {
            let first = &metablocks[..usize::from(length)];
            Commit {
                length,
                checksum: encode_header(&mut [0; BLOCK_BYTES], SegmentId(id), first, &[], None),
            }
        });
        let digest = self.page.as_ref().map(SuperblockExtension::digest).unwrap_or_default();
        let (durable, written_back) = (SegmentId(durable), SegmentId::NONE);
        let extension = SegmentExtension { digest, reason, durable, written_back, time: 1, before };
        let at = self.at(id);
        let segment = &mut self.image[at..at + SEGMENT_BYTES];
        encode_header(
            segment.first_chunk_mut().unwrap(),
            SegmentId(id),
            &metablocks,
            &data,
            extended.then_some(&extension),
        );
        segment[BLOCK_BYTES..][..data.len()].copy_from_slice(&data);
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry::of_device(to_u64(self.image.len())).unwrap()
    }

    pub(super) fn at(&self, id: u64) -> usize {
        let geometry = self.geometry();
        to_usize(geometry.slot_offset(geometry.slot_of(SegmentId(id))))
    }

    /// Flips a bit of a data block.
    pub(super) fn rot(&mut self, id: u64, block: usize) -> &mut TestLog {
        let at = self.at(id) + BLOCK_BYTES * (1 + block) + 77;
        self.image[at] ^= 4;
        self
    }

    /// Flips a bit of a header.
    pub(super) fn rot_header(&mut self, id: u64, byte: usize) -> &mut TestLog {
        let at = self.at(id) + byte;
        self.image[at] ^= 4;
        self
    }

    /// Erases both copies of the superblock extension.
    pub(super) fn lose_pages(&mut self) -> &mut TestLog {
        for at in EXTENSION_OFFSETS {
            self.image[to_usize(at)..][..BLOCK_BYTES].fill(0);
        }
        self
    }

    /// Overwrites the header with garbage.
    pub(super) fn garble(&mut self, id: u64) -> &mut TestLog {
        let at = self.at(id);
        self.image[at..at + BLOCK_BYTES].fill(0xa5);
        self
    }

    pub(super) fn record(&mut self, id: u64) -> &mut TestLog {
        let at = to_usize(RECORD_BLOCK_OFFSET);
        encode_record_block(
            self.image[at..].first_chunk_mut().unwrap(),
            Record { id: SegmentId(id), digest: None },
        );
        self
    }

    pub(super) fn unreadable(&mut self, id: u64) -> &mut TestLog {
        self.unreadable.push(to_u64(self.at(id)));
        self
    }

    pub(super) fn device(&self) -> Arc<Recorder> {
        Arc::new(Recorder {
            memory: MemDevice::with_content("cache", self.image.clone()),
            writes: Mutex::default(),
            flushes: Mutex::default(),
            unreadable: Mutex::new(self.unreadable.clone()),
        })
    }
}

pub(super) fn read(device: &Device) -> Scanned {
    block_on(Scanned::read(device, Use::Write, |_| ())).unwrap()
}

/// Salvages a log, and checks that it is sound afterwards.
pub(super) fn salvage(log: &TestLog, way: SalvageMode) -> (Arc<Recorder>, Plan) {
    let recorder = log.device();
    let device: Device = recorder.clone();
    let plan = block_on(read(&device).salvage(&device, way)).unwrap().expect("a corrupt log");
    assert!(recorder.writes.lock().is_empty(), "planning writes nothing");
    block_on(plan.apply(&device)).unwrap();
    let after = read(&device);
    assert_eq!(after.recovery().corruption, []);
    assert_eq!(after.recovery().point, plan.point);
    assert!(block_on(after.salvage(&device, way)).unwrap().is_none(), "a sound log is left alone");
    assert!(block_on(after.repair(&device)).unwrap().is_none(), "nothing is left to repair");
    (recorder, plan)
}

/// What recovery would apply: the first byte of the newest version of each block. `None` if it
/// refuses the log.
pub(super) fn volume(image: &[u8]) -> Option<BTreeMap<u64, u8>> {
    let device: Device = Arc::new(MemDevice::with_content("cache", image.to_vec()));
    let scanned = read(&device);
    if scanned.is_corrupt() {
        return None;
    }
    let (geometry, recovery) = (scanned.superblock.geometry, scanned.recovery());
    let mut volume = BTreeMap::new();
    block_on(visit_headers(&device, geometry, recovery.live(), recovery.cut_short(), |header| {
        let data = to_usize(geometry.slot_offset(geometry.slot_of(header.id))) + BLOCK_BYTES;
        for (nth, entry) in header.metablocks.iter().enumerate() {
            volume.insert(entry.block.0, image[data + nth * BLOCK_BYTES]);
        }
    }))
    .unwrap();
    Some(volume)
}

/// The volume of a log of these segments, without the blocks `but` of (segment, index).
pub(super) fn expected(
    segments: impl IntoIterator<Item = u64>,
    but: &[(u64, u64)],
) -> BTreeMap<u64, u8> {
    let mut volume = BTreeMap::new();
    for id in segments {
        for nth in (0..LENGTH).filter(|&nth| !but.contains(&(id, nth))) {
            let block = if nth < 2 { nth } else { 100 * id + nth };
            volume.insert(block, stamp(id, nth));
        }
    }
    volume
}

pub(super) fn lost(plan: &Plan) -> Vec<(u64, Vec<u64>)> {
    plan.given_up
        .iter()
        .map(|lost| (lost.id.0, lost.blocks.iter().map(|block| block.0).collect()))
        .collect()
}

/// Which unflushed writes survive a power cut, as bits.
pub(super) const MASKS: [u64; 6] =
    [0, u64::MAX, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa, 1, 6];

/// The same writes, split into sectors, because a power cut may tear a write.
pub(super) fn in_sectors(writes: &[Write]) -> Vec<Write> {
    let sectors = writes.iter().flat_map(|(offset, data, after)| {
        let places = (*offset..).step_by(SECTOR_BYTES);
        places.zip(data.chunks(SECTOR_BYTES)).map(|(at, sector)| (at, sector.to_vec(), *after))
    });
    sectors.collect()
}

/// The log after a power cut that keeps all writes up to a flush, and some later ones (`any`).
pub(super) fn after_power_cut(
    log: &TestLog,
    writes: &[Write],
    flushes: usize,
    any: u64,
) -> TestLog {
    with_survivors(log, writes, &survivors(writes, flushes, any))
}

/// Which writes survive: all up to a flush, and some later ones (`any`).
pub(super) fn survivors(writes: &[Write], flushes: usize, any: u64) -> Vec<bool> {
    let mut unflushed = 0;
    let survives = |(.., after): &Write| {
        let kept = *after < flushes || (*after == flushes && any >> (unflushed % 64) & 1 == 1);
        unflushed += u32::from(*after == flushes);
        kept
    };
    writes.iter().map(survives).collect()
}

/// The log on which these writes have survived.
pub(super) fn with_survivors(log: &TestLog, writes: &[Write], survivors: &[bool]) -> TestLog {
    let mut log = log.clone();
    for ((offset, data, _), _) in writes.iter().zip(survivors).filter(|(_, kept)| **kept) {
        let at = to_usize(*offset);
        log.image[at..at + data.len()].copy_from_slice(data);
        log.unreadable.retain(|&bad| !(*offset <= bad && bad < offset + to_u64(data.len())));
    }
    log
}
