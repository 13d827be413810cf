//! The few system calls that no safe wrapper covers.
#![allow(unsafe_code)]

use nix::errno::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

mod ioctl {
    nix::ioctl_read_bad!(blkroget, 0x125e, libc::c_int); // BLKROGET, linux/fs.h
    nix::ioctl_read_bad!(blksszget, 0x1268, libc::c_int); // BLKSSZGET, linux/fs.h
    nix::ioctl_read!(blkgetsize64, 0x12, 114, usize); // BLKGETSIZE64, linux/fs.h
}

/// A block device's size in bytes.
pub(crate) fn block_device_size(device: &File) -> nix::Result<u64> {
    let mut bytes = 0usize;
    // SAFETY: the call writes one u64 to a live variable of that size.
    unsafe { ioctl::blkgetsize64(device.as_raw_fd(), &raw mut bytes) }?;
    Ok(crate::format::to_u64(bytes))
}

/// A block device's logical block size in bytes.
pub(crate) fn logical_block_size(device: &File) -> nix::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes one int to a live variable of that type.
    unsafe { ioctl::blksszget(device.as_raw_fd(), &raw mut bytes) }?;
    u32::try_from(bytes).map_err(|_| Errno::EINVAL)
}

/// Whether a block device takes no writes.
pub(crate) fn is_read_only(device: &File) -> nix::Result<bool> {
    let mut read_only: libc::c_int = 0;
    // SAFETY: the call writes one int to a live variable of that type.
    unsafe { ioctl::blkroget(device.as_raw_fd(), &raw mut read_only) }?;
    Ok(read_only != 0)
}

/// From now on, a write beyond the limit for the size of files (`ulimit -f`) fails, and does not
/// end the process.
#[cfg(feature = "cli")]
pub(crate) fn ignore_file_size_signal() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: no handler is installed, and none is replaced: nothing of this process handles the
    // signal.
    let _ = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
}

/// Asks for large pages for memory that is looked at in no order. Where there are none, it is as
/// slow as before.
pub(crate) fn prefer_huge_pages<T>(memory: &[T]) {
    // Smaller ones have none.
    const PAGE: usize = 2 << 20;
    let start = memory.as_ptr().cast::<u8>();
    let skip = start.align_offset(PAGE);
    let Some(rest) = size_of_val(memory).checked_sub(skip).map(|rest| rest / PAGE * PAGE) else {
        return;
    };
    if rest > 0 {
        // SAFETY: the range lies within the slice, and the advice changes nothing of what it holds.
        unsafe { libc::madvise(start.add(skip).cast_mut().cast(), rest, libc::MADV_HUGEPAGE) };
    }
}

/// Has the processor fetch memory that is written next: a copy into memory that no cache holds
/// waits for it line by line. Where there is no such instruction, it does nothing.
pub(crate) fn prefetch_to_write(memory: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        const LINE: usize = 64;
        for line in memory.chunks(LINE) {
            // SAFETY: a prefetch reads and changes nothing that a program sees, whatever its
            // address.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.as_ptr().cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = memory;
}

/// Has the allocator keep some megabytes of what is freed. By itself it gives a buffer of a segment
/// back to the system at once, and to get the next one, page by page, takes longer than to read it.
pub(crate) fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        /// Larger than any buffer, in bytes.
        const NO_BUFFER: libc::c_int = 4 << 20;
        /// What a scan has under way, twice, in bytes.
        const KEPT: libc::c_int = 16 << 20;
        // SAFETY: the calls take integers and change nothing of what is allocated.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, NO_BUFFER);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        }
    }
}

/// Locks a file for as long as it is open, `exclusive`ly or shared with other readers. Does not
/// wait.
pub(crate) fn lock(file: &File, exclusive: bool) -> nix::Result<()> {
    let kind = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: the call takes two integers and touches no memory of ours.
    Errno::result(unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) }).map(drop)
}

/// The alignment that direct I/O on a file needs, in bytes, where the filesystem says.
pub(crate) fn direct_io_alignment(file: &File) -> Option<u32> {
    // SAFETY: any bytes are a valid value of this plain C struct.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the live struct that it is given; the empty path is NUL-terminated.
    let done = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    (done == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0).then_some(stat.stx_dio_offset_align)
}

mod loop_ioctl {
    pub(super) const LOOP_CLR_FD: u16 = 0x4c01;
    pub(super) const LOOP_SET_STATUS64: u16 = 0x4c04;
    pub(super) const LOOP_GET_STATUS64: u16 = 0x4c05;
    pub(super) const LOOP_CONFIGURE: u16 = 0x4c0a;
    pub(super) const LOOP_CTL_GET_FREE: u16 = 0x4c82;
    pub(super) const LO_FLAGS_AUTOCLEAR: u32 = 4;
    pub(super) const LO_FLAGS_PARTSCAN: u32 = 8;
    pub(super) const LO_FLAGS_DIRECT_IO: u32 = 16;

    nix::ioctl_none_bad!(clear, LOOP_CLR_FD);
    nix::ioctl_none_bad!(get_free, LOOP_CTL_GET_FREE);
    nix::ioctl_write_ptr_bad!(configure, LOOP_CONFIGURE, Config);
    nix::ioctl_read_bad!(get_status, LOOP_GET_STATUS64, Info);
    nix::ioctl_write_ptr_bad!(set_status, LOOP_SET_STATUS64, Info);

    /// `struct loop_info64` of linux/loop.h.
    #[repr(C)]
    pub(super) struct Info {
        pub(super) places: [u64; 5],
        pub(super) number: u32,
        pub(super) encryption: [u32; 2],
        pub(super) flags: u32,
        pub(super) names_and_key: [u8; 64 + 64 + 32 + 16],
    }

    impl Info {
        pub(super) fn with_flags(flags: u32) -> Info {
            Info { places: [0; 5], number: 0, encryption: [0; 2], flags, names_and_key: [0; 176] }
        }
    }

    /// `struct loop_config` of linux/loop.h.
    #[repr(C)]
    pub(super) struct Config {
        pub(super) fd: u32,
        pub(super) block_size: u32,
        pub(super) info: Info,
        pub(super) reserved: [u64; 8],
    }

    const _: () = assert!(size_of::<Config>() == 304);
    const _: () = assert!(size_of::<Info>() == 232);
    const _: () = assert!(std::mem::offset_of!(Info, flags) == 52);
}

/// The number of a loop device that is not in use at the moment.
pub(crate) fn loop_get_free(control: &File) -> nix::Result<u32> {
    // SAFETY: the call takes no argument.
    let number = unsafe { loop_ioctl::get_free(control.as_raw_fd()) }?;
    u32::try_from(number).map_err(|_| Errno::EINVAL)
}

/// Puts a loop device on a file, with direct I/O, to be cleared when nobody has it open any more.
pub(crate) fn loop_configure(device: &OwnedFd, file: &File, block_size: u32) -> nix::Result<()> {
    let config = loop_ioctl::Config {
        fd: u32::try_from(file.as_raw_fd()).map_err(|_| Errno::EBADF)?,
        block_size,
        info: loop_ioctl::Info::with_flags(
            loop_ioctl::LO_FLAGS_AUTOCLEAR | loop_ioctl::LO_FLAGS_DIRECT_IO,
        ),
        reserved: [0; 8],
    };
    // SAFETY: the call reads a live struct of the layout that the kernel expects.
    unsafe { loop_ioctl::configure(device.as_raw_fd(), &raw const config) }?;
    Ok(())
}

/// Has a loop device show the partitions that its content describes, as long as it stands on its
/// file.
pub(crate) fn loop_show_partitions(device: &File) -> nix::Result<()> {
    let mut info = loop_ioctl::Info::with_flags(0);
    // SAFETY: the call fills a live struct of the layout that the kernel expects.
    unsafe { loop_ioctl::get_status(device.as_raw_fd(), &raw mut info) }?;
    info.flags |= loop_ioctl::LO_FLAGS_PARTSCAN;
    // SAFETY: the call reads a live struct of the layout that the kernel expects.
    unsafe { loop_ioctl::set_status(device.as_raw_fd(), &raw const info) }?;
    Ok(())
}

/// Takes a loop device off its file, now or when nobody has it open any more.
pub(crate) fn loop_clear(device: &OwnedFd) -> nix::Result<()> {
    // SAFETY: the call takes no argument.
    unsafe { loop_ioctl::clear(device.as_raw_fd()) }?;
    Ok(())
}

/// Tells the kernel that this thread, and those that it starts, serve I/O that memory reclaim may
/// wait for.
pub(crate) fn set_io_flusher() -> nix::Result<()> {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    const PR_GET_IO_FLUSHER: libc::c_int = 58;
    // SAFETY: the call takes plain numbers.
    Errno::result(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) })?;
    // SAFETY: the call takes plain numbers.
    match Errno::result(unsafe { libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) })? {
        1 => Ok(()),
        // A sandbox that pretends.
        _ => Err(Errno::ENOTSUP),
    }
}
