//! Setting up loop devices.
#![allow(unsafe_code)] // ioctls that no crate wraps

use nix::errno::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

mod ioctl {
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

/// The number of a loop device that is free at the moment.
pub(crate) fn loop_get_free(control: &File) -> nix::Result<u32> {
    // SAFETY: the call takes no argument.
    let number = unsafe { ioctl::get_free(control.as_raw_fd()) }?;
    u32::try_from(number).map_err(|_| Errno::EINVAL)
}

/// Attaches a loop device to a file, with direct I/O. The kernel detaches it when its last user
/// closes it.
pub(crate) fn loop_configure(device: &OwnedFd, file: &File, block_size: u32) -> nix::Result<()> {
    let config = ioctl::Config {
        fd: u32::try_from(file.as_raw_fd()).map_err(|_| Errno::EBADF)?,
        block_size,
        info: ioctl::Info::with_flags(ioctl::LO_FLAGS_AUTOCLEAR | ioctl::LO_FLAGS_DIRECT_IO),
        reserved: [0; 8],
    };
    // SAFETY: the call reads a live struct of the layout that the kernel expects.
    unsafe { ioctl::configure(device.as_raw_fd(), &raw const config) }?;
    Ok(())
}

/// Makes a loop device show the partitions in its content until it is detached.
pub(crate) fn loop_show_partitions(device: &File) -> nix::Result<()> {
    let mut info = ioctl::Info::with_flags(0);
    // SAFETY: the call fills a live struct of the layout that the kernel expects.
    unsafe { ioctl::get_status(device.as_raw_fd(), &raw mut info) }?;
    info.flags |= ioctl::LO_FLAGS_PARTSCAN;
    // SAFETY: the call reads a live struct of the layout that the kernel expects.
    unsafe { ioctl::set_status(device.as_raw_fd(), &raw const info) }?;
    Ok(())
}

/// Detaches a loop device from its file, at once or when its last user closes it.
pub(crate) fn loop_clear(device: &OwnedFd) -> nix::Result<()> {
    // SAFETY: the call takes no argument.
    unsafe { ioctl::clear(device.as_raw_fd()) }?;
    Ok(())
}
