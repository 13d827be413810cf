//! `wbctl import`: imports the volumes of the script `writeboost` of the kernel module.
//!
//! Its table has a line for each volume: the name of the device-mapper device, the backing device,
//! the cache device, and the module's options. Options have the form KEY=VALUE; commas, or commas
//! and blanks, separate them. Empty lines and lines that begin with `#` are ignored.

use crate::config::{RecordedVolume, refuse_nul, refuse_recorded, refuse_shared};
use crate::front_end::FrontEnd;
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, anyhow, bail};
use libwb::cache::{TunableValue, Tunables};
use libwb::cli::{Output, read_text};
use libwb::control::by_name;
use libwb::device::Place;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The longest table that is read, in bytes.
const MAX_TABLE: u64 = 1 << 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The table
    #[arg(default_value = "/etc/writeboosttab")]
    table: PathBuf,
    /// Show what would be recorded, and record nothing
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object per volume and line instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct ImportReport<'a> {
    name: String,
    cache: &'a Path,
    backing: &'a Place,
    tunables: &'a BTreeMap<String, TunableValue>,
    left_out: &'a [String],
    dry_run: bool,
}

/// A line of the table.
#[derive(Debug)]
struct Entry {
    name: VolumeName,
    volume: RecordedVolume,
    /// The options that were left out, and why.
    left_out: Vec<String>,
}

pub(crate) fn import(args: &Args, out: &mut Output) -> Result<()> {
    let entries = parse(&read(&args.table)?).with_context(|| args.table.display().to_string())?;
    if entries.is_empty() {
        bail!("{}: lists no volume", args.table.display());
    }
    for entry in &entries {
        let free = refuse_recorded(&entry.name).and_then(|()| refuse_shared(&entry.volume));
        free.map_err(|e| {
            let table = args.table.display();
            anyhow!(
                "{e:#}; or remove the line of '{}' from {table}. Nothing was imported",
                entry.name
            )
        })?;
    }
    if !args.dry_run {
        record_all(&entries)?;
    }
    if args.json {
        for Entry { name, volume, left_out } in &entries {
            let RecordedVolume { cache, backing, tunables, .. } = volume;
            let name = name.to_string();
            out.json(&ImportReport {
                name,
                cache,
                backing,
                tunables,
                left_out,
                dry_run: args.dry_run,
            })?;
        }
        return Ok(());
    }
    let done = if args.dry_run { "would import" } else { "imported" };
    for Entry { name, volume, left_out } in &entries {
        let (cache, backing) = (volume.cache.display(), &volume.backing);
        writeln!(out, "{done} '{name}': {backing} with the cache {cache}")?;
        for what in left_out {
            writeln!(out, "  left out: {what}")?;
        }
    }
    writeln!(
        out,
        "For each volume: unmount it; remove it from the kernel module (dmsetup remove NAME); \
         take its line out of {}; then start it here: wbctl attach NAME. It is then /dev/wb/NAME.",
        args.table.display()
    )?;
    Ok(())
}

/// All or none.
fn record_all(entries: &[Entry]) -> Result<()> {
    for (nth, entry) in entries.iter().enumerate() {
        if let Err(e) = entry.volume.save_new(&entry.name) {
            for recorded in &entries[..nth] {
                let _ = std::fs::remove_file(recorded.name.config_file());
            }
            return Err(e);
        }
    }
    Ok(())
}

fn read(table: &Path) -> Result<String> {
    read_text(table, MAX_TABLE).with_context(|| format!("cannot read {}", table.display()))
}

fn parse(text: &str) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut names = BTreeSet::new();
    for (line, number) in text.lines().map(str::trim).zip(1..) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let entry = parse_line(line).with_context(|| format!("line {number}"))?;
        if !names.insert(entry.name.clone()) {
            bail!("line {number}: the name '{}' appears twice", entry.name);
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn parse_line(line: &str) -> Result<Entry> {
    let mut fields = line.split_ascii_whitespace();
    let (Some(name), Some(backing), Some(cache)) = (fields.next(), fields.next(), fields.next())
    else {
        bail!("must be: NAME BACKING CACHE [OPTION,…]");
    };
    let options = fields.collect::<Vec<_>>().join(" ");
    for device in [backing, cache] {
        if !device.starts_with('/') {
            bail!("'{device}' is not the path of a device");
        }
        refuse_nul(Path::new(device))?;
    }
    let mut tunables = Tunables::default();
    let mut left_out = Vec::new();
    let mut set = BTreeSet::new();
    for option in options.split(',').map(str::trim).filter(|option| !option.is_empty()) {
        if let Some((_, more)) = option.split_once(' ') {
            bail!("'{more}' follows the options; must be: NAME BACKING CACHE [OPTION,…]");
        }
        let why = match option.split_once('=') {
            None | Some((_, "")) => "it has no value; must be KEY=VALUE".to_string(),
            Some((key, value)) => match tunables.set(key, value) {
                Ok(()) => {
                    set.insert(Tunables::name_of(key));
                    continue;
                }
                Err(e) => e.to_string(),
            },
        };
        left_out.push(format!("{option}: {why}"));
    }
    let mut tunables = by_name(&tunables);
    tunables.retain(|key, _| set.contains(key.as_str()));
    let name = name.parse().map_err(|why: String| anyhow!("'{name}': {why}"))?;
    let volume = RecordedVolume {
        serve: FrontEnd::default(),
        insecure: false,
        cache: cache.into(),
        backing: backing.into(),
        sector_size: None,
        tunables,
    };
    Ok(Entry { name, volume, left_out })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_makes_no_sense_is_named() {
        let why = |text: &str| format!("{:#}", parse(text).unwrap_err());
        assert_eq!(why("\n# x\na /b"), "line 3: must be: NAME BACKING CACHE [OPTION,…]");
        assert_eq!(
            why("a /b /c x=1 y"),
            "line 1: 'y' follows the options; must be: NAME BACKING CACHE [OPTION,…]"
        );
        assert_eq!(why("a /b c"), "line 1: 'c' is not the path of a device");
        let nul = why("a /b /c\0d");
        assert_eq!(nul, "line 1: \"/c\\0d\" is not the path of a device: it contains a NUL");
        assert!(why("a+b /b /c").starts_with("line 1: 'a+b': a volume name is"));
        assert_eq!(why("a /b /c\na /d /e"), "line 2: the name 'a' appears twice");
    }

    #[test]
    fn options_are_taken_or_told() {
        let entries =
            parse("  a\t/b /c nr_max_batched_writeback=8,,x=1,nr_max_batched_writeback,\n")
                .unwrap();
        assert_eq!(
            entries[0].volume.tunables,
            [("nr_max_batched_writeback".into(), libwb::cache::TunableValue::Number(8))].into()
        );
        let no_value = "nr_max_batched_writeback: it has no value; must be KEY=VALUE";
        assert_eq!(entries[0].left_out.len(), 2, "{entries:?}");
        assert_eq!(entries[0].left_out[1], no_value);
        assert_eq!(parse("a /b /c read_cache_threshold=").unwrap()[0].left_out.len(), 1);
    }

    #[test]
    fn options_may_have_blanks_after_and_before_their_commas() {
        for options in [
            "=8,writeback_threshold=9",
            "=8, writeback_threshold=9",
            "=8 ,\twriteback_threshold=9 ,",
        ] {
            let entries = parse(&format!("a /b /c nr_max_batched_writeback{options}")).unwrap();
            assert!(entries[0].left_out.is_empty(), "{entries:?}");
            assert_eq!(entries[0].volume.tunables.len(), 2, "{entries:?}");
        }
    }
}
