//! Cache devices with logs made by hand, and damage to them.

use crate::cache_bytes;
use fastrand::Rng;
use libwb::format::{
    BLOCK_BYTES, BlockNo, Commit, DirtyBits, EXTENSION_OFFSETS, Geometry, Metablock,
    RECORD_BLOCK_OFFSET, Reason, Record, SEGMENT_BYTES, SegmentExtension, SegmentHeader, SegmentId,
    SuperblockExtension, crc32c, encode_header, encode_record_block, encode_superblock_block,
    to_u64, to_usize,
};
use uuid::Uuid;

/// Segments of most of these logs.
const SLOTS: u32 = 14;
/// Blocks in a segment, as a rule.
const LENGTH: u8 = 5;

/// A cache device, to be damaged.
#[derive(Clone)]
pub struct Log {
    image: Vec<u8>,
    extension: Option<SuperblockExtension>,
}

impl Log {
    fn empty(slots: u32, extended: bool) -> Log {
        let size = cache_bytes(slots);
        let extension = extended.then(|| SuperblockExtension::new(Uuid::from_u128(7), size));
        let mut log = Log { image: vec![0; to_usize(size)], extension };
        encode_superblock_block(log.image.first_chunk_mut().expect("a block"));
        log.mark(None)
    }

    /// Segments 1 to `newest`. Each writes blocks 0 and 1 again, and others of its own.
    fn new(slots: u32, newest: u64, extended: bool) -> Log {
        (1..=newest).fold(Log::empty(slots, extended), |log, id| log.put(id, extended))
    }

    fn at(&self, id: u64) -> usize {
        let geometry = Geometry::of_device(to_u64(self.image.len())).expect("a cache");
        to_usize(geometry.slot_offset(geometry.slot_of(SegmentId(id))))
    }

    /// Writes both superblock pages, with a clean mark or without.
    fn mark(mut self, clean: Option<u64>) -> Log {
        for (generation, at) in (0..).zip(EXTENSION_OFFSETS) {
            let Some(page) = self.extension.clone() else { break };
            let page = SuperblockExtension { generation, clean: clean.map(SegmentId), ..page };
            page.encode(self.image[to_usize(at)..].first_chunk_mut().expect("a block"));
        }
        self
    }

    fn put(self, id: u64, extended: bool) -> Log {
        let durable = extended.then(|| id.saturating_sub(2));
        self.put_blocks(id, LENGTH, durable, Reason::Full, None)
    }

    /// Writes a segment of `length` blocks. If it claims that segments are durable, wb wrote it.
    fn put_blocks(
        mut self,
        id: u64,
        length: u8,
        durable: Option<u64>,
        reason: Reason,
        before: Option<Commit>,
    ) -> Log {
        let stamp = |nth: u8| u8::try_from(id % 50).unwrap_or_default() * 5 + nth;
        let data: Vec<u8> = (0..length).flat_map(|nth| [stamp(nth); BLOCK_BYTES]).collect();
        let entry = |nth: u8| {
            let block = if nth < 2 { nth.into() } else { 100 * (id % 20) + u64::from(nth) };
            let crc = durable.map(|_| crc32c(&[stamp(nth); BLOCK_BYTES]));
            Metablock { block: BlockNo(block), dirty: DirtyBits::ALL, crc, lost: false }
        };
        let entries: Vec<_> = (0..length).map(entry).collect();
        let digest = self.extension.as_ref().map(SuperblockExtension::digest).unwrap_or_default();
        let extension = durable.map(|durable| SegmentExtension {
            digest,
            reason,
            durable: SegmentId(durable),
            written_back: SegmentId::NONE,
            time: 1,
            before,
        });
        let at = self.at(id);
        let block = self.image[at..].first_chunk_mut().expect("a block");
        encode_header(block, SegmentId(id), &entries, &data, extension.as_ref());
        self.image[at + BLOCK_BYTES..][..data.len()].copy_from_slice(&data);
        self
    }

    /// Writes a segment of two commits: the first blocks, then all.
    fn put_commits(self, id: u64, first: u8, all: u8, durable: u64, reason: Reason) -> Log {
        let log = self.put_blocks(id, first, Some(durable), Reason::Open, None);
        let header = &log.image[log.at(id)..];
        let checksum = u32::from_le_bytes(header[8..12].try_into().expect("four bytes"));
        let before = Some(Commit { length: first, checksum });
        log.put_blocks(id, all, Some(durable), reason, before)
    }

    /// Marks a block as lost.
    fn lose(mut self, id: u64, block: usize) -> Log {
        let at = self.at(id);
        let mut header =
            SegmentHeader::decode(self.image[at..].first_chunk().expect("a block")).expect("sound");
        let entry = &mut header.metablocks[block];
        (entry.lost, entry.crc) = (true, entry.crc.map(|crc| !crc));
        let data = self.image[at + BLOCK_BYTES..][..header.data_bytes()].to_vec();
        let first = self.image[at..].first_chunk_mut().expect("a block");
        encode_header(first, header.id, &header.metablocks, &data, header.extension.as_ref());
        self
    }

    /// Flips a bit of a data block.
    fn rot(self, id: u64, block: usize) -> Log {
        let at = BLOCK_BYTES * (1 + block) + 77;
        self.flip(id, at)
    }

    /// Flips a bit somewhere in a segment.
    fn flip(mut self, id: u64, at: usize) -> Log {
        let at = self.at(id) + at;
        self.image[at] ^= 4;
        self
    }

    fn fill(mut self, id: u64, at: usize, bytes: usize, with: u8) -> Log {
        let at = self.at(id) + at;
        self.image[at..at + bytes].fill(with);
        self
    }

    /// Overwrites the header with garbage.
    fn garble(self, id: u64) -> Log {
        self.fill(id, 0, BLOCK_BYTES, 0xa5)
    }

    /// Writes the superblock record, as wb does on such a device.
    fn record(self, id: u64) -> Log {
        let digest = self.extension.as_ref().map(SuperblockExtension::digest);
        self.record_with(Record { id: SegmentId(id), digest })
    }

    fn record_with(mut self, record: Record) -> Log {
        let at = to_usize(RECORD_BLOCK_OFFSET);
        encode_record_block(self.image[at..].first_chunk_mut().expect("a block"), record);
        self
    }

    fn rot_record(mut self) -> Log {
        self.image[to_usize(RECORD_BLOCK_OFFSET) + BLOCK_BYTES - 512] ^= 2;
        self
    }

    fn pages(mut self, first: usize, damage: impl Fn(&mut [u8])) -> Log {
        for at in &EXTENSION_OFFSETS[first..] {
            damage(&mut self.image[to_usize(*at)..][..BLOCK_BYTES]);
        }
        self
    }

    fn copy(mut self, from: u64, to: u64) -> Log {
        let (from, to) = (self.at(from), self.at(to));
        self.image.copy_within(from..from + SEGMENT_BYTES, to);
        self
    }
}

/// Each kind of damage, with a name.
pub fn devices() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Log)> = Vec::new();
    for extended in [false, true] {
        let kind = if extended { "extended" } else { "base format" };
        let named =
            damaged(extended).into_iter().map(|(what, log)| (format!("{kind}, {what}"), log));
        all.extend(named);
    }
    all.extend(with_evidence().into_iter().map(|(what, log)| (what.into(), log)));
    all.into_iter().map(|(what, log)| (what, log.image)).collect()
}

fn damaged(extended: bool) -> Vec<(&'static str, Log)> {
    let new = |newest| Log::new(SLOTS, newest, extended);
    vec![
        ("empty", new(0)),
        ("sound", new(9)),
        ("sound after a lap", new(20)),
        ("rot in the middle", new(9).rot(3, 2)),
        ("rot in the newest", new(9).rot(9, 1)),
        ("rot in the newest two", new(9).rot(8, 1).rot(9, 1)),
        ("rot far from the end", new(20).rot(8, 2).rot(12, 0).garble(18)),
        ("garbage above what is written back", new(20).garble(7).rot(8, 4).rot(11, 0)),
        ("rot in what is written back", new(20).record(12).rot(9, 1)),
        ("garbage in what is written back", new(20).record(9).rot(10, 1).garble(9)),
        ("the first and another", new(14).garble(1).rot(9, 1)),
        ("the record covers a newest one that is gone", new(9).record(9).garble(9)),
        ("a record beyond the log", new(9).record(11)),
        ("a record within the log that is too high", new(9).record(6)),
        ("a garbage record, and rot", new(9).record(u64::MAX).rot(4, 4)),
        ("garbage where the log has not reached", new(5).garble(12).garble(13)),
        ("a hole near the end", new(9).fill(8, 0, BLOCK_BYTES, 0)),
        ("a hole far from the end", new(9).fill(2, 0, BLOCK_BYTES, 0)),
        ("an old segment where a new one was lost", new(20).copy(19, 20)),
        ("a segment in another slot", new(9).copy(3, 4)),
        ("a damaged id", new(9).flip(4, 0)),
        ("a damaged id that jumps ahead", new(9).flip(4, 1)),
        ("a damaged length", new(9).flip(4, 12)),
        ("a damaged address", new(9).flip(4, 512)),
        ("a lone slot", Log::new(1, 3, extended)),
        ("a lone slot with rot", Log::new(1, 3, extended).rot(3, 1)),
        ("a lone slot with rot and its record", Log::new(1, 3, extended).record(3).rot(3, 1)),
        ("two slots", Log::new(2, 5, extended).rot(5, 0)),
    ]
}

/// Logs whose headers, marks or pages tell more than a scan of the segments.
fn with_evidence() -> Vec<(&'static str, Log)> {
    let new = |newest| Log::new(SLOTS, newest, true);
    let torn = |durable| {
        let log = new(9).put_blocks(10, 6, Some(durable), Reason::Open, None);
        log.fill(10, BLOCK_BYTES * 6, BLOCK_BYTES, 0)
    };
    let commits = || Log::empty(SLOTS, true).put_commits(1, 19, 20, 0, Reason::Open);
    let later = || new(9).record(4).put_commits(10, 3, 6, 9, Reason::Open);
    vec![
        ("two commits", commits()),
        ("rot in the newest commit", commits().rot(1, 19)),
        ("rot in the commit before", commits().rot(1, 3)),
        ("an entry of the commit before", commits().flip(1, 512 + 16 * 3)),
        ("an entry of the newest commit", commits().flip(1, 512 + 16 * 19)),
        (
            "an address of the newest commit that is no block",
            commits().fill(1, 512 + 16 * 19, 1, 3),
        ),
        ("two commits after others", later()),
        ("rot in the commit before, after others", later().rot(10, 1)),
        ("rot in the newest commit, after others", later().rot(10, 5)),
        ("rot in what the newest says was durable", later().rot(8, 1)),
        ("a torn newest segment", torn(9)),
        ("rot in what a torn header says was durable", torn(9).rot(9, 4)),
        ("rot in what no header says was durable", torn(8).rot(9, 4)),
        ("a claim that is not below the id", torn(10).rot(9, 4)),
        ("a marker that is damaged", new(9).record(4).flip(7, 17)),
        ("a digest that is damaged", new(9).record(4).flip(7, 21)),
        ("a reason that is damaged", new(9).record(4).flip(9, 28)),
        ("a claim that is damaged", new(9).record(4).flip(9, 33)),
        ("padding that is damaged", new(9).record(4).flip(9, 300)),
        ("a marker without all else", new(9).record(4).fill(9, 20, 492, 0)),
        ("an empty slot that is not all zeros", new(9).flip(12, 40)),
        ("an id that became zero", new(9).fill(9, 0, 8, 0)),
        (
            "an id of what is written back that jumps ahead",
            Log::new(16, 16, true).record(3).mark(Some(16)).flip(1, 2),
        ),
        ("a record of the module", new(9).record_with(Record { id: SegmentId(4), digest: None })),
        (
            "a record of another cache",
            new(9).record_with(Record { id: SegmentId(4), digest: Some(4) }),
        ),
        ("a record that is damaged", new(9).record(4).rot_record()),
        ("a block that is lost", new(9).lose(5, 2)),
        ("a block that was lost and written anew", new(9).lose(5, 1)),
        ("a block that is lost, and rot", new(9).lose(9, 3).rot(5, 1)),
        ("closed in order", new(9).mark(Some(9))),
        ("closed in order, the newest two rotten", new(9).mark(Some(9)).rot(8, 2).rot(9, 4)),
        (
            "closed in order, beyond the newest",
            new(9).put_blocks(11, 5, Some(0), Reason::Full, None).mark(Some(20)),
        ),
        ("the module has gone on", new(20).put(19, false).put(20, false).garble(8)),
        ("the module has gone on after a hole", new(9).garble(8).put(9, false).put(10, false)),
        ("the module has gone on after an open segment", later().put(11, false)),
        ("segments of another cache", {
            let mut other = new(9);
            other.extension =
                Some(SuperblockExtension::new(Uuid::from_u128(8), cache_bytes(SLOTS)));
            other.mark(None).put(10, true)
        }),
        ("one page gone", new(9).pages(1, |page| page.fill(0))),
        ("one page damaged", new(9).pages(1, |page| page[70] ^= 1)),
        ("both pages gone", new(9).pages(0, |page| page.fill(0))),
        ("both pages damaged", new(9).pages(0, |page| page[70] ^= 1)),
        ("both pages gone, and rot", new(9).pages(0, |page| page.fill(0)).rot(5, 1)),
        ("a device that was cut", {
            let mut cut = new(9);
            cut.image.truncate(to_usize(cache_bytes(11)));
            cut
        }),
    ]
}

/// A log with damage that a seed chooses.
pub fn random(seed: u64) -> Vec<u8> {
    let mut rng = Rng::with_seed(seed);
    let slots = if rng.u8(..4) == 0 { rng.u32(1..6) } else { SLOTS };
    let (newest, extended) = (rng.u64(1..40), rng.u8(..3) > 0);
    let by_module = if rng.u8(..4) == 0 { rng.u64(..newest) } else { newest };
    let mut log = Log::empty(slots, extended);
    for id in 1..=newest {
        log = match rng.u8(..4) {
            0 if extended && id <= by_module => {
                let reason = if id == newest { Reason::Open } else { Reason::Full };
                log.put_commits(id, rng.u8(1..5), 6, id.saturating_sub(1), reason)
            }
            _ => log.put(id, extended && id <= by_module),
        };
    }
    if rng.bool() {
        log = log.record(rng.u64(..=newest));
    }
    for _ in 0..rng.u8(1..4) {
        let id = newest.saturating_sub(rng.u64(..8)).max(1);
        log = match rng.u8(..9) {
            0..3 => log.rot(id, rng.usize(..6)),
            3 => log.garble(id),
            4 => log.flip(id, rng.usize(..80)),
            5 => log.flip(id, 512 + rng.usize(..96)),
            6 => log.record(rng.u64(..newest + 3)),
            7 => log.mark(Some(rng.u64(1..newest + 3))),
            _ => log.copy(id, rng.u64(1..40)),
        };
    }
    log.image
}
