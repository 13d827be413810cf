//! Memory that outlives the process: a memfd, whose descriptor another process holds as well.
#![allow(unsafe_code)] // mappings

use parking_lot::Mutex;
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use rustix::mm::{
    MapFlags, MlockFlags, MprotectFlags, ProtFlags, mlock_with, mmap, mprotect, munlock, munmap,
};
use std::collections::BTreeSet;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

/// Neither this process nor another can change the size: an access beyond the end would kill it.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A mapping of a memfd. Zeros at first. A page takes memory from its first use on.
pub(crate) struct SharedMemory {
    start: NonNull<u8>,
    length: usize,
    file: OwnedFd,
    /// Where regions begin that are lent.
    lent: Mutex<BTreeSet<usize>>,
    #[cfg(feature = "sim")]
    watch: Mutex<Option<Watch>>,
}

/// Called before and after each store of a word, and within an overwrite.
#[cfg(feature = "sim")]
type Watch = Arc<dyn Fn() + Send + Sync>;

// SAFETY: what is lent has one owner; all else is read and written as atomic words.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// New memory of `length` bytes.
    ///
    /// # Errors
    /// When the system has no room.
    pub(crate) fn create(name: &str, length: usize) -> io::Result<SharedMemory> {
        let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, crate::format::to_u64(length))?;
        fcntl_add_seals(&file, SEALS)?;
        SharedMemory::map(file, length)
    }

    /// The memory behind a descriptor.
    ///
    /// # Errors
    /// When it is not of this length for good, or the system has no room.
    pub(crate) fn open(file: OwnedFd, length: usize) -> io::Result<SharedMemory> {
        let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if u64::try_from(fstat(&file)?.st_size) != Ok(crate::format::to_u64(length)) {
            return wrong("it is not of the right length");
        }
        if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SEALS)) {
            return wrong("its length is not fixed");
        }
        SharedMemory::map(file, length)
    }

    fn map(file: OwnedFd, length: usize) -> io::Result<SharedMemory> {
        // As for a LazyBuffer: only what is used is to take memory, and that must stay.
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            mmap(std::ptr::null_mut(), length, ProtFlags::empty(), MapFlags::SHARED, &file, 0)
        }?;
        // From here on, the mapping ends with this value.
        let memory = SharedMemory {
            start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            length,
            file,
            lent: Mutex::default(),
            #[cfg(feature = "sim")]
            watch: Mutex::default(),
        };
        // SAFETY: the calls are about the mapping above, and no reference to it exists yet.
        unsafe {
            munlock(start, length)?;
            mprotect(start, length, MprotectFlags::READ | MprotectFlags::WRITE)?;
            let _ = mlock_with(start, length, MlockFlags::ONFAULT);
        }
        Ok(memory)
    }

    /// The descriptor.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// The word at byte `at`, a multiple of 8. It must not lie in a region that is ever lent.
    pub(crate) fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.length, "a word beyond the memory");
        // SAFETY: within the mapping, aligned, and alive as long as `self`.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(at).cast()) }
    }

    /// Stores a word, after all that this thread has written before, and before all that it writes
    /// later: also in the eyes of who reads the memory once this thread was killed in between.
    #[inline]
    pub(crate) fn store(&self, at: usize, word: u64) {
        self.is_seen();
        self.word(at).store(word, Ordering::Release);
        // A processor completes what precedes the instruction at which a thread is killed, and
        // nothing of what follows. So only the compiler must not move a later write forward.
        compiler_fence(Ordering::SeqCst);
        self.is_seen();
    }

    #[cfg(not(feature = "sim"))]
    #[inline]
    fn is_seen(&self) {}

    /// Calls the watch: another process could find something new.
    #[cfg(feature = "sim")]
    pub(crate) fn is_seen(&self) {
        let watch = self.watch.lock().clone();
        watch.into_iter().for_each(|watch| watch());
    }

    #[cfg(feature = "sim")]
    pub(crate) fn watch(&self, watch: impl Fn() + Send + Sync + 'static) {
        *self.watch.lock() = Some(Arc::new(watch));
    }

    /// Copies all of it to other memory of the same length. Call it while no other thread writes.
    #[cfg(feature = "sim")]
    pub(crate) fn copy_to(&self, other: &SharedMemory) {
        assert_eq!(self.length, other.length);
        // SAFETY: both mappings have this length, and do not overlap.
        unsafe { other.start.copy_from_nonoverlapping(self.start, self.length) }
    }

    /// Lends a region of `length` bytes from byte `at` on; `None` while it is lent. Regions must
    /// not overlap.
    pub(crate) fn lend(self: &Arc<Self>, at: usize, length: usize) -> Option<Region> {
        assert!(at + length <= self.length, "a region beyond the memory");
        self.lent.lock().insert(at).then(|| Region { memory: self.clone(), at, length })
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: no reference to the mapping is left.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// Bytes of shared memory, with one owner in this process.
pub(crate) struct Region {
    memory: Arc<SharedMemory>,
    at: usize,
    length: usize,
}

impl Deref for Region {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: within the mapping, and lent to this value alone.
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr().add(self.at), self.length) }
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.start.as_ptr().add(self.at), self.length)
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.memory.lent.lock().remove(&self.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_writes_another_reads() {
        let memory = Arc::new(SharedMemory::create("test", 16 << 10).unwrap());
        memory.word(8).store(7, Ordering::Release);
        let mut region = memory.lend(4096, 4096).unwrap();
        region[1] = 9;
        assert!(memory.lend(4096, 4096).is_none(), "it is lent");
        let again = memory.file().try_clone().unwrap();
        let other = Arc::new(SharedMemory::open(again, 16 << 10).unwrap());
        assert_eq!(other.word(8).load(Ordering::Acquire), 7);
        assert_eq!(other.lend(4096, 4096).unwrap()[..3], [0, 9, 0]);
        drop(region);
        assert!(memory.lend(4096, 4096).is_some());
    }

    #[test]
    fn memory_of_another_length_or_that_may_shrink_is_refused() {
        let memory = SharedMemory::create("test", 8192).unwrap();
        assert!(SharedMemory::open(memory.file().try_clone().unwrap(), 4096).is_err());
        assert!(ftruncate(memory.file(), 4096).is_err(), "it is sealed");
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        assert!(SharedMemory::open(file.into(), 8192).is_err());
    }
}
