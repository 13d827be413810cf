//! The head of the log: what was acknowledged and is not on the cache device yet, in memory that
//! outlives the process if another one holds its descriptor. [`Head`] has the layout.
//!
//! Each step of a change is one that a reader understands after the process was killed at any
//! instruction. A block comes into a frame in this order: its data, its entry, the new length. A
//! block is overwritten in place only after the old one was put aside; until the overwrite is
//! done, the reader takes the old one back. So of each block, the reader finds the state before a
//! change or after it.

mod binding;
mod entry;
mod failure;
mod figures;
mod frames;
mod read;
#[cfg(test)]
mod tests;

pub(crate) use binding::Owner;
pub(crate) use entry::Entry;
pub(crate) use figures::{Figure, Figures};
pub(crate) use frames::{Frame, Frames};
pub(crate) use read::HeadSegment;

use crate::format::{BLOCK_BYTES, PLACES, SEGMENT_BYTES, to_usize};
use crate::sys::SharedMemory;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// How many segments have room: eight sealed, an open one, and some that are being given back.
const FRAMES: usize = 12;

/// Where the parts begin, in bytes.
mod at {
    use super::BLOCK_BYTES;

    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const BOOT: usize = 16;
    pub(super) const CACHE: usize = 32;
    pub(super) const GENERATION: usize = 48;
    pub(super) const SLOTS: usize = 56;
    pub(super) const CHECKSUM: usize = 64;
    pub(super) const FAILURE: usize = 72;
    pub(super) const FAILURE_OFFSET: usize = 80;
    pub(super) const FAILURE_LENGTH: usize = 88;
    /// What is being overwritten: its place, and its entry.
    pub(super) const UNDO_PLACE: usize = BLOCK_BYTES;
    pub(super) const UNDO_ENTRY: usize = BLOCK_BYTES + 8;
    /// The data before.
    pub(super) const UNDO_DATA: usize = 2 * BLOCK_BYTES;
    pub(super) const FIGURES: usize = 3 * BLOCK_BYTES;
    pub(super) const FRAMES: usize = 4 * BLOCK_BYTES;

    /// Within a frame.
    pub(super) const ID: usize = 0;
    pub(super) const STATE: usize = 8;
    pub(super) const ENTRIES: usize = 64;
    pub(super) const DATA: usize = BLOCK_BYTES;
}

const HEAD_BYTES: usize = at::FRAMES + FRAMES * SEGMENT_BYTES;
const DATA_BYTES: usize = PLACES as usize * BLOCK_BYTES;
const _: () = assert!(at::DATA + DATA_BYTES == SEGMENT_BYTES);
const _: () = assert!(at::ENTRIES + 8 * PLACES as usize <= at::DATA);

/// The head of one cache's log. Clones are the same memory.
///
/// All numbers are 64-bit words in the order of the machine. A frame is 512 KiB.
///
/// | byte | what |
/// | --- | --- |
/// | 0 | magic, `wb head` and a line feed; 0: blank |
/// | 8 | version: 1 |
/// | 16 | boot id, 16 bytes |
/// | 32 | UUID of the cache, 16 bytes; 0: it has none |
/// | 48 | generation of its superblock extension; 0: it has none |
/// | 56 | slots of the cache device |
/// | 64 | CRC-32C of bytes 8 to 63 |
/// | 72 | 0, or how the cache device failed: 1024 × operation + error number |
/// | 80 | where, in bytes |
/// | 88 | the length of that operation, in bytes |
/// | 4096 | what is being overwritten: 0, or 256 × (frame + 1) + place |
/// | 4104 | its entry before |
/// | 8192 | its data before, 4096 bytes |
/// | 12288 | what the cache has counted, 512 words |
/// | 16384 | 12 frames |
///
/// | byte of a frame | what |
/// | --- | --- |
/// | 0 | segment id; 0: unused |
/// | 8 | length + 256 × why the segment was closed, as in its header; 0: it is open |
/// | 64 | 127 entries |
/// | 4096 | 127 blocks |
///
/// An entry is 65536 × block + 256 × flags + dirty bits. Flag 1: these are the zeros of a discard.
/// Flag 2: the block is lost. The operations are read, write, flush, discard and durable write,
/// from 1 on.
#[derive(Clone)]
pub struct Head {
    memory: Arc<SharedMemory>,
}

impl Head {
    /// A new, blank one. The first cache that is opened with it has it from then on.
    ///
    /// # Errors
    /// When the system has no room for it.
    pub fn create() -> io::Result<Head> {
        Ok(Head { memory: Arc::new(SharedMemory::create("wb-head", HEAD_BYTES)?) })
    }

    /// The head behind a descriptor, which an earlier process has left.
    ///
    /// # Errors
    /// When that is none.
    pub fn open(file: OwnedFd) -> io::Result<Head> {
        Ok(Head { memory: Arc::new(SharedMemory::open(file, HEAD_BYTES)?) })
    }

    /// The descriptor to leave to another process.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.file().as_fd()
    }

    /// What another process would find now. A copy, so that what this process does later does not
    /// matter.
    ///
    /// # Errors
    /// When the system has no room for it.
    #[cfg(feature = "sim")]
    pub fn copy(&self) -> io::Result<Head> {
        let copy = Head::create()?;
        self.memory.copy_to(&copy.memory);
        Ok(copy)
    }

    /// Calls `look` whenever another process could find something else than at the last call.
    #[cfg(feature = "sim")]
    pub fn watch(&self, look: impl Fn(&Head) + Send + Sync + 'static) {
        let head = Arc::downgrade(&self.memory);
        self.memory.watch(move || {
            if let Some(memory) = head.upgrade() {
                look(&Head { memory });
            }
        });
    }

    fn frame_at(number: usize) -> usize {
        at::FRAMES + number * SEGMENT_BYTES
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Head")
    }
}

/// Where an entry lies in its frame.
fn entry_at(index: u8) -> usize {
    at::ENTRIES + 8 * usize::from(index)
}

/// A small number that was read from a word.
fn small(word: u64) -> usize {
    to_usize(word.min(1 << 32))
}
