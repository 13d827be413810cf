//! What the kernel says about a block device or a file.
#![allow(unsafe_code)] // the ioctls that rustix does not cover

use rustix::fs::{AtFlags, StatxFlags, ioctl_blksszget, statx};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
#[cfg(feature = "serve-loop")]
use std::os::fd::OwnedFd;

mod ioctl {
    #[cfg(feature = "serve-loop")]
    nix::ioctl_write_ptr_bad!(blkroset, 0x125d, nix::libc::c_int); // BLKROSET, linux/fs.h
    nix::ioctl_read_bad!(blkroget, 0x125e, nix::libc::c_int); // BLKROGET, linux/fs.h
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
pub(crate) fn logical_block_size(device: &File) -> io::Result<u32> {
    Ok(ioctl_blksszget(device)?)
}

/// Whether a block device rejects writes.
pub(crate) fn is_read_only(device: &File) -> nix::Result<bool> {
    let mut read_only: nix::libc::c_int = 0;
    // SAFETY: the call writes one int to a live variable of that type.
    unsafe { ioctl::blkroget(device.as_raw_fd(), &raw mut read_only) }?;
    Ok(read_only != 0)
}

/// Lets a block device take writes again, if a program has write-protected it.
#[cfg(feature = "serve-loop")]
pub(crate) fn allow_writes(device: &OwnedFd) -> nix::Result<()> {
    let read_only: nix::libc::c_int = 0;
    // SAFETY: the call reads one int from a live variable of that type.
    unsafe { ioctl::blkroset(device.as_raw_fd(), &raw const read_only) }?;
    Ok(())
}

/// The alignment in bytes that direct I/O on a file needs, if the filesystem reports it.
pub(crate) fn direct_io_alignment(file: &File) -> Option<u32> {
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let is_reported = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    is_reported.then_some(stat.stx_dio_offset_align)
}
