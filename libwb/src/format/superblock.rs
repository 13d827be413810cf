//! The superblock and the superblock record.

use super::checksum::Checksum;
use super::geometry::{BLOCK_BYTES, SECTOR_BYTES, SUPERBLOCK_REGION_BYTES, SegmentId};
use byteorder::{ByteOrder, LittleEndian};

/// The first four bytes of a cache device: `WBst` as a big-endian word, stored little-endian.
pub const MAGIC: u32 = 0x5742_7374;
/// Offset of the block that begins with the magic, in bytes.
pub const SUPERBLOCK_OFFSET: u64 = 0;
/// Offset of the last block of the superblock region, in bytes. Its last sector begins with the
/// record.
pub const RECORD_BLOCK_OFFSET: u64 = SUPERBLOCK_REGION_BYTES - BLOCK_BYTES as u64;
/// Offset of the record in its block, in bytes.
const RECORD_IN_BLOCK: usize = BLOCK_BYTES - SECTOR_BYTES;

const _: () = assert!(RECORD_BLOCK_OFFSET + RECORD_IN_BLOCK as u64 == 1024 * 1024 - 512);

/// Offsets in the record's sector. All after the id belongs to the extension.
mod proof {
    pub(super) const MARKER: usize = 8;
    pub(super) const DIGEST: usize = 16;
    pub(super) const CRC: usize = 20;
}

const RECORD_MARKER: &[u8; 8] = b"wbrecord";

/// What is wrong with a superblock or its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SuperblockFault {
    /// The device does not begin with [`MAGIC`].
    #[error("not a cache device: it begins with {found:#010x}, not with the magic {MAGIC:#010x}")]
    WrongMagic {
        /// The value found.
        found: u32,
    },
    /// The record names an id that no log can have reached.
    #[error(
        "the superblock record at byte {at} is garbage: it names segment {found}",
        at = 1024 * 1024 - 512
    )]
    GarbageRecord {
        /// The id found.
        found: u64,
    },
    /// The record does not verify.
    #[error(
        "the superblock record at byte {at} is damaged: it names segment {found}, and its CRC \
         does not hold",
        at = 1024 * 1024 - 512
    )]
    DamagedRecord {
        /// The id found.
        found: u64,
    },
    /// The record was written for another cache.
    #[error(
        "the superblock record at byte {at} belongs to another cache: it names segment {found}",
        at = 1024 * 1024 - 512
    )]
    ForeignRecord {
        /// The id found.
        found: u64,
    },
}

impl SuperblockFault {
    /// The id in a record that is wrong; `None` if the fault is another one.
    pub fn record(self) -> Option<u64> {
        match self {
            SuperblockFault::WrongMagic { .. } => None,
            SuperblockFault::GarbageRecord { found }
            | SuperblockFault::DamagedRecord { found }
            | SuperblockFault::ForeignRecord { found } => Some(found),
        }
    }
}

/// The superblock record: every segment up to `id` was written back, and then the backing device
/// was flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The last segment that was written back.
    pub id: SegmentId,
    /// The digest of the cache that the record belongs to. A record of the kernel module has none.
    pub digest: Option<u32>,
}

/// Checks the magic in the first block of a cache device.
///
/// # Errors
/// When it is another value.
pub fn decode_magic(first_block: &[u8; BLOCK_BYTES]) -> Result<(), SuperblockFault> {
    match LittleEndian::read_u32(&first_block[..4]) {
        MAGIC => Ok(()),
        found => Err(SuperblockFault::WrongMagic { found }),
    }
}

/// Encodes the first block of a cache device: the magic and zeros.
pub fn encode_superblock_block(block: &mut [u8; BLOCK_BYTES]) {
    block.fill(0);
    LittleEndian::write_u32(&mut block[..4], MAGIC);
}

/// Decodes the record. Where the kernel module leaves zeros, wb keeps a marker, the digest of the
/// cache and a CRC.
///
/// # Errors
/// When those bytes are not zeros and do not verify, or the id is beyond [`SegmentId::MAX`].
pub fn decode_record(record_block: &[u8; BLOCK_BYTES]) -> Result<Record, SuperblockFault> {
    let sector = &record_block[RECORD_IN_BLOCK..];
    let found = LittleEndian::read_u64(sector);
    let proved = sector[proof::MARKER..].iter().any(|&byte| byte != 0);
    let holds = || {
        sector[proof::MARKER..][..RECORD_MARKER.len()] == *RECORD_MARKER
            && LittleEndian::read_u32(&sector[proof::CRC..]) == record_crc(sector)
    };
    if proved && !holds() {
        return Err(SuperblockFault::DamagedRecord { found });
    }
    if found > SegmentId::MAX.0 {
        return Err(SuperblockFault::GarbageRecord { found });
    }
    Ok(Record {
        id: SegmentId(found),
        digest: proved.then(|| LittleEndian::read_u32(&sector[proof::DIGEST..])),
    })
}

/// Encodes the last block of the superblock region: zeros, then the record. Without a digest, it
/// is as the kernel module writes it.
///
/// Writes differ only in the record's sector, so a torn write leaves the old record or the new one.
pub fn encode_record_block(block: &mut [u8; BLOCK_BYTES], record: Record) {
    block.fill(0);
    let sector = &mut block[RECORD_IN_BLOCK..];
    LittleEndian::write_u64(sector, record.id.0);
    let Some(digest) = record.digest else { return };
    sector[proof::MARKER..][..RECORD_MARKER.len()].copy_from_slice(RECORD_MARKER);
    LittleEndian::write_u32(&mut sector[proof::DIGEST..], digest);
    let crc = record_crc(sector);
    LittleEndian::write_u32(&mut sector[proof::CRC..], crc);
}

/// The CRC of the record's sector. The CRC field counts as zeros.
fn record_crc(sector: &[u8]) -> u32 {
    let crc = Checksum::default().append(&sector[..proof::CRC]).append(&[0; 4]);
    crc.append(&sector[proof::CRC + 4..]).value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn superblock_round_trips_and_wrong_magic_is_named() {
        let mut block = [0xa5; BLOCK_BYTES];
        encode_superblock_block(&mut block);
        assert_eq!(block[..4], [0x74, 0x73, 0x42, 0x57]);
        assert!(block[4..].iter().all(|&b| b == 0));
        assert_eq!(decode_magic(&block), Ok(()));
        block[0] ^= 1;
        assert_eq!(decode_magic(&block), Err(SuperblockFault::WrongMagic { found: MAGIC ^ 1 }));
    }

    proptest! {
        #[test]
        fn record_round_trips(id in any::<u64>(), digest in any::<Option<u32>>()) {
            let mut block = [0xa5; BLOCK_BYTES];
            let record = Record { id: SegmentId(id), digest };
            encode_record_block(&mut block, record);
            let want = match id <= SegmentId::MAX.0 {
                true => Ok(record),
                false => Err(SuperblockFault::GarbageRecord { found: id }),
            };
            prop_assert_eq!(decode_record(&block), want);
        }

        #[test]
        fn any_damage_to_a_record_that_proves_itself_is_noticed(
            id in 0..100u64,
            at in 0..SECTOR_BYTES,
            bit in 0..8u8,
        ) {
            let mut block = [0; BLOCK_BYTES];
            encode_record_block(&mut block, Record { id: SegmentId(id), digest: Some(7) });
            block[RECORD_IN_BLOCK + at] ^= 1 << bit;
            let fault = decode_record(&block).unwrap_err();
            let is_damaged = matches!(fault, SuperblockFault::DamagedRecord { .. });
            prop_assert!(is_damaged);
        }
    }
}
