//! The record of a volume: a TOML file in the configuration folder.

use crate::front_end::FrontEnd;
use crate::sector_size;
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, anyhow, bail};
use libwb::cache::{TunableValue, Tunables};
use libwb::cli::{MAX_RECORD, VolumeDevices, read_own};
use libwb::device::Place;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;
use toml_edit::DocumentMut;

/// The mode of a record: its owner writes, all users read.
const MODE: u32 = 0o644;

/// The record of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecordedVolume {
    /// The cache device.
    pub(crate) cache: PathBuf,
    /// The backing device.
    pub(crate) backing: Place,
    /// How the volume is served.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) serve: FrontEnd,
    /// Whether NBD without TLS is allowed with other hosts, at the recorded addresses.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) insecure: bool,
    /// Logical sector size of the block device in bytes. If absent, the backing device determines
    /// it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sector_size: Option<u32>,
    /// Tunables that differ from their defaults.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) tunables: BTreeMap<String, TunableValue>,
}

impl RecordedVolume {
    /// Reads the record of a volume; `None` when there is none.
    pub(crate) fn load(name: &VolumeName) -> Result<Option<RecordedVolume>> {
        let path = name.config_file();
        let text = match read_own(&path, MAX_RECORD) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        let volume: RecordedVolume = toml::from_str(&text)
            .map_err(|e| anyhow!("{}: {}", path.display(), one_line(&e, &text)))?;
        volume.tunables().with_context(|| path.display().to_string())?;
        for device in std::iter::once(volume.cache.as_path()).chain(volume.backing.path()) {
            refuse_nul(device).with_context(|| path.display().to_string())?;
        }
        if let Some(size) = volume.sector_size {
            let checked = sector_size::parse(&size.to_string()).map_err(anyhow::Error::msg);
            checked.with_context(|| format!("{}: sector_size = {size}", path.display()))?;
        }
        Ok(Some(volume))
    }

    /// Writes the record of a new volume.
    pub(crate) fn save_new(&self, name: &VolumeName) -> Result<()> {
        self.prepare(name)?.save()
    }

    /// Writes the record of a new volume under a temporary name. Every step that can fail for lack
    /// of space or rights is done then, except the final rename.
    pub(crate) fn prepare(&self, name: &VolumeName) -> Result<NewRecord> {
        let path = name.config_file();
        let cannot = || format!("cannot record the volume in {}", path.display());
        let text = toml::to_string(self).with_context(cannot)?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot make the folder {}", dir.display()))?;
        }
        let file = written(&path, &text, Permissions::from_mode(MODE)).with_context(cannot)?;
        Ok(NewRecord { name: name.clone(), file })
    }

    /// The tunables to attach with: the defaults, and what is recorded.
    pub(crate) fn tunables(&self) -> Result<Tunables> {
        let mut tunables = Tunables::default();
        for (key, value) in &self.tunables {
            tunables.set(key, &value.to_string())?;
        }
        tunables.check()?;
        Ok(tunables)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Refuses a path that no file can have.
pub(crate) fn refuse_nul(device: &Path) -> Result<()> {
    let text = device.to_string_lossy();
    if text.contains('\0') {
        bail!("\"{}\" is not the path of a device: it contains a NUL", text.escape_debug());
    }
    Ok(())
}

/// Refuses a name that is taken.
pub(crate) fn refuse_recorded(name: &VolumeName) -> Result<()> {
    let record = name.config_file();
    if record.exists() {
        bail!(
            "volume '{name}' exists already: it is recorded in {}; to give it up, first run: \
             wbctl remove {name}",
            record.display()
        );
    }
    Ok(())
}

/// Refuses a device that belongs to another recorded volume. Otherwise the data in that volume's
/// cache would be lost, or would later overwrite this volume.
pub(crate) fn refuse_shared(volume: &RecordedVolume) -> Result<()> {
    for other in VolumeDevices::all()? {
        let shared = if other.has(&volume.cache) {
            volume.cache.display().to_string()
        } else if other.holds(&volume.backing) {
            volume.backing.to_string()
        } else {
            continue;
        };
        bail!(
            "{shared}: belongs to the volume '{0}'; to give that up, first run: wbctl remove {0}",
            other.name
        );
    }
    Ok(())
}

/// The error for a volume that is not recorded.
pub(crate) fn not_recorded(name: &VolumeName) -> anyhow::Error {
    anyhow!(
        "no volume '{name}' is recorded in {}; see wbctl list and wbctl create",
        name.config_file().display()
    )
}

/// The error for a volume that is neither attached nor recorded.
pub(crate) fn unknown(name: &VolumeName) -> anyhow::Error {
    anyhow!("no volume '{name}' is attached or recorded; see wbctl list")
}

/// Reads KEY=VALUE pairs, and returns what to record.
pub(crate) fn parse_tunables(pairs: &[String]) -> Result<BTreeMap<String, TunableValue>> {
    let mut tunables = Tunables::default();
    for pair in pairs {
        tunables.set_pair(pair)?;
    }
    tunables.check()?;
    let names: Vec<&str> = pairs
        .iter()
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, _)| Tunables::name_of(key))
        .collect();
    let given = |key: &str| names.contains(&key);
    Ok(tunables
        .pairs()
        .filter(|(key, _)| given(key))
        .map(|(key, value)| (key.into(), value))
        .collect())
}

/// The record of a volume with new values of tunables; everything else in it stays as it was.
pub(crate) fn edited(
    name: &VolumeName,
    tunables: &BTreeMap<String, TunableValue>,
) -> Result<String> {
    RecordedVolume::load(name)?.ok_or_else(|| not_recorded(name))?;
    let path = name.config_file();
    let cannot = || format!("cannot change {}", path.display());
    let mut record: DocumentMut =
        read_own(&path, MAX_RECORD).map_err(anyhow::Error::new)?.parse().with_context(cannot)?;
    // A table or an inline table; `load` accepts both.
    let table = record.entry("tunables").or_insert_with(toml_edit::table);
    let table = table.as_table_like_mut().with_context(cannot)?;
    for (key, value) in tunables {
        let new = match value {
            TunableValue::Number(number) => toml_edit::Value::from(i64::from(*number)),
            TunableValue::Word(word) => toml_edit::Value::from(word.as_str()),
        };
        match table.get_mut(key).and_then(toml_edit::Item::as_value_mut) {
            // Keeps the comments around the value.
            Some(old) => {
                let around = old.decor().clone();
                *old = new;
                *old.decor_mut() = around;
            }
            None => drop(table.insert(key, new.into())),
        }
    }
    Ok(record.to_string())
}

/// The record of a new volume, on the disk but not yet under its name. Dropping it deletes it.
pub(crate) struct NewRecord {
    name: VolumeName,
    file: NamedTempFile,
}

impl NewRecord {
    /// Gives the record its name, unless that is taken.
    pub(crate) fn save(self) -> Result<()> {
        let path = self.name.config_file();
        match self.file.persist_noclobber(&path) {
            Ok(_) => sync_folder_of(&path),
            Err(e) if e.error.kind() == ErrorKind::AlreadyExists => {
                refuse_recorded(&self.name)?;
                Err(e.error)
            }
            Err(e) => Err(e.error),
        }
        .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Replaces a file atomically: after a crash, it is the old file or the new one.
pub(crate) fn replace(path: &Path, text: &str) -> Result<()> {
    let replaced = (|| {
        let new = written(path, text, std::fs::metadata(path)?.permissions())?;
        new.persist(path).map_err(|e| e.error)?;
        sync_folder_of(path)
    })();
    replaced.map_err(|e: io::Error| {
        anyhow::Error::new(e).context(format!("cannot write {}", path.display()))
    })
}

/// A new, durable file beside this one. No volume's record can have its name.
fn written(path: &Path, text: &str, permissions: Permissions) -> io::Result<NamedTempFile> {
    let folder = path.parent().unwrap_or(path);
    let mut file = tempfile::Builder::new().prefix(".").suffix(".new").tempfile_in(folder)?;
    file.as_file().set_permissions(permissions)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    Ok(file)
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

/// A TOML error on one line, without its excerpt.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let before = error.span().map_or("", |span| &text[..span.start]);
    let line = before.matches('\n').count() + 1;
    format!("line {line}: {}", error.message().replace('\n', " "))
}
