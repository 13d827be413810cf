//! The superblock and the superblock record.

use super::geometry::{BLOCK_BYTES, SECTOR_BYTES, SUPERBLOCK_REGION_BYTES, SegmentId};
use byteorder::{ByteOrder, LittleEndian};

/// The first four bytes of a cache device: `WBst` read as a big-endian word, stored little-endian.
pub const MAGIC: u32 = 0x5742_7374;
/// Where the block that begins with the magic lies, in bytes.
pub const SUPERBLOCK_OFFSET: u64 = 0;
/// Where the last block of the superblock region lies, in bytes. Its last sector begins with the record.
pub const RECORD_BLOCK_OFFSET: u64 = SUPERBLOCK_REGION_BYTES - BLOCK_BYTES as u64;
/// Where the record lies in its block, in bytes.
const RECORD_IN_BLOCK: usize = BLOCK_BYTES - SECTOR_BYTES;

const _: () = assert!(RECORD_BLOCK_OFFSET + RECORD_IN_BLOCK as u64 == 1024 * 1024 - 512);

/// What is wrong with a superblock or its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockFault {
    /// The device does not begin with [`MAGIC`].
    #[error("not a cache device: it begins with {found:#010x}, not with the magic {MAGIC:#010x}")]
    WrongMagic {
        /// What stands there.
        found: u32,
    },
    /// The record names an id that no log can have reached.
    #[error("the superblock record at byte {at} is garbage: it names segment {found}", at = 1024 * 1024 - 512)]
    GarbageRecord {
        /// What stands there.
        found: u64,
    },
}

/// Checks the magic in the first block of a cache device.
///
/// # Errors
/// When another value stands there.
pub fn decode_magic(first_block: &[u8; BLOCK_BYTES]) -> Result<(), SuperblockFault> {
    match LittleEndian::read_u32(&first_block[..4]) {
        MAGIC => Ok(()),
        found => Err(SuperblockFault::WrongMagic { found }),
    }
}

/// The first block of a cache device as a fresh format leaves it: the magic and zeros.
pub fn encode_superblock_block(block: &mut [u8; BLOCK_BYTES]) {
    block.fill(0);
    LittleEndian::write_u32(&mut block[..4], MAGIC);
}

/// Every segment up to the returned id is written back, and the backing device was flushed after that.
///
/// # Errors
/// When the id is beyond [`SegmentId::MAX`].
pub fn decode_record(record_block: &[u8; BLOCK_BYTES]) -> Result<SegmentId, SuperblockFault> {
    let found = LittleEndian::read_u64(&record_block[RECORD_IN_BLOCK..RECORD_IN_BLOCK + 8]);
    if found > SegmentId::MAX.0 {
        return Err(SuperblockFault::GarbageRecord { found });
    }
    Ok(SegmentId(found))
}

/// The last block of the superblock region: zeros but for the record, as the kernel module writes it. Only the
/// record's sector differs from one write to the next, so a torn write leaves the old record or the new.
pub fn encode_record_block(block: &mut [u8; BLOCK_BYTES], last_written_back: SegmentId) {
    block.fill(0);
    LittleEndian::write_u64(&mut block[RECORD_IN_BLOCK..RECORD_IN_BLOCK + 8], last_written_back.0);
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
        fn record_round_trips(id in any::<u64>()) {
            let mut block = [0xa5; BLOCK_BYTES];
            encode_record_block(&mut block, SegmentId(id));
            let want = if id <= SegmentId::MAX.0 { Ok(SegmentId(id)) } else { Err(SuperblockFault::GarbageRecord { found: id }) };
            prop_assert_eq!(decode_record(&block), want);
        }
    }
}
