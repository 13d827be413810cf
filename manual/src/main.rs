//! Writes the man pages and the shell completions into a folder: `manual FOLDER`.

use anyhow::{Context, Result};
use std::path::PathBuf;

fn main() -> Result<()> {
    let folder: PathBuf = std::env::args_os().nth(1).context("usage: manual FOLDER")?.into();
    manual::write(&folder)
}
