//! `wbctl get` and `wbctl set`: the tunables of a volume.

use crate::client;
use crate::config::{RecordedVolume, edited, parse_tunables, replace, unknown};
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result, bail};
use libwb::cache::{TunableValue, Tunables};
use libwb::cli::Output;
use libwb::control::by_name;
use std::collections::BTreeMap;
use std::io::Write;

#[derive(clap::Args)]
pub(crate) struct GetArgs {
    /// The volume
    name: VolumeName,
    /// Show only this tunable
    key: Option<String>,
    /// Print one JSON object instead of lines of KEY=VALUE
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct SetArgs {
    /// The volume
    name: VolumeName,
    /// The tunables to set: either all of them are set, or none
    #[arg(value_name = "KEY=VALUE", required = true)]
    tunables: Vec<String>,
    /// Record the tunables as well, for every later attach. Works on a detached volume, too
    #[arg(long)]
    save: bool,
}

pub(crate) fn get(args: &GetArgs, out: &mut Output) -> Result<()> {
    let mut tunables = in_force(&args.name)?;
    if let Some(key) = &args.key {
        let known = tunables.keys().cloned().collect::<Vec<_>>().join(", ");
        tunables.retain(|name, _| name == Tunables::name_of(key));
        if tunables.is_empty() {
            bail!("unknown tunable '{key}'; known: {known}");
        }
    }
    if args.json {
        out.json(&tunables)?;
        return Ok(());
    }
    for (key, value) in tunables {
        writeln!(out, "{key}={value}")?;
    }
    Ok(())
}

fn in_force(name: &VolumeName) -> Result<BTreeMap<String, TunableValue>> {
    if name.is_running()? {
        return client::tunables(name);
    }
    let volume = RecordedVolume::load(name)?.ok_or_else(|| unknown(name))?;
    Ok(by_name(&volume.tunables()?))
}

pub(crate) fn set(args: &SetArgs, out: &mut Output) -> Result<()> {
    let name = &args.name;
    let tunables = parse_tunables(&args.tunables)?;
    let is_running = name.is_running()?;
    if !is_running && !args.save {
        RecordedVolume::load(name)?.ok_or_else(|| unknown(name))?;
        bail!("volume '{name}' is not attached; with --save, it is recorded for the next attach");
    }
    // An error in the record must show before anything changes.
    let record = if args.save { Some(edited(name, &tunables)?) } else { None };
    if is_running {
        client::set(name, tunables.clone())?;
    }
    if let Some(text) = record {
        let what = if is_running { "it is set, but not recorded" } else { "it is not recorded" };
        replace(&name.config_file(), &text).context(what)?;
    }
    for (key, value) in tunables {
        writeln!(out, "{key}={value}")?;
    }
    Ok(())
}
