//! The names of volumes, and the folders and files that belong to each.

use anyhow::{Context, Result, bail};
use libwb::cli::{MAX_NAME, RECORD_SUFFIX, is_volume_name, open_no_link, refuse_others};
use libwb::control::SOCKET;
use libwb::folders::{config_dir, run_dir, run_dir_advice};
use libwb::serve::nbd::remove_abandoned;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// The file in which a daemon notes its block device.
const NOTE: &str = "device";
/// The file in which a daemon notes the Unix socket of its NBD server.
const NBD_NOTE: &str = "nbd";

/// How long the kernel may take to close the sockets of a server that was killed.
const LINGERING: Duration = Duration::from_secs(1);

/// A volume's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct VolumeName(String);

impl FromStr for VolumeName {
    type Err = String;

    fn from_str(text: &str) -> Result<VolumeName, String> {
        if !is_volume_name(text) {
            return Err(format!(
                "a volume name is 1 to {MAX_NAME} letters, digits, dots, dashes and underscores, \
                 and does not begin with '.' or '-'"
            ));
        }
        Ok(VolumeName(text.into()))
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl VolumeName {
    /// The default name of a volume: the file name of its cache device, if that is valid.
    pub(crate) fn of_device(device: &Path) -> Result<VolumeName> {
        let file = device.file_stem().unwrap_or_default().to_string_lossy();
        file.parse().map_err(|_| {
            anyhow::anyhow!(
                "{}: its file name is not a valid volume name; give a name",
                device.display()
            )
        })
    }

    /// The file that records the volume.
    pub(crate) fn config_file(&self) -> PathBuf {
        config_dir().join(format!("{self}{RECORD_SUFFIX}"))
    }

    /// The folder of a running daemon's files.
    fn run_dir(&self) -> PathBuf {
        run_dir().join(&self.0)
    }

    /// The daemon's control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir().join(SOCKET)
    }

    /// The link to the block device.
    pub(crate) fn link(&self) -> PathBuf {
        Path::new("/dev/wb").join(&self.0)
    }

    /// The backing file of the loop device, as sysfs and udev see it: at the root of a mount that
    /// no other process sees.
    pub(crate) fn served_file(&self) -> String {
        format!("{self}.wb")
    }

    /// The file that names the daemon's block device. udev's rule reads it before it names a device
    /// after the volume, because any user may attach a file of the same name to a loop device.
    fn note(&self) -> PathBuf {
        self.run_dir().join(NOTE)
    }

    /// Notes which block device the daemon will have.
    pub(crate) fn note_device(&self, device: &Path) -> std::io::Result<()> {
        let name = device.file_name().unwrap_or_default().to_string_lossy();
        std::fs::write(self.note(), format!("{name}\n"))
    }

    /// The block device that a daemon noted.
    pub(crate) fn noted_device(&self) -> Option<PathBuf> {
        let note = std::fs::read_to_string(self.note()).ok()?;
        Some(Path::new("/dev").join(note.trim_end()))
    }

    /// The volume whose daemon lives, and has noted this block device.
    pub(crate) fn serving(device: &Path) -> Option<VolumeName> {
        let names = std::fs::read_dir(run_dir()).ok()?.flatten();
        names
            .filter_map(|entry| entry.file_name().to_str()?.parse::<VolumeName>().ok())
            .filter(|name| name.noted_device().as_deref() == Some(device))
            .find(|name| name.is_running().unwrap_or(false))
    }

    fn nbd_note(&self) -> PathBuf {
        self.run_dir().join(NBD_NOTE)
    }

    /// Notes the Unix socket that the daemon's NBD server will listen on.
    pub(crate) fn note_nbd_socket(&self, socket: &Path) -> std::io::Result<()> {
        std::fs::write(self.nbd_note(), socket.as_os_str().as_bytes())
    }

    /// Removes the Unix socket of an NBD server that has ended. Returns whether there was one.
    fn remove_nbd_socket(&self) -> std::io::Result<bool> {
        let noted = match std::fs::read(self.nbd_note()) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            noted => noted?,
        };
        let (socket, started) = (Path::new(OsStr::from_bytes(&noted)), Instant::now());
        let removed = loop {
            let removed = remove_abandoned(socket)?;
            if removed || !socket.exists() || started.elapsed() > LINGERING {
                break removed;
            }
            std::thread::sleep(LINGERING / 50);
        };
        std::fs::remove_file(self.nbd_note())?;
        Ok(removed)
    }

    /// Removes what a daemon shows to others while its volume can be used. Ignores files that it
    /// cannot remove.
    pub(crate) fn withdraw(&self) {
        let _ = self.remove_nbd_socket();
        for file in [self.link(), self.note(), self.socket()] {
            let _ = std::fs::remove_file(file);
        }
    }

    fn lock_file(&self) -> PathBuf {
        self.run_dir().join("lock")
    }

    /// Takes the lock that a daemon holds as long as it lives; `None` if a daemon holds it. Creates
    /// the folder.
    pub(crate) fn lock(&self) -> Result<Option<Flock<File>>> {
        self.lock_by(FlockArg::LockExclusiveNonblock)
    }

    fn lock_by(&self, how: FlockArg) -> Result<Option<Flock<File>>> {
        let dir = self.run_dir();
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).with_context(|| {
            format!("cannot make the folder {} ({})", dir.display(), run_dir_advice())
        })?;
        refuse_foreign_folder(&dir)?;
        let path = self.lock_file();
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = open_no_link(&path, &mut options)
            .and_then(|file| refuse_others(&path, &file.metadata()?).map(|()| file))
            .with_context(|| format!("cannot open {}", path.display()))?;
        match Flock::lock(file, how) {
            // Another process may have held the lock and deleted its file, and a third may have
            // created a new one.
            Ok(lock) if !is_file_at(&lock, &path) => self.lock_by(how),
            Ok(lock) => Ok(Some(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, cause)) => bail!("cannot lock {}: {}", path.display(), cause.desc()),
        }
    }

    /// Removes all files of a daemon that does not run; `lock` is its lock. True if the daemon had
    /// not removed them itself.
    pub(crate) fn clear(&self, lock: Flock<File>) -> Result<bool> {
        let mut was_left =
            self.remove_nbd_socket().context("cannot remove the socket of its NBD server")?;
        // Only root makes links. One may lead to another volume of that name.
        let link = geteuid().is_root().then(|| self.link());
        for file in link.into_iter().chain([self.note(), self.socket()]) {
            was_left |= remove(&file)?;
        }
        remove(&self.lock_file())?;
        drop(lock);
        // Another daemon may be starting; then the folder is not empty.
        let _ = std::fs::remove_dir(self.run_dir());
        Ok(was_left)
    }

    /// Whether a daemon runs for this volume.
    pub(crate) fn is_running(&self) -> Result<bool> {
        let path = self.lock_file();
        // An ordinary user may not look, and must not be told that no daemon runs.
        let is_there = path.try_exists().with_context(|| {
            format!(
                "cannot tell whether '{self}' is attached: cannot look for {} ({})",
                path.display(),
                run_dir_advice()
            )
        })?;
        // A shared lock: two processes that check at the same time must not take each other for a
        // daemon.
        Ok(is_there && self.lock_by(FlockArg::LockSharedNonblock)?.is_none())
    }
}

/// Refuses a run folder in which another user could put a socket or a lock.
fn refuse_foreign_folder(dir: &Path) -> Result<()> {
    let refused = || format!("cannot use the folder {}", dir.display());
    let meta = std::fs::symlink_metadata(dir).with_context(refused)?;
    if !meta.is_dir() {
        bail!("{}: it is not a folder; remove it", refused());
    }
    refuse_others(dir, &meta).with_context(refused)
}

fn is_file_at(file: &File, path: &Path) -> bool {
    let number =
        |meta: std::io::Result<std::fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
    number(file.metadata()) == number(std::fs::metadata(path))
}

/// Removes a file or a link; false when there was none.
fn remove(path: &Path) -> Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("cannot remove {}", path.display())),
    }
}

/// Names of all volumes that are recorded or have a run folder, sorted.
pub(crate) fn all_names() -> Result<Vec<VolumeName>> {
    let mut names: Vec<VolumeName> = Vec::new();
    for (dir, suffix) in [(config_dir(), RECORD_SUFFIX), (run_dir(), "")] {
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => {
                let who = if e.kind() == std::io::ErrorKind::PermissionDenied {
                    format!(" ({})", run_dir_advice())
                } else {
                    String::new()
                };
                return Err(e)
                    .with_context(|| format!("cannot read the folder {}{who}", dir.display()));
            }
        };
        for entry in entries {
            let file = entry?.file_name();
            names.extend(
                file.to_string_lossy().strip_suffix(suffix).and_then(|name| name.parse().ok()),
            );
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}
