//! Texts of bounded length.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// Reads a text file, or a pipe, of at most `most` bytes.
///
/// # Errors
/// When it cannot be read, is not UTF-8, or is longer.
pub fn read_text(path: &Path, most: u64) -> io::Result<String> {
    read_at_most(File::open(path)?, most)
}

/// The same for a file that is open already.
pub(super) fn read_at_most(file: File, most: u64) -> io::Result<String> {
    let mut text = String::new();
    file.take(most + 1).read_to_string(&mut text)?;
    if text.len() as u64 > most {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("longer than {most} bytes")));
    }
    Ok(text)
}
