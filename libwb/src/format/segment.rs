//! A segment's header block: id, checksum, length, and one metablock for each data block.

use super::checksum::Checksum;
use super::extension::SegmentExtension;
use super::geometry::{
    BLOCK_BYTES, BlockNo, DirtyBits, PLACES, SECTOR_BYTES, SECTORS_PER_BLOCK, Sector, SegmentId,
};
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

/// Where the range that the checksum covers begins, in bytes from the start of the segment. It ends with the
/// last valid data block.
pub const HEADER_CHECKSUM_START: usize = METABLOCKS;

const _: () = assert!(LENGTH < METABLOCKS);
const _: () = assert!(METABLOCKS + METABLOCK_BYTES * PLACES as usize <= BLOCK_BYTES);

/// What is wrong with a header block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// The id is larger than any log can have reached.
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
        /// What stands there.
        sector: Sector,
    },
}

/// One entry of the log: which block a data block belongs to, and which of its sectors are newer than the
/// backing device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metablock {
    /// The block on the backing device.
    pub block: BlockNo,
    /// Its dirty sectors.
    pub dirty: DirtyBits,
    /// Extension: CRC-32C of the whole data block, where it is kept.
    pub crc: Option<u32>,
}

/// A decoded header block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The segment's number in the log; [`SegmentId::NONE`] in a slot that was never written.
    pub id: SegmentId,
    /// CRC-32C over the rest of the header block and the data blocks.
    pub checksum: u32,
    /// One for each valid data block, in the order in which they apply.
    pub metablocks: Vec<Metablock>,
    /// What wb adds to the base format, where it is there and sound.
    pub extension: Option<SegmentExtension>,
}

impl SegmentHeader {
    /// Decodes a header block.
    ///
    /// # Errors
    /// Says which field holds a value that nothing valid can hold.
    pub fn decode(block: &[u8; BLOCK_BYTES]) -> Result<SegmentHeader, HeaderFault> {
        let id = LittleEndian::read_u64(&block[ID..]);
        if id > SegmentId::MAX.0 {
            return Err(HeaderFault::Id(id));
        }
        let length = block[LENGTH];
        if length > PLACES {
            return Err(HeaderFault::Length(length));
        }
        let metablocks = (0..length).map(|index| decode_metablock(block, index)).collect::<Result<_, _>>()?;
        Ok(SegmentHeader {
            id: SegmentId(id),
            checksum: LittleEndian::read_u32(&block[CHECKSUM..]),
            metablocks,
            extension: SegmentExtension::decode(block),
        })
    }

    /// How many data blocks are valid.
    #[allow(clippy::cast_possible_truncation)] // at most PLACES, by construction
    pub fn length(&self) -> u8 {
        self.metablocks.len() as u8
    }

    /// Bytes of data that follow the header block.
    pub fn data_bytes(&self) -> usize {
        self.metablocks.len() * BLOCK_BYTES
    }

    /// Whether the checksum holds for this header block and the data blocks that follow it.
    pub fn verify(&self, header_block: &[u8; BLOCK_BYTES], data: &[u8]) -> bool {
        data.len() == self.data_bytes() && checksum(header_block, data) == self.checksum
    }
}

fn decode_metablock(block: &[u8; BLOCK_BYTES], index: u8) -> Result<Metablock, HeaderFault> {
    let at = METABLOCKS + METABLOCK_BYTES * usize::from(index);
    let sector = Sector(LittleEndian::read_u64(&block[at + MB_SECTOR..]));
    if !sector.0.is_multiple_of(SECTORS_PER_BLOCK) {
        return Err(HeaderFault::Unaligned { index, sector });
    }
    let crc = (block[at + MB_FLAGS] & HAS_CRC != 0).then(|| LittleEndian::read_u32(&block[at + MB_CRC..]));
    Ok(Metablock { block: sector.block(), dirty: DirtyBits(block[at + MB_DIRTY_BITS]), crc })
}

fn checksum(header_block: &[u8; BLOCK_BYTES], data: &[u8]) -> u32 {
    Checksum::default().append(&header_block[HEADER_CHECKSUM_START..]).append(data).value()
}

/// Writes a header block for `data`, which holds one block for each metablock, and computes its checksum. The
/// CRCs of the metablocks, where there are any, must be right.
pub fn encode_header(
    block: &mut [u8; BLOCK_BYTES],
    id: SegmentId,
    metablocks: &[Metablock],
    data: &[u8],
    extension: Option<&SegmentExtension>,
) {
    assert!(metablocks.len() <= usize::from(PLACES) && data.len() == metablocks.len() * BLOCK_BYTES);
    block.fill(0);
    for (index, metablock) in metablocks.iter().enumerate() {
        let at = METABLOCKS + METABLOCK_BYTES * index;
        LittleEndian::write_u64(&mut block[at + MB_SECTOR..], metablock.block.sector().0);
        block[at + MB_DIRTY_BITS] = metablock.dirty.0;
        if let Some(crc) = metablock.crc {
            block[at + MB_FLAGS] = HAS_CRC;
            LittleEndian::write_u32(&mut block[at + MB_CRC..], crc);
        }
    }
    let mut sum = Checksum::default().append(&block[HEADER_CHECKSUM_START..]);
    for (metablock, data) in metablocks.iter().zip(data.chunks(BLOCK_BYTES)) {
        sum = match metablock.crc {
            Some(crc) => sum.append_block_crc(crc),
            None => sum.append(data),
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
}

/// Makes a sound header block that of an empty segment, which changes nothing but its first sector: a power cut
/// leaves either the one or the other.
pub fn empty_header(block: &mut [u8; BLOCK_BYTES]) {
    let extension = SegmentExtension::decode(block);
    block[LENGTH] = 0;
    let sum = checksum(block, &[]);
    LittleEndian::write_u32(&mut block[CHECKSUM..], sum);
    if let Some(extension) = extension {
        extension.encode(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn metablocks() -> impl Strategy<Value = Vec<Metablock>> {
        let one = (0..1u64 << 48, any::<u8>()).prop_map(|(block, dirty)| Metablock {
            block: BlockNo(block),
            dirty: DirtyBits(dirty),
            crc: None,
        });
        prop::collection::vec(one, 0..=usize::from(PLACES))
    }

    proptest! {
        #[test]
        fn header_round_trips(id in 1..SegmentId::MAX.0, metablocks in metablocks(), fill in any::<u8>()) {
            let data = vec![fill; metablocks.len() * BLOCK_BYTES];
            let mut block = [0xa5; BLOCK_BYTES];
            encode_header(&mut block, SegmentId(id), &metablocks, &data, None);
            let header = SegmentHeader::decode(&block).expect("a header just encoded");
            prop_assert_eq!(header.id, SegmentId(id));
            prop_assert_eq!(&header.metablocks, &metablocks);
            prop_assert!(header.verify(&block, &data));
        }

        #[test]
        fn emptying_changes_the_first_sector_alone(metablocks in metablocks()) {
            let data = vec![7; metablocks.len() * BLOCK_BYTES];
            let mut block = [0; BLOCK_BYTES];
            encode_header(&mut block, SegmentId(3), &metablocks, &data, None);
            let mut emptied = block;
            empty_header(&mut emptied);
            let header = SegmentHeader::decode(&emptied).expect("a sound header");
            prop_assert_eq!((header.id, header.length()), (SegmentId(3), 0));
            prop_assert!(header.verify(&emptied, &[]));
            prop_assert_eq!(&emptied[SECTOR_BYTES..], &block[SECTOR_BYTES..]);
        }

        #[test]
        fn any_damage_under_the_checksum_is_noticed(metablocks in metablocks(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut data = vec![7; metablocks.len() * BLOCK_BYTES];
            let mut block = [0; BLOCK_BYTES];
            encode_header(&mut block, SegmentId(3), &metablocks, &data, None);
            let at = at.index(BLOCK_BYTES - HEADER_CHECKSUM_START + data.len());
            match at.checked_sub(BLOCK_BYTES - HEADER_CHECKSUM_START) {
                Some(in_data) => data[in_data] ^= 1 << bit,
                None => block[HEADER_CHECKSUM_START + at] ^= 1 << bit,
            }
            if let Ok(header) = SegmentHeader::decode(&block) {
                prop_assert!(!header.verify(&block, &data));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), BLOCK_BYTES)) {
            let block: &[u8; BLOCK_BYTES] = bytes.as_slice().try_into().expect("a block");
            let _ = SegmentHeader::decode(block);
        }
    }
}
