//! The extension: what wb keeps in bytes that the kernel module neither reads nor checks.
//!
//! Pages and headers carry a CRC of their own. `man/wb.5` has the offsets, with a worked hex dump.
//! They never change their meaning.

use super::checksum::{Checksum, crc32c};
use super::geometry::{BLOCK_BYTES, PLACES, SECTOR_BYTES, SegmentId};
use byteorder::{ByteOrder, LittleEndian};
use uuid::Uuid;

/// Where the two copies of the superblock extension lie, in bytes. They are written in turn.
pub const EXTENSION_OFFSETS: [u64; 2] = [64 * 1024, 128 * 1024];
/// The longest label or device identity, in bytes of UTF-8.
pub const TEXT_BYTES: usize = 64;

/// Offsets in a page of the superblock extension.
mod page {
    pub(super) const MARKER: usize = 0;
    pub(super) const GENERATION: usize = 8;
    pub(super) const VERSION: usize = 16;
    pub(super) const INCOMPATIBLE: usize = 20;
    pub(super) const READ_COMPATIBLE: usize = 24;
    pub(super) const IS_CLEAN: usize = 28;
    pub(super) const CLEAN_ID: usize = 32;
    pub(super) const CREATED: usize = 40;
    pub(super) const UUID: usize = 48;
    pub(super) const LABEL: usize = 64;
    pub(super) const BACKING_SECTORS: usize = 128;
    pub(super) const BACKING_ID: usize = 136;
    pub(super) const CACHE_BYTES: usize = 200;
    pub(super) const CRC: usize = super::BLOCK_BYTES - 4;

    const _: () =
        assert!(GENERATION == MARKER + 8 && CLEAN_ID == IS_CLEAN + 4 && UUID == CREATED + 8);
    const _: () = assert!(LABEL == UUID + 16 && BACKING_SECTORS == LABEL + super::TEXT_BYTES);
    const _: () =
        assert!(BACKING_ID == BACKING_SECTORS + 8 && CACHE_BYTES == BACKING_ID + super::TEXT_BYTES);
    const _: () = assert!(CACHE_BYTES + 8 <= CRC);
}

/// Offsets in the first sector of a segment, whose first 13 bytes belong to the base format.
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

const PAGE_MARKER: &[u8; 8] = b"wb-super";
const HEADER_MARKER: &[u8; 4] = b"wbsg";
/// The largest generation of a page: there must be ones that are newer. Counting up from 0, no
/// cache comes near it.
const LARGEST_GENERATION: u64 = u64::MAX / 2;
/// The version of the extension that is written, and the only one that is read.
pub const EXTENSION_VERSION: u32 = 1;

/// What is wrong with a page of the superblock extension.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageFault {
    /// There is none.
    #[error("no superblock extension")]
    Absent,
    /// Its CRC does not hold, or its generation is none that a cache can have come to.
    #[error("a superblock extension with a wrong CRC")]
    Crc,
    /// So it is, and that is all: it may begin with this page and end with another.
    #[error("a superblock extension with a wrong CRC")]
    Torn(Box<SuperblockExtension>),
    /// The device fails to read where it lies.
    #[error("where a superblock extension lies, the device cannot be read")]
    Unreadable,
}

/// A page of the superblock extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuperblockExtension {
    /// Grows by one with each page that is written.
    pub generation: u64,
    /// [`EXTENSION_VERSION`], or the device must not be used at all.
    pub version: u32,
    /// Feature flags without which the device must not be used at all. None are defined yet.
    pub incompatible: u32,
    /// Feature flags without which the device must not be written. None are defined yet.
    pub read_compatible: u32,
    /// The cache was closed in order, with this segment as its newest.
    pub clean: Option<SegmentId>,
    /// When the device was formatted, in seconds since 1970 (UTC).
    pub created: u64,
    /// The cache's identity.
    pub uuid: Uuid,
    /// A name for people, or an empty text.
    pub label: String,
    /// Size of the backing device in sectors, or 0 when the cache is not paired.
    pub backing_sectors: u64,
    /// The backing device's serial number or UUID, or an empty text where it has none.
    pub backing_id: String,
    /// Size of the cache device in bytes when it was formatted.
    pub cache_bytes: u64,
}

impl SuperblockExtension {
    /// What a fresh cache of so many bytes carries, without label and pairing.
    pub fn new(uuid: Uuid, cache_bytes: u64) -> SuperblockExtension {
        SuperblockExtension {
            generation: 0,
            version: EXTENSION_VERSION,
            incompatible: 0,
            read_compatible: 0,
            clean: None,
            created: 0,
            uuid,
            label: String::new(),
            backing_sectors: 0,
            backing_id: String::new(),
            cache_bytes,
        }
    }

    /// The same, paired with a backing device of so many sectors, and this identity or an empty
    /// text.
    #[must_use]
    pub fn paired(self, sectors: u64, identity: &str) -> SuperblockExtension {
        SuperblockExtension {
            backing_sectors: sectors,
            backing_id: fitting(identity).into(),
            ..self
        }
    }

    /// Decodes a page.
    ///
    /// # Errors
    /// When there is none, or it is damaged.
    pub fn decode(block: &[u8; BLOCK_BYTES]) -> Result<SuperblockExtension, PageFault> {
        if block[page::MARKER..][..8] != *PAGE_MARKER {
            return Err(PageFault::Absent);
        }
        let page = SuperblockExtension::fields(block);
        if page.generation > LARGEST_GENERATION {
            return Err(PageFault::Crc);
        }
        if LittleEndian::read_u32(&block[page::CRC..]) == crc32c(&block[..page::CRC]) {
            return Ok(page);
        }
        let mut again = [0; BLOCK_BYTES];
        page.encode(&mut again);
        let is_else_sound = again[..page::CRC] == block[..page::CRC];
        Err(if is_else_sound { PageFault::Torn(Box::new(page)) } else { PageFault::Crc })
    }

    /// What stands in a page, sound or not.
    fn fields(block: &[u8; BLOCK_BYTES]) -> SuperblockExtension {
        let u64_at = |at: usize| LittleEndian::read_u64(&block[at..]);
        let u32_at = |at: usize| LittleEndian::read_u32(&block[at..]);
        let clean_id = SegmentId(u64_at(page::CLEAN_ID).min(SegmentId::MAX.0));
        SuperblockExtension {
            generation: u64_at(page::GENERATION),
            version: u32_at(page::VERSION),
            incompatible: u32_at(page::INCOMPATIBLE),
            read_compatible: u32_at(page::READ_COMPATIBLE),
            clean: (u32_at(page::IS_CLEAN) == 1).then_some(clean_id),
            created: u64_at(page::CREATED),
            uuid: Uuid::from_slice(&block[page::UUID..page::LABEL]).unwrap_or_default(),
            label: read_text(&block[page::LABEL..][..TEXT_BYTES]),
            backing_sectors: u64_at(page::BACKING_SECTORS),
            backing_id: read_text(&block[page::BACKING_ID..][..TEXT_BYTES]),
            cache_bytes: u64_at(page::CACHE_BYTES),
        }
    }

    /// Encodes a page. Texts are cut to [`TEXT_BYTES`].
    pub fn encode(&self, block: &mut [u8; BLOCK_BYTES]) {
        block.fill(0);
        block[page::MARKER..][..8].copy_from_slice(PAGE_MARKER);
        LittleEndian::write_u64(&mut block[page::GENERATION..], self.generation);
        LittleEndian::write_u32(&mut block[page::VERSION..], self.version);
        LittleEndian::write_u32(&mut block[page::INCOMPATIBLE..], self.incompatible);
        LittleEndian::write_u32(&mut block[page::READ_COMPATIBLE..], self.read_compatible);
        LittleEndian::write_u32(&mut block[page::IS_CLEAN..], u32::from(self.clean.is_some()));
        LittleEndian::write_u64(&mut block[page::CLEAN_ID..], self.clean.unwrap_or_default().0);
        LittleEndian::write_u64(&mut block[page::CREATED..], self.created);
        block[page::UUID..page::LABEL].copy_from_slice(self.uuid.as_bytes());
        write_text(&mut block[page::LABEL..][..TEXT_BYTES], &self.label);
        LittleEndian::write_u64(&mut block[page::BACKING_SECTORS..], self.backing_sectors);
        write_text(&mut block[page::BACKING_ID..][..TEXT_BYTES], &self.backing_id);
        LittleEndian::write_u64(&mut block[page::CACHE_BYTES..], self.cache_bytes);
        let crc = crc32c(&block[..page::CRC]);
        LittleEndian::write_u32(&mut block[page::CRC..], crc);
    }

    /// The same as the page that is written next: over the older of the two copies.
    #[must_use]
    pub fn next(&self) -> SuperblockExtension {
        SuperblockExtension { generation: self.generation + 1, ..self.clone() }
    }

    /// Of the two copies, the newer one that is sound, if any is.
    pub fn newest(
        copies: &[Result<SuperblockExtension, PageFault>; 2],
    ) -> Option<&SuperblockExtension> {
        copies.iter().flatten().max_by_key(|page| page.generation)
    }

    /// Whether a power cut explains that a copy beside this sound one is torn. All that a page
    /// holds lies in its first sector: the torn one has that of the page before this, or of the one
    /// that was to follow it.
    pub fn explains(&self, torn: &SuperblockExtension) -> bool {
        let SuperblockExtension { generation, clean, backing_sectors, .. } = *self;
        let is_neighbour = torn.generation.abs_diff(generation) == 1;
        // Nothing else changes from page to page.
        is_neighbour
            && *self == SuperblockExtension { generation, clean, backing_sectors, ..torn.clone() }
    }

    /// What segments carry of the cache's UUID, so that one of an earlier cache is not taken for
    /// one of this.
    pub fn digest(&self) -> u32 {
        crc32c(self.uuid.as_bytes())
    }
}

/// A new UUID with this digest: for a cache that has lost its UUID, and not the segments that carry
/// the digest.
pub fn uuid_of_digest(digest: u32) -> Uuid {
    let mut bytes = *Uuid::new_v4().as_bytes();
    let mut crc_with = |last: u32| {
        // What a UUID says of its kind stands before these bytes.
        bytes[12..].copy_from_slice(&last.to_le_bytes());
        crc32c(&bytes)
    };
    let with_none = crc_with(0);
    // The CRC depends on each bit of the last four bytes by itself, so what each changes can be
    // added up. In echelon form.
    let mut basis = [(0, 0); 32];
    for bit in (0..32).map(|nth| 1 << nth) {
        let (mut change, mut bits) = (crc_with(bit) ^ with_none, bit);
        while let Some(top) = change.checked_ilog2() {
            let (other, its_bits) = basis[top as usize];
            if other == 0 {
                basis[top as usize] = (change, bits);
                break;
            }
            (change, bits) = (change ^ other, bits ^ its_bits);
        }
    }
    let (mut wanted, mut last) = (digest ^ with_none, 0);
    while let Some(top) = wanted.checked_ilog2() {
        let (change, bits) = basis[top as usize];
        (wanted, last) = (wanted ^ change, last ^ bits);
    }
    crc_with(last);
    Uuid::from_bytes(bytes)
}

/// Cuts a text so that it fits where texts are kept.
pub fn fitting(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES)]
}

fn write_text(field: &mut [u8], text: &str) {
    let text = fitting(text).as_bytes();
    field[..text.len()].copy_from_slice(text);
}

fn read_text(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// Why a segment was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It was full.
    Full,
    /// A flush wanted what it held to be durable.
    Flush,
    /// Nothing was written for a while.
    Idle,
    /// The cache was being closed.
    Close,
    /// It stands in for a segment that was lost.
    Salvage,
    /// It was not: this is a commit, and more may have been written since.
    Open,
    /// Something that this version does not know.
    Other(u8),
}

impl Reason {
    const fn code(self) -> u8 {
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

    const fn from_code(code: u8) -> Reason {
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

/// The first blocks of a segment, and by what they can be told to be whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// How many blocks.
    pub length: u8,
    /// The checksum of the base kind over them and the header, in which all entries after theirs
    /// are zeros.
    pub checksum: u32,
}

/// What a segment's header says beyond the base format. All of it stands in the first sector, which
/// a power cut leaves whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentExtension {
    /// [`SuperblockExtension::digest`] of the cache that the segment belongs to.
    pub digest: u32,
    /// Why the segment was closed.
    pub reason: Reason,
    /// When the header was written, every segment up to this one was durable.
    pub durable: SegmentId,
    /// When the header was written, every segment up to this one was written back and the backing
    /// device flushed.
    pub written_back: SegmentId,
    /// When the header was written, in milliseconds since 1970 (UTC).
    pub time: u64,
    /// The commit that the header before this one made, which was durable when this one was
    /// written.
    pub before: Option<Commit>,
}

/// What a header's first sector holds in the bytes that the kernel module leaves zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// Zeros: the header is the kernel module's.
    None,
    /// Neither zeros nor wb's marker.
    Stray,
    /// The marker, and a CRC that holds.
    Proved(SegmentExtension),
    /// The marker, and no CRC that holds.
    Damaged {
        /// The header is from before commits. It has no CRC of the first sector, so that a power
        /// cut may be the reason.
        may_be_torn: bool,
    },
}

impl Mark {
    /// Looks at a header block. The CRC of the first sector counts, or where there is none, that of
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

    /// Decodes the extension of a header block, if there is one and it proves itself.
    pub(super) fn decode(block: &[u8; BLOCK_BYTES]) -> Option<SegmentExtension> {
        match Mark::of(block) {
            Mark::Proved(extension) => Some(extension),
            Mark::None | Mark::Stray | Mark::Damaged { .. } => None,
        }
    }

    /// Adds the extension to a header block that is complete but for it.
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

/// Whether the header block of a segment with the extension is as it was written, to its last
/// sector.
pub(super) fn is_whole(block: &[u8; BLOCK_BYTES]) -> bool {
    LittleEndian::read_u32(&block[header::CRC..]) == header_crc(block)
}

/// The CRC of a header's first sector, in which both CRCs count as zeros.
fn sector_crc(block: &[u8; BLOCK_BYTES]) -> u32 {
    let mut sector = [0; SECTOR_BYTES];
    sector.copy_from_slice(&block[..SECTOR_BYTES]);
    sector[header::CRC..][..4].fill(0);
    sector[header::SECTOR_CRC..][..4].fill(0);
    crc32c(&sector)
}

/// The CRC of a header block, in which the CRC itself counts as zeros.
fn header_crc(block: &[u8; BLOCK_BYTES]) -> u32 {
    let crc = Checksum::default().append(&block[..header::CRC]).append(&[0; 4]);
    crc.append(&block[header::CRC + 4..]).value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page() -> SuperblockExtension {
        SuperblockExtension {
            generation: 7,
            version: EXTENSION_VERSION,
            incompatible: 0,
            read_compatible: 0,
            clean: Some(SegmentId(12)),
            created: 1_790_000_000,
            uuid: Uuid::from_bytes([0x5a; 16]),
            label: "data".into(),
            backing_sectors: 4_194_304,
            backing_id: "wwid:naa.5000c500".into(),
            cache_bytes: 1 << 30,
        }
    }

    #[test]
    fn a_page_round_trips() {
        let mut block = [0xa5; BLOCK_BYTES];
        page().encode(&mut block);
        assert_eq!(SuperblockExtension::decode(&block), Ok(page()));
        assert_eq!(SuperblockExtension::decode(&[0; BLOCK_BYTES]), Err(PageFault::Absent));
    }

    fn encoded(page: &SuperblockExtension) -> [u8; BLOCK_BYTES] {
        let mut block = [0xa5; BLOCK_BYTES];
        page.encode(&mut block);
        block
    }

    /// Whether it is explained that this block stands beside [`page`].
    fn is_torn(block: &[u8; BLOCK_BYTES]) -> bool {
        matches!(SuperblockExtension::decode(block), Err(PageFault::Torn(torn)) if page().explains(&torn))
    }

    #[test]
    fn a_page_that_a_power_cut_tore_is_told_from_rot() {
        let before = SuperblockExtension { generation: 6, clean: None, ..page() };
        let next = SuperblockExtension { backing_sectors: 5_000_000, ..page().next() };
        for (first, rest) in [(&before, &next), (&next, &before)] {
            let mut block = encoded(rest);
            block[..SECTOR_BYTES].copy_from_slice(&encoded(first)[..SECTOR_BYTES]);
            assert!(is_torn(&block));
            for at in [3, 16, 24, 50, 70, 140, 201, 300, 600, 4000] {
                let mut rotten = block;
                rotten[at] ^= 4;
                assert!(!is_torn(&rotten), "byte {at}");
            }
        }
        let elsewhere = [5, 7, 9].map(|generation| SuperblockExtension { generation, ..page() });
        for page in elsewhere {
            let mut block = encoded(&page);
            block[page::CRC] ^= 1;
            assert!(!is_torn(&block), "generation {}", page.generation);
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let mut block = [0; BLOCK_BYTES];
        SuperblockExtension { label: "ä".repeat(40) + "b", ..page() }.encode(&mut block);
        assert_eq!(SuperblockExtension::decode(&block).unwrap().label, "ä".repeat(32));
        SuperblockExtension { label: format!("a{}", "ä".repeat(40)), ..page() }.encode(&mut block);
        assert_eq!(
            SuperblockExtension::decode(&block).unwrap().label,
            format!("a{}", "ä".repeat(31))
        );
    }

    proptest! {
        #[test]
        fn a_uuid_is_found_for_any_digest(digest in any::<u32>()) {
            let uuid = uuid_of_digest(digest);
            prop_assert_eq!(SuperblockExtension::new(uuid, 0).digest(), digest);
            prop_assert_eq!(uuid.get_version_num(), 4);
        }

        #[test]
        fn any_damage_to_a_page_is_noticed(at in 0..BLOCK_BYTES, bit in 0..8u8) {
            let mut block = [0; BLOCK_BYTES];
            page().encode(&mut block);
            block[at] ^= 1 << bit;
            prop_assert!(SuperblockExtension::decode(&block).is_err());
        }

        #[test]
        fn arbitrary_bytes_under_a_right_crc_never_panic(bytes in prop::collection::vec(any::<u8>(), 300)) {
            let mut block = [0; BLOCK_BYTES];
            block[..300].copy_from_slice(&bytes);
            block[..8].copy_from_slice(PAGE_MARKER);
            let crc = crc32c(&block[..page::CRC]);
            LittleEndian::write_u32(&mut block[page::CRC..], crc);
            let has_newer = block[page::GENERATION + 7] < 0x80;
            prop_assert_eq!(SuperblockExtension::decode(&block).is_ok(), has_newer);
        }
    }
}
