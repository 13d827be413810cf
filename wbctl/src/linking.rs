//! The stable name of a volume's block device.

use crate::volume_paths::VolumeName;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Makes a stable name for the block device. udev makes the same link (dist/udev), but udev may not
/// be running. The volume works without it.
pub(crate) fn link(name: &VolumeName, device: &Path) {
    let link = name.link();
    // In one step, so that a link to the previous device never vanishes in between.
    let new = link.with_file_name(format!(".{name}"));
    let _ = std::fs::remove_file(&new);
    let folder = link.parent().unwrap_or(&link);
    let made = std::fs::create_dir_all(folder)
        // Readable for all users, whatever the umask.
        .and_then(|()| std::fs::set_permissions(folder, Permissions::from_mode(0o755)))
        .and_then(|()| std::os::unix::fs::symlink(device, &new))
        .and_then(|()| std::fs::rename(&new, &link));
    if let Err(e) = made {
        tracing::warn!("cannot make the link {}: {e}", link.display());
    }
    unlink_others(&link, device);
}

/// Removes the links of other volumes to this device. Their daemons were killed, and the device
/// used to be theirs.
fn unlink_others(own: &Path, device: &Path) {
    for entry in
        own.parent().and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten().flatten()
    {
        let link = entry.path();
        if link != own && std::fs::canonicalize(&link).is_ok_and(|to| to == device) {
            tracing::warn!(
                "removed {}: it belonged to a daemon that was killed, and would lead to this \
                 volume",
                link.display()
            );
            let _ = std::fs::remove_file(&link);
        }
    }
}
