//! The on-disk format: bytes ⇄ values.
//!
//! Pure code: no I/O, no clock, no allocation beyond its results. The base format is the one of the
//! Linux kernel target dm-writeboost 2.x; its facts were read from that module's published sources
//! (version 2.2.18) and checked against devices that the module wrote (`tests/golden`). Every
//! integer is little-endian.

mod checksum;
mod extension;
mod geometry;
mod segment;
mod superblock;
mod text;

pub use checksum::{Checksum, crc32c};
pub use extension::{
    Commit, EXTENSION_OFFSETS, EXTENSION_VERSION, PageFault, Reason, SegmentExtension,
    SuperblockExtension, TEXT_BYTES, fitting, uuid_of_digest,
};
pub use geometry::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, GeometryError, PLACES, Place, SECTOR_BYTES,
    SECTORS_PER_BLOCK, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector, SegmentId, Slot, to_u64,
    to_usize,
};
pub use segment::{
    FirstSector, HEADER_CHECKSUM_START, HeaderFault, LastCommit, Metablock, SegmentHeader,
    close_header, empty_header, encode_header,
};
pub use superblock::{
    MAGIC, RECORD_BLOCK_OFFSET, Record, SUPERBLOCK_OFFSET, SuperblockFault, decode_magic,
    decode_record, encode_record_block, encode_superblock_block,
};
pub use text::printable;
