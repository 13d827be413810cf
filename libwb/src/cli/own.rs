//! Files that control a program: wb trusts only those of root and of its own user.

use super::text::read_at_most;
use nix::unistd::{Uid, geteuid};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Refuses a file that another user owns or may change.
///
/// # Errors
/// Tells what is wrong with the file, and what to do.
pub fn refuse_others(path: &Path, meta: &Metadata) -> io::Result<()> {
    let shown = path.display();
    let refused = |why: String| Err(io::Error::new(ErrorKind::PermissionDenied, why));
    let owner = Uid::from_raw(meta.uid());
    if !owner.is_root() && owner != geteuid() {
        return refused(format!(
            "refused: it belongs to user {owner}, who could use it to control wb. If you trust \
             it: chown root {shown}"
        ));
    }
    if meta.mode() & 0o022 != 0 {
        return refused(format!(
            "refused: others may change it (mode {:o}). If you trust it: chmod go-w {shown}",
            meta.mode() & 0o7777
        ));
    }
    Ok(())
}

/// Opens a file, but follows no symbolic link, and does not block, for example on a FIFO.
///
/// # Errors
/// As [`OpenOptions::open`], with a clear message for a link.
pub fn open_no_link(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK).open(path).map_err(|e| {
        match e.raw_os_error() {
            Some(nix::libc::ELOOP) => io::Error::new(
                ErrorKind::InvalidInput,
                "refused: it is a symbolic link, and wb follows none here",
            ),
            _ => e,
        }
    })
}

/// Reads the record of a volume. wb trusts its contents, so it must be a regular file of root or of
/// this user.
///
/// # Errors
/// When it cannot be read, is not UTF-8, is longer than `most` bytes, or is not trusted.
pub fn read_own(path: &Path, most: u64) -> io::Result<String> {
    let file = open_no_link(path, OpenOptions::new().read(true))?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "refused: it is not a regular file"));
    }
    refuse_others(path, &meta)?;
    read_at_most(file, most)
}
