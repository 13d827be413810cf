//! The on-disk format: bytes ⇄ values.
//!
//! Pure code: no I/O, no clock, no allocation beyond its results. The base format is that of the
//! Linux kernel target dm-writeboost 2.x. Its facts come from that module's published sources
//! (version 2.2.18). They were checked against devices that the module wrote (`tests/golden`).
//! Every integer is little-endian.

mod checksum;
mod geometry;
mod segment;
mod segment_extension;
mod superblock;
mod superblock_extension;
mod text;

pub use checksum::{Checksum, crc32c};
pub use geometry::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, GeometryError, PLACES, Place, SECTOR_BYTES,
    SECTORS_PER_BLOCK, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector, SegmentId, Slot, to_u64,
    to_usize,
};
pub use segment::{
    FirstSector, HEADER_CHECKSUM_START, HeaderFault, LastCommit, Metablock, SegmentHeader,
    close_header, empty_header, encode_header,
};
pub use segment_extension::{Commit, Reason, SegmentExtension};
pub use superblock::{
    MAGIC, RECORD_BLOCK_OFFSET, Record, SUPERBLOCK_OFFSET, SuperblockFault, decode_magic,
    decode_record, encode_record_block, encode_superblock_block,
};
pub use superblock_extension::{
    EXTENSION_OFFSETS, EXTENSION_VERSION, PageFault, SuperblockExtension, TEXT_BYTES, fitting,
    uuid_of_digest,
};
pub use text::printable;
