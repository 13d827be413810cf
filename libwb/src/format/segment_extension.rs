//! The extension of a segment's header: what wb keeps in its first sector.
//!
//! The extension has a CRC of its own. `man/wb.5` has the offsets, with a worked hex dump. They
//! never change their meaning.

use super::checksum::{Checksum, crc32c};
use super::geometry::{BLOCK_BYTES, PLACES, SECTOR_BYTES, SegmentId};
use byteorder::{ByteOrder, LittleEndian};

/// Offsets in the first sector of a segment. Its first 13 bytes belong to the base format.
mod header {
    pub(super) const PADDING: usize = 13;
    pub(super) const MARKER: usize = 16;
    pub(super) const DIGEST: usize = 20;
    pub(super) const CRC: usize = 24;
    pub(super) const REASON: usize = 28;
    pub(super) const DURABLE: usize = 32;
    pub(super) const WRITTEN_BACK: usize = 40;
    pub(super) const TIME: usize = 48;
    pub(super) const HAS_COMMITS: usize = 56;
    pub(super) const BEFORE_LENGTH: usize = 57;
    pub(super) const BEFORE_CHECKSUM: usize = 60;
    pub(super) const SECTOR_CRC: usize = 64;

    const _: () =
        assert!(MARKER >= PADDING && HAS_COMMITS == TIME + 8 && SECTOR_CRC == BEFORE_CHECKSUM + 4);
    const _: () = assert!(SECTOR_CRC + 4 <= super::super::geometry::SECTOR_BYTES);
}

const HEADER_MARKER: &[u8; 4] = b"wbsg";

/// Why a segment was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It was full.
    Full,
    /// A flush made it durable.
    Flush,
    /// No write came for a while.
    Idle,
    /// The cache was being closed.
    Close,
    /// It replaces a segment that was lost.
    Salvage,
    /// It was not closed: this is a commit, and more blocks may have been written since.
    Open,
    /// A reason that this version does not know.
    Other(u8),
}

impl Reason {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Reason::Full => 1,
            Reason::Flush => 2,
            Reason::Idle => 3,
            Reason::Close => 4,
            Reason::Salvage => 5,
            Reason::Open => 6,
            Reason::Other(code) => code,
        }
    }

    pub(crate) const fn from_code(code: u8) -> Reason {
        match code {
            1 => Reason::Full,
            2 => Reason::Flush,
            3 => Reason::Idle,
            4 => Reason::Close,
            5 => Reason::Salvage,
            6 => Reason::Open,
            other => Reason::Other(other),
        }
    }
}

/// The first blocks of a segment, and the checksum that proves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The number of blocks.
    pub length: u8,
    /// The checksum of the base format over these blocks and the header. The header's other entries
    /// count as zeros.
    pub checksum: u32,
}

/// What a segment's header says beyond the base format. It all lies in the first sector, which a
/// power cut does not tear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentExtension {
    /// [`SuperblockExtension::digest`](super::SuperblockExtension::digest) of the cache that the
    /// segment belongs to.
    pub digest: u32,
    /// Why the segment was closed.
    pub reason: Reason,
    /// Every segment up to this one was durable when the header was written.
    pub durable: SegmentId,
    /// Every segment up to this one was written back, and the backing device flushed, when the
    /// header was written.
    pub written_back: SegmentId,
    /// The time of writing, in milliseconds since 1970 (UTC).
    pub time: u64,
    /// The commit of the previous version of this header. It was durable when this version was
    /// written.
    pub before: Option<Commit>,
}

/// What lies in the bytes of a header's first sector that the kernel module leaves zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// Zeros: the kernel module wrote the header.
    None,
    /// Neither zeros nor wb's marker.
    Stray,
    /// The marker and a correct CRC.
    Proved(SegmentExtension),
    /// The marker and a wrong CRC.
    Damaged {
        /// The header may be torn: an older version of wb wrote it, without a CRC of the first
        /// sector alone.
        may_be_torn: bool,
    },
}

impl Mark {
    /// Examines a header block. Checks the CRC of the first sector, or if it has none, the CRC of
    /// the whole block.
    pub(super) fn of(block: &[u8; BLOCK_BYTES]) -> Mark {
        let is_zero = |bytes: &[u8]| bytes.iter().all(|&byte| byte == 0);
        if is_zero(&block[header::PADDING..SECTOR_BYTES]) {
            return Mark::None;
        }
        if block[header::MARKER..][..4] != *HEADER_MARKER {
            return Mark::Stray;
        }
        let before_commits = is_zero(&block[header::HAS_COMMITS..SECTOR_BYTES]);
        let holds = if before_commits {
            is_whole(block)
        } else {
            block[header::HAS_COMMITS] == 1
                && LittleEndian::read_u32(&block[header::SECTOR_CRC..]) == sector_crc(block)
        };
        if holds {
            Mark::Proved(SegmentExtension::read(block, !before_commits))
        } else {
            Mark::Damaged { may_be_torn: before_commits }
        }
    }
}

impl SegmentExtension {
    fn read(block: &[u8; BLOCK_BYTES], has_commits: bool) -> SegmentExtension {
        let before = Commit {
            length: block[header::BEFORE_LENGTH],
            checksum: LittleEndian::read_u32(&block[header::BEFORE_CHECKSUM..]),
        };
        let id_at =
            |at: usize| SegmentId(LittleEndian::read_u64(&block[at..]).min(SegmentId::MAX.0));
        SegmentExtension {
            digest: LittleEndian::read_u32(&block[header::DIGEST..]),
            reason: Reason::from_code(block[header::REASON]),
            durable: id_at(header::DURABLE),
            written_back: id_at(header::WRITTEN_BACK),
            time: LittleEndian::read_u64(&block[header::TIME..]),
            before: Some(before).filter(|it| has_commits && (1..=PLACES).contains(&it.length)),
        }
    }

    /// Decodes the extension of a header block, if it has one with a correct CRC.
    pub(super) fn decode(block: &[u8; BLOCK_BYTES]) -> Option<SegmentExtension> {
        match Mark::of(block) {
            Mark::Proved(extension) => Some(extension),
            Mark::None | Mark::Stray | Mark::Damaged { .. } => None,
        }
    }

    /// Adds the extension to a header block that is complete otherwise.
    pub(super) fn encode(&self, block: &mut [u8; BLOCK_BYTES]) {
        block[header::MARKER..][..4].copy_from_slice(HEADER_MARKER);
        LittleEndian::write_u32(&mut block[header::DIGEST..], self.digest);
        block[header::REASON] = self.reason.code();
        LittleEndian::write_u64(&mut block[header::DURABLE..], self.durable.0);
        LittleEndian::write_u64(&mut block[header::WRITTEN_BACK..], self.written_back.0);
        LittleEndian::write_u64(&mut block[header::TIME..], self.time);
        let before = self.before.unwrap_or(Commit { length: 0, checksum: 0 });
        block[header::HAS_COMMITS] = 1;
        block[header::BEFORE_LENGTH] = before.length;
        LittleEndian::write_u32(&mut block[header::BEFORE_CHECKSUM..], before.checksum);
        let crc = sector_crc(block);
        LittleEndian::write_u32(&mut block[header::SECTOR_CRC..], crc);
        let crc = header_crc(block);
        LittleEndian::write_u32(&mut block[header::CRC..], crc);
    }
}

/// Whether the CRC of a whole header block with the extension is correct.
pub(super) fn is_whole(block: &[u8; BLOCK_BYTES]) -> bool {
    LittleEndian::read_u32(&block[header::CRC..]) == header_crc(block)
}

/// The CRC of a header's first sector. Both CRC fields count as zeros.
fn sector_crc(block: &[u8; BLOCK_BYTES]) -> u32 {
    let mut sector = [0; SECTOR_BYTES];
    sector.copy_from_slice(&block[..SECTOR_BYTES]);
    sector[header::CRC..][..4].fill(0);
    sector[header::SECTOR_CRC..][..4].fill(0);
    crc32c(&sector)
}

/// The CRC of a header block. The CRC field counts as zeros.
fn header_crc(block: &[u8; BLOCK_BYTES]) -> u32 {
    let crc = Checksum::default().append(&block[..header::CRC]).append(&[0; 4]);
    crc.append(&block[header::CRC + 4..]).value()
}
