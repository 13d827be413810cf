//! Makes the manual and the shell completions.
//!
//! Both come from the command lines that the programs parse. The folder of this file holds the
//! sections of the manual that are written by hand.

mod completions;
mod page;
mod program;

pub use completions::{SHELLS, completion};
pub use program::{Program, programs, with_verbs};

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// Writes all files below `folder`, laid out as they belong below `/usr/share`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: &Path) -> Result<()> {
    for mut program in programs() {
        let name = program.command.get_name().to_string();
        put(&folder.join(format!("man/man8/{name}.8")), &page::page(&program)?)?;
        for shell in SHELLS {
            let text = completions::completions(shell, &mut program.command)?;
            put(&folder.join(completion(shell, &name)), &text)?;
        }
    }
    put(&folder.join("man/man7/wb.7"), include_bytes!("wb.7"))
}

fn put(path: &Path, text: &[u8]) -> Result<()> {
    let folder = path.parent().context("a path without a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
