//! What a sector of a simulated volume holds: its own address and the number of the write that
//! filled it, over and over. This tells misplaced, torn and mixed-up data apart. Some blocks end in
//! four bytes that make their CRC-32C 0, which is as good a CRC as any other.

use byteorder::{ByteOrder, LittleEndian};
use libwb::format::{BLOCK_BYTES, SECTOR_BYTES, Sector, crc32c, to_u64};
use std::fmt;

/// Set in the top bits of each address word, so that no stamp is zeros.
const MARK: u64 = 0x5ec7 << 48;
const STAMP_BYTES: usize = 16;
const CRC_BYTES: usize = 4;
/// One in this many writes fills whole blocks so that their CRC is 0. A checksum cannot tell blocks
/// of the same CRC apart. So two such writes must hardly ever share a place of the log, and in a
/// short script never.
const CRC_OF_ZERO: u64 = 16;
/// Which write of each [`CRC_OF_ZERO`] that is.
const ONE: u64 = 5;
/// The state of CRC-32C, before the last four bytes are mixed in, that leads to a CRC of 0.
const LEADS_TO_ZERO: u32 = {
    let (mut state, mut bits) = (u32::MAX, 32);
    while bits > 0 {
        state = if state >> 31 == 1 { (state ^ 0x82f6_3b78) << 1 | 1 } else { state << 1 };
        bits -= 1;
    }
    state
};

/// The number of a write; 0 is what the volume held from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(pub u64);

impl fmt::Display for WriteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "write {}", self.0)
    }
}

/// The content of the sectors from `first` on, `data.len()` bytes of them, as `write` fills them.
pub fn fill(data: &mut [u8], first: Sector, write: WriteId) {
    for (sector, bytes) in (first.0..).zip(data.chunks_exact_mut(SECTOR_BYTES)) {
        for stamp in bytes.chunks_exact_mut(STAMP_BYTES) {
            LittleEndian::write_u64(&mut stamp[..8], MARK | sector);
            LittleEndian::write_u64(&mut stamp[8..], write.0);
        }
    }
    for end in (SECTOR_BYTES..=data.len()).step_by(SECTOR_BYTES).filter(|end| *end >= BLOCK_BYTES) {
        let last = Sector(first.0 + to_u64(end / SECTOR_BYTES) - 1);
        if may_lack_its_end(last, write) {
            let (before, crc) = data[end - BLOCK_BYTES..end].split_at_mut(BLOCK_BYTES - CRC_BYTES);
            LittleEndian::write_u32(crc, !crc32c(before) ^ LEADS_TO_ZERO);
        }
    }
}

/// Whether a sector is the last of its block and its write makes the CRC of whole blocks 0.
fn may_lack_its_end(sector: Sector, write: WriteId) -> bool {
    (sector.0 + 1).is_multiple_of(to_u64(BLOCK_BYTES / SECTOR_BYTES))
        && write.0 % CRC_OF_ZERO == ONE
}

/// What a sector shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What a write filled it with.
    Of(WriteId),
    /// What any discard leaves.
    Zeros,
}

/// Which write filled a sector.
///
/// # Errors
/// What is wrong if no write can have.
pub fn decode(bytes: &[u8], sector: Sector) -> Result<Content, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(Content::Zeros);
    }
    let first = &bytes[..STAMP_BYTES];
    let found = (LittleEndian::read_u64(&first[..8]), WriteId(LittleEndian::read_u64(&first[8..])));
    let end =
        if may_lack_its_end(sector, found.1) { SECTOR_BYTES - CRC_BYTES } else { SECTOR_BYTES };
    if let Some(at) = bytes[..end].chunks(STAMP_BYTES).position(|stamp| !first.starts_with(stamp)) {
        return Err(format!("is torn at byte {}", at * STAMP_BYTES));
    }
    match found {
        (address, write) if address == MARK | sector.0 => Ok(Content::Of(write)),
        (address, write) if address & MARK == MARK => {
            Err(format!("holds sector {} of {write}", address & !MARK))
        }
        _ => Err("holds garbage".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_of_some_writes_have_a_crc_of_0_and_show_what_they_are() {
        for write in (0..24).map(WriteId) {
            let mut data = [0; 2 * BLOCK_BYTES];
            fill(&mut data, Sector(13), write);
            let whole = crc32c(&data[3 * SECTOR_BYTES..][..BLOCK_BYTES]);
            assert_eq!(whole == 0, write.0 % CRC_OF_ZERO == ONE);
            for (nth, bytes) in (0..).zip(data.chunks(SECTOR_BYTES)) {
                assert_eq!(decode(bytes, Sector(13 + nth)), Ok(Content::Of(write)));
            }
        }
    }
}
