//! The few system calls that no safe wrapper covers.
#![allow(unsafe_code)]

use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;

mod ioctl {
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

/// Locks a file for as long as it is open, `exclusive`ly or shared with other readers. Does not wait.
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
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    (done == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0).then_some(stat.stx_dio_offset_align)
}
