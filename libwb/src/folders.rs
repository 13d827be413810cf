//! The folders of wb: those of the system for root, and their own for any other user.

use nix::unistd::geteuid;
use std::path::{Path, PathBuf};

/// The folder with the records of the system's volumes.
const OF_SYSTEM: &str = "/etc/wb";

/// The folder with the system's running daemons.
const RUN_OF_SYSTEM: &str = "/run/wb";

/// The value of a variable that names a folder.
fn told(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

/// The folder of an ordinary user, by a variable of the XDG base directories, or else below HOME.
fn own(variable: &str, below_home: Option<&str>) -> Option<PathBuf> {
    if geteuid().is_root() {
        return None;
    }
    // The specification says that others are to be ignored.
    let absolute = |folder: &PathBuf| folder.is_absolute();
    let base = told(variable).filter(absolute);
    let base = base.or_else(|| Some(told("HOME").filter(absolute)?.join(below_home?)));
    base.map(|base| base.join("wb"))
}

/// The folder with a folder for each running daemon.
pub fn run_dir() -> PathBuf {
    let chosen = told("WB_RUN_DIR").or_else(|| own("XDG_RUNTIME_DIR", None));
    chosen.unwrap_or_else(|| RUN_OF_SYSTEM.into())
}

/// Whether this user sees other volumes than those of the system, and the system may have some.
pub fn are_own() -> bool {
    let of_system = Path::new(RUN_OF_SYSTEM);
    told("WB_RUN_DIR").is_none() && run_dir() != of_system && of_system.exists()
}

/// What a user who may not use the run folder can do.
pub fn run_dir_advice() -> &'static str {
    match geteuid().is_root() || told("WB_RUN_DIR").is_some() {
        true => "root is needed",
        false => "set XDG_RUNTIME_DIR or WB_RUN_DIR to a folder of your own",
    }
}

/// The folder with the records.
pub fn config_dir() -> PathBuf {
    let chosen = told("WB_CONFIG_DIR").or_else(|| own("XDG_CONFIG_HOME", Some(".config")));
    chosen.unwrap_or_else(|| OF_SYSTEM.into())
}

/// All folders with records that this user should know of: devices of the system's volumes are in
/// use for an ordinary user, too.
pub fn config_dirs() -> Vec<PathBuf> {
    let own = config_dir();
    let of_system = Path::new(OF_SYSTEM);
    let has_other = told("WB_CONFIG_DIR").is_none() && own != of_system;
    std::iter::once(own).chain(has_other.then(|| of_system.into())).collect()
}

/// The folder with notes about caches; none if the user turned notes off.
pub fn state_dir() -> Option<PathBuf> {
    let chosen = told("WB_STATE_DIR").or_else(|| own("XDG_STATE_HOME", Some(".local/state")));
    let folder = chosen.unwrap_or_else(|| "/var/lib/wb".into());
    Some(folder).filter(|folder| !folder.as_os_str().is_empty())
}
