//! Notes about caches: how far the log of each had come when wb last saw it. They reveal an older
//! copy of a cache.
//!
//! There is a file for each cache that has an identity, in a folder that survives a reboot. A note
//! says nothing that a power cut may undo. If a note cannot be read or written, only this
//! protection is lost, never the volume.

use crate::config::RecordedVolume;
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, bail, ensure};
use libwb::cache::Cache;
use libwb::cli::{LAST_SECOND, VolumeDevices, read_text};
use libwb::device::Place;
use libwb::folders::state_dir;
use libwb::format::SegmentId;
use libwb::log::reach::{Reach, Seen};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The version of the notes that is written.
const VERSION: u32 = 1;
/// The longest note that is read, in bytes.
const MAX_NOTE: u64 = 64 << 10;
const SUFFIX: &str = ".json";

/// A cache as wb last saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    version: u32,
    pub(crate) uuid: String,
    pub(crate) generation: u64,
    durable: u64,
    written_back: u64,
    /// As far as wb knows, nothing was written to the cache after that.
    closed: bool,
    /// The name of the attached volume; none after a replay.
    volume: Option<String>,
    cache: PathBuf,
    backing: Place,
    /// In seconds since 1970.
    time: u64,
}

/// The volume and the devices that a noted cache belongs to.
pub(crate) struct About {
    pub(crate) volume: Option<String>,
    pub(crate) cache: PathBuf,
    pub(crate) backing: Place,
}

impl About {
    /// An attached volume.
    pub(crate) fn of(name: &VolumeName, volume: &RecordedVolume) -> About {
        About {
            volume: Some(name.to_string()),
            cache: volume.cache.clone(),
            backing: volume.backing.clone(),
        }
    }
}

impl Note {
    fn new(seen: Seen, about: &About, closed: bool) -> Note {
        // Bytes that are not UTF-8 are replaced.
        let text = |path: &Path| path.to_string_lossy().into_owned().into();
        Note {
            version: VERSION,
            uuid: seen.uuid.to_string(),
            generation: seen.generation,
            durable: seen.reach.durable.0,
            written_back: seen.reach.written_back.0,
            closed,
            volume: about.volume.clone(),
            cache: text(&about.cache),
            backing: match &about.backing {
                Place::Path(path) => Place::Path(text(path)),
                export => export.clone(),
            },
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        }
    }

    pub(crate) fn reach(&self) -> Reach {
        Reach { durable: SegmentId(self.durable), written_back: SegmentId(self.written_back) }
    }

    /// Whether the cache may have held dirty data after wb last saw it.
    pub(crate) fn may_be_dirty(&self) -> bool {
        !self.closed || self.durable > self.written_back
    }

    /// When wb last saw the cache, and as which device and volume.
    pub(crate) fn when(&self) -> String {
        let time = UNIX_EPOCH + Duration::from_secs(self.time.min(LAST_SECOND));
        let time = humantime::format_rfc3339_seconds(time);
        let cache = self.cache.display().to_string();
        match &self.volume {
            Some(volume) => {
                format!("{time}, as {} of volume '{}'", cache.escape_debug(), volume.escape_debug())
            }
            None => format!("{time}, as {}", cache.escape_debug()),
        }
    }

    /// The note about a cache; none if wb has never seen it.
    pub(crate) fn load(uuid: &str) -> Result<Option<Note>> {
        let Some(path) = file_of(uuid) else { return Ok(None) };
        match Note::read(&path) {
            Err(e)
                if e.downcast_ref::<io::Error>()
                    .is_some_and(|e| e.kind() == ErrorKind::NotFound) =>
            {
                Ok(None)
            }
            Ok(note) if note.uuid != uuid => bail!("{}: is about another cache", path.display()),
            note => note.map(Some).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// The newest note about the cache of a recorded volume, found by its path.
    pub(crate) fn of(volume: &VolumeDevices) -> Option<Note> {
        let entries = std::fs::read_dir(state_dir()?).ok()?;
        let notes = entries.flatten().map(|entry| entry.path());
        let notes = notes.filter(|path| path.to_string_lossy().ends_with(SUFFIX));
        let notes = notes.filter_map(|path| Note::read(&path).ok());
        let about_it = |note: &Note| note.cache == volume.cache && note.backing == volume.backing;
        notes.filter(about_it).max_by_key(|note| note.time)
    }

    fn read(path: &Path) -> Result<Note> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let text = read_text(path, MAX_NOTE)?;
        let Versioned { version } = serde_json::from_str(&text)?;
        ensure!(version <= VERSION, "it was written by a newer version of wb");
        Ok(serde_json::from_str(&text)?)
    }

    /// Replaces the note about this cache atomically: after a crash, it is the old one or the new
    /// one.
    fn save(&self) -> io::Result<()> {
        let (Some(folder), Some(path)) = (state_dir(), file_of(&self.uuid)) else { return Ok(()) };
        DirBuilder::new().recursive(true).mode(0o755).create(&folder)?;
        let new = path.with_extension("new");
        let written = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            std::fs::rename(&new, &path)?;
            File::open(&folder)?.sync_all()
        })();
        if written.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        written
    }
}

/// Notes how far a cache has come, if it has an identity. An ordinary user who may not write notes
/// leaves none.
pub(crate) fn note(cache: &Cache, about: &About, closed: bool) -> Result<()> {
    let Some(seen) = cache.seen() else { return Ok(()) };
    match Note::new(seen, about, closed).save() {
        Err(e) if e.kind() == ErrorKind::PermissionDenied && !geteuid().is_root() => Ok(()),
        saved => saved.with_context(|| {
            let folder = state_dir().unwrap_or_default();
            format!(
                "cannot note in {} how far the cache has come: an older copy of it would go \
                 unnoticed",
                folder.display()
            )
        }),
    }
}

fn file_of(uuid: &str) -> Option<PathBuf> {
    Some(state_dir()?.join(format!("{uuid}{SUFFIX}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note() -> Note {
        Note {
            version: VERSION,
            uuid: "6d3c2f52-7bb5-4a5e-9d3f-0123456789ab".into(),
            generation: u64::MAX,
            durable: 12,
            written_back: 9,
            closed: true,
            volume: Some("data".into()),
            cache: "/dev/c".into(),
            backing: "/dev/b".into(),
            time: 1_790_000_000,
        }
    }

    /// Reads a note that is written there.
    fn read(text: &[u8]) -> Result<Note> {
        let name = format!("wb-note-{}-{:?}", std::process::id(), std::thread::current().id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        let note = Note::read(&path);
        std::fs::remove_file(&path).unwrap();
        note
    }

    #[test]
    fn a_note_is_read_as_it_was_written_and_what_else_it_says_is_left_out() {
        let mut json = serde_json::to_value(note()).unwrap();
        assert_eq!(read(json.to_string().as_bytes()).unwrap(), note());
        json["colour"] = "green".into();
        assert_eq!(read(json.to_string().as_bytes()).unwrap(), note());
    }

    #[test]
    fn a_note_that_makes_no_sense_is_an_error_that_says_why() {
        let why = |text: &[u8]| format!("{:#}", read(text).unwrap_err());
        assert_eq!(why(br#"{"version": 2, "uuid": 7}"#), "it was written by a newer version of wb");
        assert!(why(br#"{"version": 1, "uuid": "x"}"#).starts_with("missing field"));
        assert!(why(br#"{"version": -1}"#).starts_with("invalid value"));
        assert_eq!(why(&vec![b' '; 100_000]), "longer than 65536 bytes");
        for garbage in [&b""[..], b"\0\0", b"\xff\xfe", b"[[[[", &[b'['; 60_000]] {
            assert!(read(garbage).is_err());
        }
        assert!(Note::read(Path::new("/dev/zero")).is_err());
    }

    #[test]
    fn a_cache_may_be_dirty_unless_it_was_closed_with_all_written_back() {
        assert!(note().may_be_dirty());
        assert!(!Note { written_back: 12, ..note() }.may_be_dirty());
        assert!(Note { written_back: 12, closed: false, ..note() }.may_be_dirty());
    }

    #[test]
    fn what_a_note_says_is_shown_without_what_would_move_the_cursor() {
        assert_eq!(note().when(), "2026-09-21T14:13:20Z, as /dev/c of volume 'data'");
        let odd = Note { cache: "/\x1b[2J".into(), volume: None, time: u64::MAX, ..note() };
        assert_eq!(odd.when(), "9999-12-31T23:59:59Z, as /\\u{1b}[2J");
    }
}
