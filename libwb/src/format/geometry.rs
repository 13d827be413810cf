//! Units and the arithmetic between them.
//!
//! Each unit is a type of its own, so that a sector is never added to a block. A plain `u64` or
//! `usize` counts bytes.

use std::fmt;

/// Bytes in a sector, the unit of addresses in metablocks.
pub const SECTOR_BYTES: usize = 512;
/// Bytes in a block, the unit of caching.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes in a segment: one header block and [`PLACES`] data blocks.
pub const SEGMENT_BYTES: usize = 512 * 1024;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = 8;
/// Data blocks in a segment, and so the maximum of metablocks in a header.
pub const PLACES: u8 = 127;
/// The first MiB of a cache device: superblock, extension, superblock record. Segments start after
/// it.
pub const SUPERBLOCK_REGION_BYTES: u64 = 1024 * 1024;
/// The maximum of [`Geometry::write_window`], in segments.
const MAX_WRITE_WINDOW: u64 = 128;

const _: () = assert!(BLOCK_BYTES as u64 == SECTOR_BYTES as u64 * SECTORS_PER_BLOCK);
const _: () = assert!(SEGMENT_BYTES == BLOCK_BYTES * (1 + PLACES as usize));
const _: () = assert!(size_of::<usize>() == size_of::<u64>(), "wb needs a 64-bit machine");

/// `u64` to `usize`. Both have the same size on every machine that wb supports.
#[allow(clippy::cast_possible_truncation)] // asserted above
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

/// `usize` to `u64`. Both have the same size on every machine that wb supports.
pub const fn to_u64(n: usize) -> u64 {
    n as u64
}

/// An address on the backing device or the volume, in units of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

impl Sector {
    /// The block that holds this sector.
    pub const fn block(self) -> BlockNo {
        BlockNo(self.0 / SECTORS_PER_BLOCK)
    }

    /// Which sector of its block this is, 0 to 7.
    pub const fn in_block(self) -> usize {
        to_usize(self.0 % SECTORS_PER_BLOCK)
    }

    /// Offset in bytes. The caller has checked the sector against a device's size.
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR_BYTES as u64
    }
}

impl fmt::Display for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An address on the backing device or the volume, in units of 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNo(pub u64);

impl BlockNo {
    /// The block's first sector.
    pub const fn sector(self) -> Sector {
        Sector(self.0 * SECTORS_PER_BLOCK)
    }

    /// Offset in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 * BLOCK_BYTES as u64
    }
}

impl fmt::Display for BlockNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of a segment in the log. Ids start at 1 and grow by one; 0 means "none".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SegmentId(pub u64);

impl SegmentId {
    /// No segment: the id in an unwritten slot, and the superblock record of a fresh cache.
    pub const NONE: SegmentId = SegmentId(0);
    /// The largest valid id. No real log reaches it, so a larger id is garbage. Rejecting larger
    /// ids keeps all arithmetic on ids far from overflow.
    pub const MAX: SegmentId = SegmentId(1 << 56);

    /// The id after this one.
    #[must_use]
    pub const fn next(self) -> SegmentId {
        SegmentId(self.0 + 1)
    }

    /// The id `n` after this one.
    #[must_use]
    pub const fn plus(self, n: u64) -> SegmentId {
        SegmentId(self.0 + n)
    }

    /// The id `n` before this one, or [`SegmentId::NONE`].
    #[must_use]
    pub const fn minus(self, n: u64) -> SegmentId {
        SegmentId(self.0.saturating_sub(n))
    }

    /// How many ids follow `earlier`, up to this one; 0 if `earlier` is not smaller.
    pub const fn since(self, earlier: SegmentId) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A segment's place on the cache device, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A data block's place on the cache device: a slot and which of its [`PLACES`] data blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The slot.
    pub slot: Slot,
    /// The data block within it, 0 to 126.
    pub index: u8,
}

/// Which sectors of a block hold data newer than the backing device: bit i is for sector i.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct DirtyBits(pub u8);

impl DirtyBits {
    /// A block from read caching: all eight sectors are valid, none newer than the backing device.
    pub const CLEAN: DirtyBits = DirtyBits(0);
    /// A block written whole.
    pub const ALL: DirtyBits = DirtyBits(0xff);

    /// The bits of `count` sectors from sector `first`, both within one block.
    pub const fn range(first: usize, count: usize) -> DirtyBits {
        debug_assert!(first + count <= 8);
        DirtyBits(if count >= 8 { 0xff } else { ((1u8 << count) - 1) << first })
    }

    /// Whether no sector is dirty.
    pub const fn is_clean(self) -> bool {
        self.0 == 0
    }

    /// Whether every sector is dirty.
    pub const fn is_all(self) -> bool {
        self.0 == 0xff
    }

    /// The bits that either has.
    #[must_use]
    pub const fn union(self, other: DirtyBits) -> DirtyBits {
        DirtyBits(self.0 | other.0)
    }

    /// The bits that both have.
    #[must_use]
    pub const fn intersection(self, other: DirtyBits) -> DirtyBits {
        DirtyBits(self.0 & other.0)
    }

    /// The bits that `other` lacks.
    #[must_use]
    pub const fn without(self, other: DirtyBits) -> DirtyBits {
        DirtyBits(self.0 & !other.0)
    }

    /// The runs of neighbouring dirty sectors, as (first sector, count), lowest first.
    pub fn runs(self) -> impl Iterator<Item = (usize, usize)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < 8 && self.0 >> at & 1 == 0 {
                at += 1;
            }
            let first = at;
            while at < 8 && self.0 >> at & 1 == 1 {
                at += 1;
            }
            (at > first).then_some((first, at - first))
        })
    }
}

/// Why a cache device cannot have this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// Smaller than the superblock region and one segment.
    #[error(
        "too small for a cache device: {bytes} bytes, and it needs at least {minimum} (1 MiB and \
         one segment of 512 KiB)"
    )]
    TooSmall {
        /// The device's size in bytes.
        bytes: u64,
        /// The smallest possible size in bytes.
        minimum: u64,
    },
    /// Larger than wb supports.
    #[error("too large for a cache device: {bytes} bytes, and at most {maximum} are supported")]
    TooLarge {
        /// The device's size in bytes.
        bytes: u64,
        /// The largest supported size in bytes.
        maximum: u64,
    },
}

/// The layout of a cache device. It follows from the size alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    slots: u32,
}

impl Geometry {
    /// The index numbers places with 32 bits.
    const MAX_SLOTS: u64 = (u32::MAX / PLACES as u32) as u64;

    /// The layout of a cache device of this many bytes.
    ///
    /// # Errors
    /// When it is too small to hold one segment, or larger than is supported.
    pub fn of_device(bytes: u64) -> Result<Geometry, GeometryError> {
        let segment = to_u64(SEGMENT_BYTES);
        let slots = bytes.saturating_sub(SUPERBLOCK_REGION_BYTES) / segment;
        if slots == 0 {
            return Err(GeometryError::TooSmall {
                bytes,
                minimum: SUPERBLOCK_REGION_BYTES + segment,
            });
        }
        match u32::try_from(slots) {
            Ok(n) if slots <= Self::MAX_SLOTS => Ok(Geometry { slots: n }),
            _ => Err(GeometryError::TooLarge {
                bytes,
                maximum: SUPERBLOCK_REGION_BYTES + Self::MAX_SLOTS * segment,
            }),
        }
    }

    /// The number of slots; at least one.
    pub const fn slots(self) -> u32 {
        self.slots
    }

    /// The number of slots as a difference of ids: segments `i` and `i + lap` share a slot.
    pub const fn lap(self) -> u64 {
        self.slots as u64
    }

    /// Every slot, in the order of the device.
    pub fn all_slots(self) -> impl DoubleEndedIterator<Item = Slot> + ExactSizeIterator {
        (0..self.slots).map(Slot)
    }

    /// The slot of segment `id`, which must not be [`SegmentId::NONE`].
    #[allow(clippy::cast_possible_truncation)] // a remainder of a u32 fits a u32
    pub const fn slot_of(self, id: SegmentId) -> Slot {
        debug_assert!(id.0 > 0);
        Slot(((id.0 - 1) % self.lap()) as u32)
    }

    /// The largest id up to and including `newest` that belongs in `slot`; [`SegmentId::NONE`] if
    /// the log has not reached the slot yet.
    pub const fn id_in_slot(self, slot: Slot, newest: SegmentId) -> SegmentId {
        let first = slot.0 as u64 + 1;
        if newest.0 < first {
            return SegmentId::NONE;
        }
        SegmentId(first + (newest.0 - first) / self.lap() * self.lap())
    }

    /// Offset of a slot on the cache device, in bytes.
    pub const fn slot_offset(self, slot: Slot) -> u64 {
        SUPERBLOCK_REGION_BYTES + slot.0 as u64 * SEGMENT_BYTES as u64
    }

    /// Offset of a data block on the cache device, in bytes.
    pub const fn place_offset(self, place: Place) -> u64 {
        self.slot_offset(place.slot) + BLOCK_BYTES as u64 * (1 + place.index as u64)
    }

    /// How many of the newest segments a power cut may lose or damage: a quarter of the slots, at
    /// least one. Recovery treats a longer gap as corruption.
    pub const fn loss_window(self) -> u64 {
        let quarter = self.lap() / 4;
        if quarter == 0 { 1 } else { quarter }
    }

    /// How many segments wb writes ahead of the last durable one. This is at most the loss window,
    /// and few enough that recovery reads them whole in little time.
    pub const fn write_window(self) -> u64 {
        let window = self.loss_window();
        if window < MAX_WRITE_WINDOW { window } else { MAX_WRITE_WINDOW }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_fill_the_device_and_the_tail_is_unused() {
        let mib = 1024 * 1024;
        assert_eq!(Geometry::of_device(8 * mib).map(Geometry::slots), Ok(14));
        assert_eq!(Geometry::of_device(8 * mib + 511 * 1024).map(Geometry::slots), Ok(14));
        assert_eq!(Geometry::of_device(mib + 512 * 1024).map(Geometry::slots), Ok(1));
        assert!(matches!(
            Geometry::of_device(mib + 512 * 1024 - 1),
            Err(GeometryError::TooSmall { .. })
        ));
        assert!(matches!(Geometry::of_device(u64::MAX), Err(GeometryError::TooLarge { .. })));
    }

    #[test]
    fn id_in_slot_inverts_slot_of() {
        let g = Geometry { slots: 5 };
        for newest in 0..23 {
            for slot in g.all_slots() {
                let want = (1..=newest).rev().map(SegmentId).find(|&id| g.slot_of(id) == slot);
                assert_eq!(g.id_in_slot(slot, SegmentId(newest)), want.unwrap_or(SegmentId::NONE));
            }
        }
    }

    #[test]
    fn dirty_runs_cover_exactly_the_set_bits() {
        for bits in 0..=255u8 {
            let mut back = DirtyBits::CLEAN;
            for (first, count) in DirtyBits(bits).runs() {
                assert!(count > 0);
                back = back.union(DirtyBits::range(first, count));
            }
            assert_eq!(back.0, bits);
        }
        assert_eq!(DirtyBits(0b0110_1101).runs().collect::<Vec<_>>(), [(0, 1), (2, 2), (5, 2)]);
    }
}
