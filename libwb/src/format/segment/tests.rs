//! Headers: encoding, decoding, commits, and every way to tear or damage them.

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
    let entry =
        |block| Metablock { block: BlockNo(block), dirty: DirtyBits::ALL, crc: None, lost: false };
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
    assert!(matches!(SegmentHeader::decode(&block), Err(HeaderFault::Unaligned { index: 3, .. })));
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
    fn header_round_trips(
        id in 1..SegmentId::MAX.0,
        metablocks in metablocks(),
        fill in any::<u8>(),
    ) {
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
    fn any_damage_under_the_checksum_is_noticed(
        metablocks in metablocks(),
        at in any::<prop::sample::Index>(),
        bit in 0..8u8,
    ) {
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
