//! The part of the volumes' records that every program needs: which devices belong to which volume.

use super::own::read_own;
use crate::device::{Place, is_same_device};
use crate::folders::config_dirs;
use serde::Deserialize;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The longest name of a volume, so that the path of its socket fits what the system allows.
pub const MAX_NAME: usize = 64;
/// The suffix of a record's file name, after the name of the volume.
pub const RECORD_SUFFIX: &str = ".toml";
/// The longest record that is read, in bytes.
pub const MAX_RECORD: u64 = 1 << 20;

/// A recorded volume and its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeDevices {
    /// The volume's name.
    pub name: String,
    /// The cache device.
    pub cache: PathBuf,
    /// The backing device.
    pub backing: Place,
}

impl VolumeDevices {
    /// All recorded volumes, by name: those of this user, and those of the system. Skips records
    /// and folders that it may not read.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn all() -> io::Result<Vec<VolumeDevices>> {
        let mut all: Vec<VolumeDevices> = Vec::new();
        for folder in config_dirs() {
            let entries = match std::fs::read_dir(folder) {
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
                    continue;
                }
                entries => entries?,
            };
            for entry in entries {
                all.extend(VolumeDevices::load(&entry?.path()));
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    fn load(path: &Path) -> Option<VolumeDevices> {
        #[derive(Deserialize)]
        struct Devices {
            cache: PathBuf,
            backing: Place,
        }
        let name = path.file_name()?.to_str()?.strip_suffix(RECORD_SUFFIX)?;
        if !is_volume_name(name) {
            return None;
        }
        let Devices { cache, backing } = toml::from_str(&read_own(path, MAX_RECORD).ok()?).ok()?;
        Some(VolumeDevices { name: name.into(), cache, backing })
    }

    /// Whether one of its two devices is this one.
    pub fn has(&self, device: &Path) -> bool {
        is_same_device(device, &self.cache) || self.backing.is_same(&device.into())
    }

    /// Whether one of its two devices is at this place.
    pub fn holds(&self, place: &Place) -> bool {
        match place {
            Place::Path(path) => self.has(path),
            Place::Export(_) => self.backing.is_same(place),
        }
    }
}

/// Whether this is a valid volume name. No valid name leads out of a folder.
pub fn is_volume_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=MAX_NAME).contains(&text.len()) && !text.starts_with(['.', '-']) && text.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_folder() {
        for bad in ["", "a/b", "..", ".hidden", "-x", "a b", "ä", &"x".repeat(65)] {
            assert!(!is_volume_name(bad), "{bad}");
        }
        for good in ["a", "disk-1.img", "A_b", &"x".repeat(64)] {
            assert!(is_volume_name(good), "{good}");
        }
    }

    #[test]
    fn a_record_names_its_devices_whatever_else_it_says_and_one_that_makes_no_sense_names_none() {
        let dir = std::env::temp_dir().join(format!("wb-recorded-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let load = |file: &str, text: &[u8]| {
            std::fs::write(dir.join(file), text).unwrap();
            VolumeDevices::load(&dir.join(file)).map(|it| (it.name, it.cache, it.backing))
        };
        let record = b"cache = \"/c\"\nbacking = \"/b\"\ncolour = 1\n";
        assert_eq!(load("data.toml", record), Some(("data".into(), "/c".into(), "/b".into())));
        for (file, text) in [
            ("data.toml.new", &record[..]),
            (".data.toml", record),
            ("data.toml", b"cache = \"/c\""),
            ("data.toml", b"\xff\xfe"),
            ("data.toml", &vec![b' '; 1 << 21]),
        ] {
            assert_eq!(load(file, text), None, "{file}");
        }
        let load = |file: &str| VolumeDevices::load(&dir.join(file));
        nix::unistd::mkfifo(&dir.join("pipe.toml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::create_dir(dir.join("folder.toml")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.join("zero.toml")).unwrap();
        assert_eq!([load("pipe.toml"), load("folder.toml"), load("zero.toml")], [None, None, None]);
        let why = read_own(&dir.join("pipe.toml"), MAX_RECORD).unwrap_err();
        assert_eq!(why.to_string(), "refused: it is not a regular file");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
