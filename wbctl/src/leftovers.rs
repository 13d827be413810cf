//! What a daemon that was killed leaves behind: its link, its socket, its run folder, and, while somebody holds it, its
//! loop device, which fails and goes away by itself when it is released.

use crate::apart::holders;
use crate::place::Name;
use anyhow::{Result, bail};
use libwb::cli::Output;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Loop devices of the volume that outlived the daemon that served them. To be called while no daemon runs.
fn orphans(name: &Name) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/class/block").into_iter().flatten().flatten() {
        let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if file.trim_end() == format!("/{}", name.served_file()) {
            found.push(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    found.sort();
    found
}

fn describe(orphan: &Path) -> String {
    let held = match holders(orphan) {
        held if held.is_empty() => "held by another program".into(),
        held => held.join(", "),
    };
    format!("{} of an earlier daemon is still {held}: it only fails; release it", orphan.display())
}

/// Says what an earlier daemon has left that only others can release.
pub(crate) fn warn(name: &Name) {
    for orphan in orphans(name) {
        tracing::warn!("{}", describe(&orphan));
    }
}

/// Clears what a killed daemon has left behind.
pub(crate) fn clear(name: &Name, out: &mut Output) -> Result<()> {
    let orphans = orphans(name);
    let Some(lock) = name.lock()? else { bail!("volume '{name}' is being attached") };
    if !name.clear(lock)? && orphans.is_empty() {
        bail!("volume '{name}' is not attached, and nothing was left behind; see wbctl list");
    }
    writeln!(out, "cleared what a daemon of '{name}' had left behind")?;
    for orphan in orphans {
        writeln!(out, "{}", describe(&orphan))?;
    }
    Ok(())
}
