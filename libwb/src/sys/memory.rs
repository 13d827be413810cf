//! Hints about memory, to the kernel, the processor and the allocator.
#![allow(unsafe_code)] // each call takes an address or changes the allocator

use nix::libc;

/// Asks for huge pages for memory that is accessed at random. Without them, the access is slower.
#[cfg(feature = "engine")]
pub(crate) fn prefer_huge_pages<T>(memory: &[T]) {
    // Memory below this size has no huge page.
    const PAGE: usize = 2 << 20;
    let start = memory.as_ptr().cast::<u8>();
    let skip = start.align_offset(PAGE);
    let Some(rest) = size_of_val(memory).checked_sub(skip).map(|rest| rest / PAGE * PAGE) else {
        return;
    };
    if rest > 0 {
        // SAFETY: the range lies within the slice, and the advice does not change its content.
        unsafe {
            libc::madvise(start.add(skip).cast_mut().cast(), rest, libc::MADV_HUGEPAGE);
        }
    }
}

/// Makes the processor fetch memory that is written next. Without this, a copy into memory outside
/// the processor's caches waits for each line. On processors without such an instruction, it does
/// nothing.
#[cfg(feature = "engine")]
pub(crate) fn prefetch_to_write(memory: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        const LINE: usize = 64;
        for line in memory.chunks(LINE) {
            // SAFETY: a prefetch has no effect that a program can observe, at any address.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.as_ptr().cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = memory;
}

/// Makes the allocator keep some megabytes of freed memory. By default it returns the buffer of a
/// segment to the system at once. Faulting in the next buffer takes longer than reading it.
#[cfg(feature = "uring")]
pub(crate) fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        /// Larger than any buffer, in bytes.
        const NO_BUFFER: libc::c_int = 4 << 20;
        /// Twice the buffers that a scan has in flight, in bytes.
        const KEPT: libc::c_int = 16 << 20;
        // SAFETY: the calls take integers and leave existing allocations alone.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, NO_BUFFER);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        }
    }
}
