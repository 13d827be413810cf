//! How the kernel treats this process.

use nix::errno::Errno;
use rustix::process::{configure_io_flusher_behavior, is_io_flusher};

/// Makes a write beyond the file size limit (`ulimit -f`) fail instead of ending the process.
#[cfg(feature = "cli")]
#[allow(unsafe_code)] // installing a signal handler
pub(crate) fn ignore_file_size_signal() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: the signal is ignored, so no handler runs; this process installs none for it.
    let _ = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
}

/// Tells the kernel that memory reclaim may wait for I/O that this thread serves. Threads that it
/// starts inherit this.
pub(crate) fn set_io_flusher() -> nix::Result<()> {
    let to_nix = |error: rustix::io::Errno| Errno::from_raw(error.raw_os_error());
    configure_io_flusher_behavior(true).map_err(to_nix)?;
    match is_io_flusher().map_err(to_nix)? {
        true => Ok(()),
        // A sandbox may accept the call without any effect.
        false => Err(Errno::ENOTSUP),
    }
}
