//! System calls and processor hints that neither std nor rustix offers as safe functions.
//!
//! All `unsafe` of this crate is here and in the reactor.

#[cfg(feature = "uring")]
mod block_device;
#[cfg(feature = "engine")]
mod boot;
#[cfg(feature = "uring")]
#[cfg_attr(not(feature = "serve-ublk"), allow(dead_code, reason = "for ublk alone"))]
mod lazy_buffer;
#[cfg(feature = "serve-loop")]
mod loop_device;
mod memory;
#[cfg(feature = "serve")]
mod process;
#[cfg(feature = "engine")]
mod shared_memory;
#[cfg(feature = "serve-ublk")]
mod ublk;

#[cfg(feature = "serve-loop")]
pub(crate) use block_device::allow_writes;
#[cfg(feature = "uring")]
pub(crate) use block_device::{
    block_device_size, direct_io_alignment, is_read_only, logical_block_size,
};
#[cfg(feature = "engine")]
pub(crate) use boot::boot_id;
#[cfg(feature = "uring")]
pub(crate) use lazy_buffer::LazyBuffer;
#[cfg(feature = "serve-loop")]
pub(crate) use loop_device::{loop_clear, loop_configure, loop_get_free, loop_show_partitions};
#[cfg(feature = "uring")]
pub(crate) use memory::keep_freed_memory;
#[cfg(feature = "engine")]
pub(crate) use memory::{prefer_huge_pages, prefetch_to_write};
#[cfg(feature = "cli")]
pub(crate) use process::ignore_file_size_signal;
#[cfg(feature = "serve")]
pub(crate) use process::set_io_flusher;
#[cfg(feature = "engine")]
pub(crate) use shared_memory::{Region, SharedMemory};
#[cfg(feature = "serve-ublk")]
pub(crate) use ublk::{
    CONTROL, Command, Control, Description, Descriptions, open_queue, submit_all,
};
