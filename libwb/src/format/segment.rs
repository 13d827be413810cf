//! A segment's header block: id, checksum, length, and one metablock for each data block.

use super::checksum::Checksum;
use super::geometry::{
    BLOCK_BYTES, BlockNo, DirtyBits, PLACES, SECTOR_BYTES, SECTORS_PER_BLOCK, Sector, SegmentId,
};
use super::segment_extension::{Commit, Mark, Reason, SegmentExtension, is_whole};
use byteorder::{ByteOrder, LittleEndian};

const ID: usize = 0;
const CHECKSUM: usize = 8;
const LENGTH: usize = 12;
const METABLOCKS: usize = SECTOR_BYTES;
const METABLOCK_BYTES: usize = 16;
/// Within a metablock.
const MB_SECTOR: usize = 0;
const MB_DIRTY_BITS: usize = 8;
/// Extension: whether the CRC of the data block follows.
const MB_FLAGS: usize = 9;
const MB_CRC: usize = 12;
const HAS_CRC: u8 = 1;
/// The block is lost: its data is not what was written. The CRC field holds the CRC of the data
/// with all bits inverted.
const IS_LOST: u8 = 2;

/// Start of the range that the checksum covers, in bytes from the start of the segment. The range
/// ends with the last valid data block.
pub const HEADER_CHECKSUM_START: usize = METABLOCKS;

const _: () = assert!(LENGTH < METABLOCKS);
const _: () = assert!(METABLOCKS + METABLOCK_BYTES * PLACES as usize <= BLOCK_BYTES);

/// What is wrong with a header block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderFault {
    /// The first sector has wb's marker and a wrong CRC.
    #[error("the first sector of a header is damaged; it names segment {id}")]
    FirstSector {
        /// The id found.
        id: u64,
        /// Whether a power cut may be the reason. It tears no sector, but older headers have only a
        /// CRC of the whole block.
        may_be_torn: bool,
    },
    /// The first sector has no id, but is not empty.
    #[error("a header without an id, but not empty")]
    NoId,
    /// No log can have reached this id.
    #[error("garbage id {0}")]
    Id(u64),
    /// The length is larger than a segment.
    #[error("garbage length {0}, more than 127")]
    Length(u8),
    /// A metablock's address is not the start of a block.
    #[error("metablock {index} holds sector {sector}, which is no multiple of 8")]
    Unaligned {
        /// Which metablock, 0 to 126.
        index: u8,
        /// The address found.
        sector: Sector,
    },
}

/// One entry of the log: which block a data block belongs to, and which of its sectors are newer
/// than the backing device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metablock {
    /// The block on the backing device.
    pub block: BlockNo,
    /// Its dirty sectors.
    pub dirty: DirtyBits,
    /// Extension: CRC-32C of the whole data block, if the entry has it. In the entry of a lost
    /// block all its bits are inverted.
    pub crc: Option<u32>,
    /// Extension: the data is not what was written, and no other copy exists.
    pub lost: bool,
}

/// What the first sector of a header says. A power cut does not tear it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstSector {
    /// The segment's id; [`SegmentId::NONE`] in a slot that was never written.
    pub id: SegmentId,
    /// The newest commit, which covers the whole segment.
    pub newest: Commit,
    /// The extension, if the header has one. Its CRC is correct.
    pub extension: Option<SegmentExtension>,
}

/// The last commit of a segment that verifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastCommit {
    /// The blocks that verify.
    pub commit: Commit,
    /// It is the newest commit, and the header is undamaged.
    pub is_whole: bool,
}

impl FirstSector {
    /// Decodes the first sector of a header block.
    ///
    /// # Errors
    /// When it is damaged, or a field has an invalid value.
    pub fn decode(block: &[u8; BLOCK_BYTES]) -> Result<FirstSector, HeaderFault> {
        let id = LittleEndian::read_u64(&block[ID..]);
        let mark = Mark::of(block);
        if let Mark::Damaged { may_be_torn } = mark {
            return Err(HeaderFault::FirstSector { id, may_be_torn });
        }
        if id == SegmentId::NONE.0 && block[..SECTOR_BYTES].iter().any(|&byte| byte != 0) {
            return Err(HeaderFault::NoId);
        }
        if id > SegmentId::MAX.0 {
            return Err(HeaderFault::Id(id));
        }
        let length = block[LENGTH];
        if length > PLACES {
            return Err(HeaderFault::Length(length));
        }
        Ok(FirstSector {
            id: SegmentId(id),
            newest: Commit { length, checksum: LittleEndian::read_u32(&block[CHECKSUM..]) },
            extension: match mark {
                Mark::Proved(extension) => Some(extension),
                _ => None,
            },
        })
    }

    /// The id in a header whose padding holds neither the kernel module's zeros nor wb's marker.
    pub fn stray(block: &[u8; BLOCK_BYTES]) -> Option<u64> {
        (Mark::of(block) == Mark::Stray).then(|| LittleEndian::read_u64(&block[ID..]))
    }

    /// Bytes of data after the header block.
    pub fn data_bytes(&self) -> usize {
        usize::from(self.newest.length) * BLOCK_BYTES
    }

    /// The last commit that verifies, given the header block and the data after it.
    ///
    /// If the newest commit fails as it is, two more are tried, with all later entries as zeros:
    ///
    /// - the newest commit again, because the header may be torn after its first sector;
    /// - the commit before it, because the blocks that the newest one added may be torn.
    pub fn stands(&self, header_block: &[u8; BLOCK_BYTES], data: &[u8]) -> Option<LastCommit> {
        let is_sound = |commit: &Commit| {
            (0..commit.length).all(|nth| decode_metablock(header_block, nth).is_ok())
        };
        if data.len() == self.data_bytes()
            && checksum(header_block, data) == self.newest.checksum
            && is_sound(&self.newest)
        {
            return Some(LastCommit { commit: self.newest, is_whole: true });
        }
        let holds = |commit: &Commit| {
            let data = data.get(..usize::from(commit.length) * BLOCK_BYTES);
            let mut block = *header_block;
            clear_entries(&mut block, commit.length);
            commit.length > 0
                && data.is_some_and(|data| checksum(&block, data) == commit.checksum)
                && is_sound(commit)
        };
        let commits = [Some(self.newest), self.before()];
        let commit = commits.into_iter().flatten().find(holds)?;
        Some(LastCommit { commit, is_whole: false })
    }

    /// The previous commit. It was durable when the header was written.
    pub fn before(&self) -> Option<Commit> {
        self.extension?.before
    }

    /// The header, with the entries of a commit.
    ///
    /// # Errors
    /// When an entry is invalid.
    pub fn header(
        &self,
        block: &[u8; BLOCK_BYTES],
        commit: Commit,
    ) -> Result<SegmentHeader, HeaderFault> {
        let mut metablocks = Vec::with_capacity(commit.length.into());
        for index in 0..commit.length {
            metablocks.push(decode_metablock(block, index)?);
        }
        Ok(SegmentHeader {
            id: self.id,
            checksum: commit.checksum,
            metablocks,
            extension: self.extension,
            is_whole: self.extension.is_some() && is_whole(block),
        })
    }
}

/// A decoded header block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The segment's id; [`SegmentId::NONE`] in a slot that was never written.
    pub id: SegmentId,
    /// CRC-32C over the rest of the header block and the data blocks.
    pub checksum: u32,
    /// One for each valid data block, in the order in which they apply.
    pub metablocks: Vec<Metablock>,
    /// The extension, if the header has one.
    pub extension: Option<SegmentExtension>,
    /// Whether the extension proves the whole header block, and not only its first sector.
    pub is_whole: bool,
}

impl SegmentHeader {
    /// Decodes a header block.
    ///
    /// # Errors
    /// Says which field has an invalid value.
    pub fn decode(block: &[u8; BLOCK_BYTES]) -> Result<SegmentHeader, HeaderFault> {
        let first = FirstSector::decode(block)?;
        first.header(block, first.newest)
    }

    /// Decodes a header whose first sector is damaged. The result is unproved.
    pub fn presumed(block: &[u8; BLOCK_BYTES]) -> Option<SegmentHeader> {
        let id = SegmentId(LittleEndian::read_u64(&block[ID..]));
        let newest =
            Commit { length: block[LENGTH], checksum: LittleEndian::read_u32(&block[CHECKSUM..]) };
        if id == SegmentId::NONE || id > SegmentId::MAX || newest.length > PLACES {
            return None;
        }
        FirstSector { id, newest, extension: None }.header(block, newest).ok()
    }

    /// How many data blocks are valid.
    #[allow(clippy::cast_possible_truncation)] // at most PLACES, by construction
    pub fn length(&self) -> u8 {
        self.metablocks.len() as u8
    }

    /// Bytes of data after the header block.
    pub fn data_bytes(&self) -> usize {
        self.metablocks.len() * BLOCK_BYTES
    }

    /// Whether the checksum is correct for this header block and the data blocks after it.
    pub fn verify(&self, header_block: &[u8; BLOCK_BYTES], data: &[u8]) -> bool {
        data.len() == self.data_bytes() && checksum(header_block, data) == self.checksum
    }

    /// Whether the segment was open when this header was written: later blocks may be missing.
    pub fn is_open(&self) -> bool {
        self.extension.is_some_and(|extension| extension.reason == Reason::Open)
    }
}

/// Zeroes all entries after the first `length`.
fn clear_entries(block: &mut [u8; BLOCK_BYTES], length: u8) {
    block[METABLOCKS + METABLOCK_BYTES * usize::from(length)..].fill(0);
}

/// Closes a segment at its last commit: makes this commit the newest one in the header block.
///
/// If a power cut tears the write of this block, the header still leads to the same commit. In a
/// header without the extension, only the entries after `last` may be damaged before.
pub fn close_header(block: &mut [u8; BLOCK_BYTES], last: Commit) {
    let extension = SegmentExtension::decode(block);
    clear_entries(block, last.length);
    block[LENGTH] = last.length;
    LittleEndian::write_u32(&mut block[CHECKSUM..], last.checksum);
    if let Some(extension) = extension {
        SegmentExtension { reason: Reason::Flush, before: None, ..extension }.encode(block);
    }
}

#[inline]
fn decode_metablock(block: &[u8; BLOCK_BYTES], index: u8) -> Result<Metablock, HeaderFault> {
    let at = METABLOCKS + METABLOCK_BYTES * usize::from(index);
    let sector = Sector(LittleEndian::read_u64(&block[at + MB_SECTOR..]));
    if !sector.0.is_multiple_of(SECTORS_PER_BLOCK) {
        return Err(HeaderFault::Unaligned { index, sector });
    }
    let flags = block[at + MB_FLAGS];
    let crc = (flags & HAS_CRC != 0).then(|| LittleEndian::read_u32(&block[at + MB_CRC..]));
    let lost = flags & IS_LOST != 0 && crc.is_some();
    Ok(Metablock { block: sector.block(), dirty: DirtyBits(block[at + MB_DIRTY_BITS]), crc, lost })
}

fn checksum(header_block: &[u8; BLOCK_BYTES], data: &[u8]) -> u32 {
    Checksum::default().append(&header_block[HEADER_CHECKSUM_START..]).append(data).value()
}

/// Writes a header block for `data`, which has one block for each metablock. Returns its checksum.
///
/// The CRCs in the metablocks must be correct. If all metablocks have one, `data` may be empty.
pub fn encode_header(
    block: &mut [u8; BLOCK_BYTES],
    id: SegmentId,
    metablocks: &[Metablock],
    data: &[u8],
    extension: Option<&SegmentExtension>,
) -> u32 {
    assert!(metablocks.len() <= usize::from(PLACES));
    block.fill(0);
    for (index, metablock) in metablocks.iter().enumerate() {
        let at = METABLOCKS + METABLOCK_BYTES * index;
        LittleEndian::write_u64(&mut block[at + MB_SECTOR..], metablock.block.sector().0);
        block[at + MB_DIRTY_BITS] = metablock.dirty.0;
        if let Some(crc) = metablock.crc {
            block[at + MB_FLAGS] = if metablock.lost { HAS_CRC | IS_LOST } else { HAS_CRC };
            LittleEndian::write_u32(&mut block[at + MB_CRC..], crc);
        }
    }
    let mut sum = Checksum::default().append(&block[HEADER_CHECKSUM_START..]);
    for (index, metablock) in metablocks.iter().enumerate() {
        sum = match metablock.crc {
            Some(crc) => sum.append_block_crc(if metablock.lost { !crc } else { crc }),
            None => sum.append(&data[index * BLOCK_BYTES..][..BLOCK_BYTES]),
        };
    }
    LittleEndian::write_u64(&mut block[ID..], id.0);
    LittleEndian::write_u32(&mut block[CHECKSUM..], sum.value());
    #[allow(clippy::cast_possible_truncation)] // asserted above
    {
        block[LENGTH] = metablocks.len() as u8;
    }
    if let Some(extension) = extension {
        extension.encode(block);
    }
    sum.value()
}

/// Turns a sound header block into that of an empty segment. Only the first sector changes, so a
/// power cut leaves the old header or the new one.
pub fn empty_header(block: &mut [u8; BLOCK_BYTES]) {
    let extension = SegmentExtension::decode(block);
    block[LENGTH] = 0;
    let sum = checksum(block, &[]);
    LittleEndian::write_u32(&mut block[CHECKSUM..], sum);
    if let Some(extension) = extension {
        SegmentExtension { before: None, ..extension }.encode(block);
    }
}

#[cfg(test)]
mod tests;
