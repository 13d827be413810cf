//! System calls and processor hints that neither std nor rustix offers as safe functions.
//!
//! All `unsafe` of this crate is here and in the reactor.

mod block_device;
mod loop_device;
mod memory;
mod process;

pub(crate) use block_device::{
    block_device_size, direct_io_alignment, is_read_only, logical_block_size,
};
pub(crate) use loop_device::{loop_clear, loop_configure, loop_get_free, loop_show_partitions};
pub(crate) use memory::{keep_freed_memory, prefer_huge_pages, prefetch_to_write};
#[cfg(feature = "cli")]
pub(crate) use process::ignore_file_size_signal;
pub(crate) use process::set_io_flusher;
