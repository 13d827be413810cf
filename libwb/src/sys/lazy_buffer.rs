//! Buffers that take memory only once they are used.
#![allow(unsafe_code)] // mappings

use nix::libc;
use rustix::mm::{
    MapFlags, MlockFlags, MprotectFlags, ProtFlags, mlock_with, mmap_anonymous, mprotect, munlock,
    munmap,
};
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Zeros at first. A page of it takes memory from its first use on, even in a process that keeps
/// all its memory resident.
pub(crate) struct LazyBuffer {
    start: NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for LazyBuffer {}
// SAFETY: as for a slice of bytes, a shared reference only reads.
unsafe impl Sync for LazyBuffer {}

impl LazyBuffer {
    /// A buffer of `length` bytes, a multiple of the size of a page.
    ///
    /// # Errors
    /// When the system has no address space left.
    pub(crate) fn new(length: usize) -> io::Result<LazyBuffer> {
        // In a process that locks its memory, the kernel fills a new mapping at once, except one
        // without access rights. So map without rights, unlock, and only then allow access.
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), length, ProtFlags::empty(), MapFlags::PRIVATE)
        }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        let buffer = LazyBuffer { start, length };
        // SAFETY: the calls are about the mapping above, and no reference to it exists yet.
        unsafe {
            munlock(start.as_ptr(), length)?;
            mprotect(start.as_ptr(), length, MprotectFlags::READ | MprotectFlags::WRITE)?;
            // What is used must stay: to get it back from swap may need this very process. Where
            // memory cannot be locked, the daemon has said so already.
            let _ = mlock_with(start.as_ptr(), length, MlockFlags::ONFAULT);
        }
        Ok(buffer)
    }
}

impl Deref for LazyBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has this length, is readable, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.length) }
    }
}

impl DerefMut for LazyBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; it is writable, too, and `self` is the only way to it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.length) }
    }
}

impl Drop for LazyBuffer {
    fn drop(&mut self) {
        // SAFETY: no reference to the mapping is left.
        let _ = unsafe { munmap(self.start.as_ptr(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::LazyBuffer;

    #[test]
    fn a_buffer_is_zeros_at_first_and_keeps_what_is_written() {
        let mut buffer = LazyBuffer::new(64 << 10).unwrap();
        assert_eq!(buffer.len(), 64 << 10);
        assert!(buffer.iter().all(|&byte| byte == 0));
        buffer[100..].fill(7);
        assert!(buffer[..100].iter().all(|&byte| byte == 0));
        assert!(buffer[100..].iter().all(|&byte| byte == 7));
    }
}
