//! The superblock extension: pages in bytes that the kernel module neither reads nor checks.
//!
//! Each page has a CRC of its own. `man/wb.5` has the offsets, with a worked hex dump. They never
//! change their meaning.

use super::checksum::crc32c;
use super::geometry::{BLOCK_BYTES, SegmentId};
use byteorder::{ByteOrder, LittleEndian};
use uuid::Uuid;

/// The offsets of the two copies of the superblock extension, in bytes. Writes alternate between
/// them.
pub const EXTENSION_OFFSETS: [u64; 2] = [64 * 1024, 128 * 1024];
/// The longest label or device identity, in bytes of UTF-8.
pub const TEXT_BYTES: usize = page::TEXT_BYTES;

/// Offsets in a page of the superblock extension.
mod page {
    use crate::format::geometry::BLOCK_BYTES;

    pub(super) const TEXT_BYTES: usize = 64;
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
    pub(super) const CRC: usize = BLOCK_BYTES - 4;

    const _: () =
        assert!(GENERATION == MARKER + 8 && CLEAN_ID == IS_CLEAN + 4 && UUID == CREATED + 8);
    const _: () = assert!(LABEL == UUID + 16 && BACKING_SECTORS == LABEL + TEXT_BYTES);
    const _: () =
        assert!(BACKING_ID == BACKING_SECTORS + 8 && CACHE_BYTES == BACKING_ID + TEXT_BYTES);
    const _: () = assert!(CACHE_BYTES + 8 <= CRC);
}

const PAGE_MARKER: &[u8; 8] = b"wb-super";
/// The largest generation that a page may have, so that a newer one always exists. A cache counts
/// from 0 and never comes near it.
const LARGEST_GENERATION: u64 = u64::MAX / 2;
/// The only version of the extension that wb writes and reads.
pub const EXTENSION_VERSION: u32 = 1;

/// What is wrong with a page of the superblock extension.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageFault {
    /// There is no page.
    #[error("no superblock extension")]
    Absent,
    /// Its CRC is wrong, or no cache can have reached its generation.
    #[error("a superblock extension with a wrong CRC")]
    Crc,
    /// Only its CRC is wrong: its first sectors may be of this page, and the rest of another.
    #[error("a superblock extension with a wrong CRC")]
    Torn(Box<SuperblockExtension>),
    /// The device cannot read it.
    #[error("a superblock extension that the device cannot read")]
    Unreadable,
}

/// A page of the superblock extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuperblockExtension {
    /// Grows by one with each page that is written.
    pub generation: u64,
    /// If this is not [`EXTENSION_VERSION`], the device must not be used.
    pub version: u32,
    /// Features that a reader must know to use the device. None are defined yet.
    pub incompatible: u32,
    /// Features that a program must know to write to the device. None are defined yet.
    pub read_compatible: u32,
    /// The newest segment when the cache was closed cleanly.
    pub clean: Option<SegmentId>,
    /// When the device was formatted, in seconds since 1970 (UTC).
    pub created: u64,
    /// The cache's identity.
    pub uuid: Uuid,
    /// A name for people; empty if there is none.
    pub label: String,
    /// Size of the backing device in sectors; 0 if the cache is not paired.
    pub backing_sectors: u64,
    /// The backing device's serial number or UUID; empty if it has none.
    pub backing_id: String,
    /// Size of the cache device in bytes when it was formatted.
    pub cache_bytes: u64,
}

impl SuperblockExtension {
    /// The extension of a fresh cache device with `cache_bytes` bytes, without a label and pairing.
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

    /// The same, paired with a backing device that has this size and identity. The identity may be
    /// empty.
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

    /// Reads the fields of a page, sound or not.
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

    /// Encodes a page. Truncates texts to [`TEXT_BYTES`].
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

    /// The same as the next page to write, which replaces the older copy.
    #[must_use]
    pub fn next(&self) -> SuperblockExtension {
        SuperblockExtension { generation: self.generation + 1, ..self.clone() }
    }

    /// The newer of the sound copies, if there is any.
    pub fn newest(
        copies: &[Result<SuperblockExtension, PageFault>; 2],
    ) -> Option<&SuperblockExtension> {
        copies.iter().flatten().max_by_key(|page| page.generation)
    }

    /// Whether a power cut explains the torn copy beside this sound one.
    ///
    /// A page's fields all lie in its first sector. So the torn copy has the fields of the page
    /// before or after this one.
    pub fn explains(&self, torn: &SuperblockExtension) -> bool {
        let SuperblockExtension { generation, clean, backing_sectors, .. } = *self;
        let is_neighbour = torn.generation.abs_diff(generation) == 1;
        // Only these fields change from one page to the next.
        is_neighbour
            && *self == SuperblockExtension { generation, clean, backing_sectors, ..torn.clone() }
    }

    /// The digest of the cache's UUID that segments carry. It tells them from segments of an
    /// earlier cache on the device.
    pub fn digest(&self) -> u32 {
        crc32c(self.uuid.as_bytes())
    }
}

/// A new UUID with this digest, for a cache that lost its UUID but still has segments with the
/// digest.
pub fn uuid_of_digest(digest: u32) -> Uuid {
    let mut bytes = *Uuid::new_v4().as_bytes();
    let mut crc_with = |last: u32| {
        // The bits for the version and variant of the UUID lie before these bytes.
        bytes[12..].copy_from_slice(&last.to_le_bytes());
        crc32c(&bytes)
    };
    let with_none = crc_with(0);
    // A CRC is linear: each bit of the last four bytes changes it independently of the others.
    // Gaussian elimination over these changes, in echelon form.
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

/// Truncates a text to [`TEXT_BYTES`].
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::SECTOR_BYTES;
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

    /// Whether a power cut explains this block beside [`page`].
    fn is_torn(block: &[u8; BLOCK_BYTES]) -> bool {
        let Err(PageFault::Torn(torn)) = SuperblockExtension::decode(block) else { return false };
        page().explains(&torn)
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
        fn arbitrary_bytes_under_a_right_crc_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 300),
        ) {
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
