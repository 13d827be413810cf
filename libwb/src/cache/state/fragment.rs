//! The parts of a request that lie in one block each.

use crate::format::{BLOCK_BYTES, BlockNo, DirtyBits, SECTOR_BYTES, Sector, to_u64};

/// The part of a request that lies in one block.
pub(crate) struct Fragment {
    pub(crate) block: BlockNo,
    /// The first sector within the block.
    pub(crate) first: usize,
    /// Where it begins in the request, in bytes.
    pub(crate) at: usize,
    /// Its length in bytes.
    pub(crate) length: usize,
}

impl Fragment {
    #[inline]
    pub(crate) fn bits(&self) -> DirtyBits {
        DirtyBits::range(self.first, self.length / SECTOR_BYTES)
    }

    /// Whether it covers its block.
    #[inline]
    pub(crate) fn is_whole_block(&self) -> bool {
        self.length == BLOCK_BYTES
    }

    /// Whether a device with blocks of `unit` bytes can write it alone.
    pub(crate) fn is_aligned(&self, unit: usize) -> bool {
        (self.first * SECTOR_BYTES).is_multiple_of(unit) && self.length.is_multiple_of(unit)
    }

    /// Copies the fragment's data into its block.
    #[inline]
    pub(crate) fn copy_into(&self, block: &mut [u8; BLOCK_BYTES], bytes: &[u8]) {
        let at = self.first * SECTOR_BYTES;
        block[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// Cuts a request into fragments. `length` is in bytes.
pub(crate) fn fragments(sector: Sector, length: usize) -> impl Iterator<Item = Fragment> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let here = sector_at(sector, at);
        let first = here.in_block();
        let fragment = Fragment {
            block: here.block(),
            first,
            at,
            length: (length - at).min(BLOCK_BYTES - first * SECTOR_BYTES),
        };
        at += fragment.length;
        (fragment.length > 0).then_some(fragment)
    })
}

/// The sector that lies `bytes` after another one.
pub(crate) fn sector_at(sector: Sector, bytes: usize) -> Sector {
    Sector(sector.0 + to_u64(bytes / SECTOR_BYTES))
}
