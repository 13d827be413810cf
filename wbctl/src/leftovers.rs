//! What a killed daemon leaves behind: its link, its socket and its run folder. While a program
//! holds its loop device, that remains, too: all I/O to it fails, and it disappears when it is
//! released.

use crate::holders::holders;
use crate::serving;
use crate::volume_paths::VolumeName;
use anyhow::{Result, bail};
use libwb::cli::Output;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What is left of a daemon. Look for it only while no daemon runs.
pub(crate) struct Leftovers {
    /// It has not removed its files: it was killed.
    pub(crate) has_crashed: bool,
    /// Loop devices of the volume that outlived their daemon.
    orphans: Vec<PathBuf>,
}

impl Leftovers {
    pub(crate) fn of(name: &VolumeName) -> Leftovers {
        let has_crashed = name.socket().symlink_metadata().is_ok();
        let mut orphans = Vec::new();
        for entry in std::fs::read_dir("/sys/class/block").into_iter().flatten().flatten() {
            let file =
                std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            if file.trim_end() == format!("/{}", name.served_file()) {
                orphans.push(PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        orphans.sort();
        Leftovers { has_crashed, orphans }
    }

    /// A message about the leftovers, if there are any.
    pub(crate) fn message(&self) -> Option<String> {
        let killed = "its daemon was killed; attach it again, or clear what is left with wbctl \
                      detach --force";
        let killed = self.has_crashed.then(|| killed.to_string());
        let said: Vec<String> = killed.into_iter().chain(self.held()).collect();
        (!said.is_empty()).then(|| said.join("; "))
    }

    /// The loop devices that only their users can release, one sentence each.
    fn held(&self) -> impl Iterator<Item = String> {
        self.orphans.iter().map(|orphan| describe(orphan))
    }
}

fn describe(orphan: &Path) -> String {
    let held = match holders(orphan) {
        held if held.is_empty() => "held by another program".into(),
        held => held.join(", "),
    };
    format!(
        "{} of an earlier daemon is still {held}: all I/O to it fails; release it",
        orphan.display()
    )
}

/// Logs the leftovers of an earlier daemon that only their users can release.
pub(crate) fn warn(name: &VolumeName) {
    for held in Leftovers::of(name).held() {
        tracing::warn!("{held}");
    }
}

/// Clears what a killed daemon left behind.
pub(crate) fn clear(name: &VolumeName, out: &mut Output) -> Result<()> {
    let left = Leftovers::of(name);
    let Some(lock) = name.lock()? else { bail!("volume '{name}' is being attached") };
    serving::remove_dead(name);
    if !name.clear(lock)? && left.orphans.is_empty() {
        bail!("volume '{name}' is not attached, and nothing was left behind; see wbctl list");
    }
    writeln!(out, "cleared what a daemon of '{name}' had left behind")?;
    for held in left.held() {
        writeln!(out, "{held}")?;
    }
    Ok(())
}
