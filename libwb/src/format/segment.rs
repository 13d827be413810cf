//! A segment's header block: id, checksum, length, and one metablock for each data block.

use super::checksum::Checksum;
use super::extension::{Commit, Mark, Reason, SegmentExtension, is_whole};
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
/// The block is lost: its data is not what was written, and its CRC is that of the data with all
/// bits inverted.
const IS_LOST: u8 = 2;

/// Where the range that the checksum covers begins, in bytes from the start of the segment. It ends
/// with the last valid data block.
pub const HEADER_CHECKSUM_START: usize = METABLOCKS;

const _: () = assert!(LENGTH < METABLOCKS);
const _: () = assert!(METABLOCKS + METABLOCK_BYTES * PLACES as usize <= BLOCK_BYTES);

/// What is wrong with a header block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// The first sector carries wb's marker, and its CRC does not hold.
    #[error("the first sector of a header is damaged; it names segment {id}")]
    FirstSector {
        /// What stands there.
        id: u64,
        /// Whether a power cut may be the reason: a sector is written whole or not at all, but
        /// headers from before commits have no CRC of the first one.
        may_be_torn: bool,
    },
    /// No id, though something stands in the first sector.
    #[error("a header without an id, but not empty")]
    NoId,
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

/// One entry of the log: which block a data block belongs to, and which of its sectors are newer
/// than the backing device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metablock {
    /// The block on the backing device.
    pub block: BlockNo,
    /// Its dirty sectors.
    pub dirty: DirtyBits,
    /// Extension: CRC-32C of the whole data block, where it is kept. Of a lost one, all its bits
    /// are inverted.
    pub crc: Option<u32>,
    /// Extension: the data is not what was written, and nothing else is left of that.
    pub lost: bool,
}

/// What the first sector of a header says. A power cut leaves it whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstSector {
    /// The segment's number in the log; [`SegmentId::NONE`] in a slot that was never written.
    pub id: SegmentId,
    /// What was committed last: all that the segment holds.
    pub newest: Commit,
    /// What wb adds to the base format, where it is there. It has proved itself.
    pub extension: Option<SegmentExtension>,
}

/// The last commit of a segment that verifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastCommit {
    /// The first blocks, which stand.
    pub commit: Commit,
    /// It is the newest one, and the header is as it was written.
    pub is_whole: bool,
}

impl FirstSector {
    /// Decodes the first sector of a header block.
    ///
    /// # Errors
    /// When it is damaged, or a field holds a value that nothing valid can hold.
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

    /// The id that a header names, if there is something where the kernel module leaves zeros, but
    /// not wb's marker.
    pub fn stray(block: &[u8; BLOCK_BYTES]) -> Option<u64> {
        (Mark::of(block) == Mark::Stray).then(|| LittleEndian::read_u64(&block[ID..]))
    }

    /// Bytes of data that follow the header block.
    pub fn data_bytes(&self) -> usize {
        usize::from(self.newest.length) * BLOCK_BYTES
    }

    /// How far a segment stands with this header block and the data that follows it. Where the
    /// newest commit fails, it may hold all the same with the entries after it taken as zeros, as
    /// where the header after its first sector is torn; or the one before holds, if what the newest
    /// one added is torn.
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

    /// The commit before the newest one. It was durable when the header was written.
    pub fn before(&self) -> Option<Commit> {
        self.extension?.before
    }

    /// The header, with the entries of a commit.
    ///
    /// # Errors
    /// When an entry is no entry.
    pub fn header(
        &self,
        block: &[u8; BLOCK_BYTES],
        commit: Commit,
    ) -> Result<SegmentHeader, HeaderFault> {
        let entries = (0..commit.length).map(|index| decode_metablock(block, index));
        Ok(SegmentHeader {
            id: self.id,
            checksum: commit.checksum,
            metablocks: entries.collect::<Result<_, _>>()?,
            extension: self.extension,
            is_whole: self.extension.is_some() && is_whole(block),
        })
    }
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
    /// What wb adds to the base format, where it is there.
    pub extension: Option<SegmentExtension>,
    /// Whether the extension shows that all of the header block is as it was written, not its first
    /// sector alone.
    pub is_whole: bool,
}

impl SegmentHeader {
    /// Decodes a header block.
    ///
    /// # Errors
    /// Says which field holds a value that nothing valid can hold.
    pub fn decode(block: &[u8; BLOCK_BYTES]) -> Result<SegmentHeader, HeaderFault> {
        let first = FirstSector::decode(block)?;
        first.header(block, first.newest)
    }

    /// What a header says of which the first sector is damaged. Nothing shows that it is right.
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

    /// Bytes of data that follow the header block.
    pub fn data_bytes(&self) -> usize {
        self.metablocks.len() * BLOCK_BYTES
    }

    /// Whether the checksum holds for this header block and the data blocks that follow it.
    pub fn verify(&self, header_block: &[u8; BLOCK_BYTES], data: &[u8]) -> bool {
        data.len() == self.data_bytes() && checksum(header_block, data) == self.checksum
    }

    /// Whether the segment, as this header has it, may lack blocks: more may have been written
    /// after it.
    pub fn is_open(&self) -> bool {
        self.extension.is_some_and(|extension| extension.reason == Reason::Open)
    }
}

/// Makes zeros of all entries but the first ones.
fn clear_entries(block: &mut [u8; BLOCK_BYTES], length: u8) {
    block[METABLOCKS + METABLOCK_BYTES * usize::from(length)..].fill(0);
}

/// Makes the header block of a segment that stands by a commit one that says so: its newest, and
/// last. Torn in this very write, the header still leads to the same commit. Of a header without
/// the extension, only entries beyond the last are torn.
pub fn close_header(block: &mut [u8; BLOCK_BYTES], last: Commit) {
    let extension = SegmentExtension::decode(block);
    clear_entries(block, last.length);
    block[LENGTH] = last.length;
    LittleEndian::write_u32(&mut block[CHECKSUM..], last.checksum);
    if let Some(extension) = extension {
        SegmentExtension { reason: Reason::Flush, before: None, ..extension }.encode(block);
    }
}

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

/// Writes a header block for `data`, which holds one block for each metablock, and computes its
/// checksum, which it returns. The CRCs of the metablocks, where there are any, must be right; if
/// all have one, no data is needed.
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

/// Makes a sound header block that of an empty segment, which changes nothing but its first sector:
/// a power cut leaves either the one or the other.
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
mod tests {
    use super::*;
    use crate::format::crc32c;
    use proptest::prelude::*;

    fn metablocks() -> impl Strategy<Value = Vec<Metablock>> {
        let one = (0..1u64 << 48, any::<u8>()).prop_map(|(block, dirty)| Metablock {
            block: BlockNo(block),
            dirty: DirtyBits(dirty),
            crc: None,
            lost: false,
        });
        prop::collection::vec(one, 0..=usize::from(PLACES))
    }

    fn extension(reason: Reason, before: Option<Commit>) -> SegmentExtension {
        let (durable, written_back) = (SegmentId(2), SegmentId(1));
        SegmentExtension { digest: 7, reason, durable, written_back, time: 5, before }
    }

    /// The header blocks of two commits of one segment, and its data.
    fn commits(first: u8, second: u8) -> ([[u8; BLOCK_BYTES]; 2], Vec<u8>) {
        let fill = |index: u8| [index ^ 0x5a; BLOCK_BYTES];
        let entry = |index: u8| Metablock {
            block: BlockNo(u64::from(index % 5)),
            dirty: DirtyBits(1 | index),
            crc: Some(crc32c(&fill(index))),
            lost: false,
        };
        let entries: Vec<_> = (0..second).map(entry).collect();
        let data: Vec<u8> = (0..second).flat_map(fill).collect();
        let mut blocks = [[0; BLOCK_BYTES]; 2];
        let checksum = encode_header(
            &mut blocks[0],
            SegmentId(3),
            &entries[..usize::from(first)],
            &[],
            Some(&extension(Reason::Open, None)),
        );
        let before = Some(Commit { length: first, checksum });
        encode_header(
            &mut blocks[1],
            SegmentId(3),
            &entries,
            &[],
            Some(&extension(Reason::Full, before)),
        );
        (blocks, data)
    }

    fn last_commit(block: &[u8; BLOCK_BYTES], data: &[u8]) -> Option<Commit> {
        let first = FirstSector::decode(block).expect("sound sectors");
        first.stands(block, &data[..first.data_bytes()]).map(|last| last.commit)
    }

    /// What a header block leads to if some sectors are the old ones and some the new.
    fn stands(block: &[u8; BLOCK_BYTES], data: &[u8]) -> Option<u8> {
        last_commit(block, data).map(|commit| commit.length)
    }

    fn mix(old: &[u8; BLOCK_BYTES], new: &[u8; BLOCK_BYTES], mask: u32) -> [u8; BLOCK_BYTES] {
        let mut block = *old;
        for sector in (0..8).filter(|sector| mask >> sector & 1 == 1) {
            let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
            block[range.clone()].copy_from_slice(&new[range]);
        }
        block
    }

    #[test]
    fn a_torn_header_leads_to_the_commit_before_or_the_new_one_and_so_does_closing_it_torn() {
        for (first, second) in [(1, 2), (1, PLACES), (31, 33), (33, 40), (126, PLACES), (5, 5)] {
            let ([old, new], data) = commits(first, second);
            let mut lost = data.clone();
            lost[usize::from(first) * BLOCK_BYTES..].fill(0xee);
            for (data, mask) in
                [&data, &lost].into_iter().flat_map(|data| (0..256).map(move |mask| (data, mask)))
            {
                let block = mix(&old, &new, mask);
                let last = last_commit(&block, data).expect("at least the first");
                let may_be =
                    if *data == lost || mask & 1 == 0 { &[first][..] } else { &[first, second] };
                assert!(may_be.contains(&last.length), "{first} {second} {mask:#x}: {last:?}");
                let mut closed = block;
                close_header(&mut closed, last);
                let header = SegmentHeader::decode(&closed).unwrap();
                assert!(
                    header.is_whole
                        && !header.is_open()
                        && header.verify(&closed, &data[..header.data_bytes()])
                );
                for mask in 0..256 {
                    assert_eq!(stands(&mix(&block, &closed, mask), data), Some(last.length));
                }
            }
        }
    }

    #[test]
    fn a_torn_header_of_the_base_format_is_closed_as_well() {
        let (data, entries) = (vec![7; 3 * BLOCK_BYTES], 3..6);
        let entry = |block| Metablock {
            block: BlockNo(block),
            dirty: DirtyBits::ALL,
            crc: None,
            lost: false,
        };
        let entries: Vec<_> = entries.map(entry).collect();
        let mut new = [0; BLOCK_BYTES];
        encode_header(&mut new, SegmentId(3), &entries, &data, None);
        // What had stood there before is left in all sectors but the first two.
        let torn = mix(&[0x50; BLOCK_BYTES], &new, 0b11);
        let last = last_commit(&torn, &data).expect("the entries are there");
        let mut closed = torn;
        close_header(&mut closed, last);
        assert!(SegmentHeader::decode(&closed).unwrap().verify(&closed, &data));
        for mask in 0..256 {
            assert_eq!(stands(&mix(&torn, &closed, mask), &data), Some(3));
        }
    }

    #[test]
    fn a_header_from_before_commits_is_read_as_ever() {
        let ([mut block, _], data) = commits(3, 4);
        // As it was then: nothing after the time.
        block[56..SECTOR_BYTES].fill(0);
        let mut zeroed = block;
        zeroed[24..28].fill(0);
        let crc = crc32c(&zeroed);
        LittleEndian::write_u32(&mut block[24..], crc);
        let header = SegmentHeader::decode(&block).unwrap();
        let found = header.extension.expect("a sound extension");
        assert_eq!((found.before, found.time, header.is_whole), (None, 5, true));
        assert!(header.verify(&block, &data[..header.data_bytes()]));
        block[SECTOR_BYTES + 3] ^= 1;
        let fault = SegmentHeader::decode(&block).unwrap_err();
        assert_eq!(fault, HeaderFault::FirstSector { id: 3, may_be_torn: true });
    }

    #[test]
    fn any_damage_to_the_first_sector_is_noticed() {
        let ([block, _], _) = commits(3, 4);
        for (at, bit) in (0..SECTOR_BYTES).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            let mut damaged = block;
            damaged[at] ^= 1 << bit;
            let first = FirstSector::decode(&damaged);
            match at {
                // The CRC of the whole block.
                24..28 => assert_eq!(first, FirstSector::decode(&block)),
                16..20 => {
                    assert!(first.is_ok_and(|it| it.extension.is_none()), "byte {at}");
                    assert_eq!(FirstSector::stray(&damaged), Some(3), "byte {at}");
                }
                _ => assert!(
                    matches!(first, Err(HeaderFault::FirstSector { may_be_torn: false, .. })),
                    "byte {at}: {first:?}"
                ),
            }
        }
        let mut nameless = [0; BLOCK_BYTES];
        nameless[LENGTH] = 1;
        assert_eq!(FirstSector::decode(&nameless), Err(HeaderFault::NoId));
    }

    #[test]
    fn an_entry_that_is_none_costs_its_commit_alone() {
        let ([_, mut block], data) = commits(3, 4);
        block[METABLOCKS + METABLOCK_BYTES * 3] = 1;
        assert!(matches!(
            SegmentHeader::decode(&block),
            Err(HeaderFault::Unaligned { index: 3, .. })
        ));
        assert_eq!(stands(&block, &data), Some(3));
        // Whatever the checksum says of it.
        let sum = checksum(&block, &data);
        LittleEndian::write_u32(&mut block[CHECKSUM..], sum);
        let extension =
            extension(Reason::Open, SegmentExtension::decode(&commits(3, 4).0[1]).unwrap().before);
        extension.encode(&mut block);
        assert_eq!(stands(&block, &data), Some(3));
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
