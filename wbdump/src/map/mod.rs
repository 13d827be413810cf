//! `wbdump map`: draws the log, and where its dirty blocks lie on the backing device.

mod layout;
mod svg;
mod terminal;

use crate::log::Log;
use anyhow::{Context, Result};
use layout::Map;
use libwb::cli::Output;
use std::path::Path;

pub(crate) fn show(log: &Log, svg: Option<&Path>, out: &mut Output) -> Result<()> {
    let (map, stopped) = Map::of(log);
    match svg {
        Some(path) => {
            svg::save(&map, path).with_context(|| format!("cannot write {}", path.display()))?
        }
        None => terminal::print(&map, out)?,
    }
    stopped.map_or(Ok(()), |error| Err(error).context("not all dirty blocks are shown"))
}
