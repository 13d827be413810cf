//! What a sector of a simulated volume holds: its own address and the number of the write that filled it, over and
//! over, so that misplaced, torn and mixed-up data are told apart.

use byteorder::{ByteOrder, LittleEndian};
use libwb::format::{SECTOR_BYTES, Sector};
use std::fmt;

/// In the top bits of each address word, so that no stamp is zeros.
const MARK: u64 = 0x5ec7 << 48;
const STAMP_BYTES: usize = 16;

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
}

/// What a sector shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What a write filled it with.
    Of(WriteId),
    /// What any discard leaves.
    Zeros,
}

/// Who filled a sector.
///
/// # Errors
/// What is wrong when nobody can have.
pub fn decode(bytes: &[u8], sector: Sector) -> Result<Content, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(Content::Zeros);
    }
    let first = &bytes[..STAMP_BYTES];
    let found = (LittleEndian::read_u64(&first[..8]), WriteId(LittleEndian::read_u64(&first[8..])));
    if let Some(at) = bytes.chunks_exact(STAMP_BYTES).position(|stamp| stamp != first) {
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
