//! The head of the log in shared memory: what was acknowledged and is not on the cache device yet.
//! It outlives the process if another one holds its descriptor.

use crate::sys::SharedMemory;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// The bytes of a head.
pub(crate) const HEAD_BYTES: usize = 8 << 20;

/// The head of one cache's log. Clones are the same memory.
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
}
