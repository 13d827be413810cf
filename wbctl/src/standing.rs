//! What a server leaves to the next one, beside what the keeper holds.

use crate::config::RecordedVolume;
use crate::front_end::FrontEnd;
use crate::to_keeper;
use anyhow::{Context, Result};
use libwb::cache::{Cache, TunableValue, Tunables};
use libwb::control::by_name;
use libwb::device::nbd::Terms;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;

/// A volume as it is served. What its record says has no meaning while it is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Standing {
    pub(crate) volume: RecordedVolume,
    pub(crate) sector_size: u32,
    /// The one that it has got.
    pub(crate) front_end: FrontEnd,
    /// The block device, or the address of the NBD server.
    pub(crate) device: PathBuf,
    /// On what terms the backing device is used, if it is on a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backing_terms: Option<Terms>,
    /// Tunables in force, by name.
    pub(crate) tunables: BTreeMap<String, TunableValue>,
    pub(crate) paused: bool,
    /// Whether the user was told that the volume is ready.
    pub(crate) announced: bool,
}

impl Standing {
    /// What an earlier server has left.
    pub(crate) fn read(text: &str) -> Result<Standing> {
        serde_json::from_str(text).context("cannot understand what the last server has left")
    }

    /// Leaves it to the next server, as it is now. Of several at a time, the last one knows most.
    pub(crate) fn leave(&self, cache: &Cache) -> Result<()> {
        static LEAVING: Mutex<()> = Mutex::new(());
        let _one = LEAVING.lock();
        let (tunables, paused) = (by_name(&cache.tunables()), cache.is_paused());
        let now = Standing { tunables, paused, ..self.clone() };
        to_keeper::state(serde_json::to_string(&now)?)
    }

    /// The tunables in force.
    pub(crate) fn tunables(&self) -> Result<Tunables> {
        let mut tunables = Tunables::default();
        for (key, value) in &self.tunables {
            tunables.set(key, &value.to_string())?;
        }
        tunables.check()?;
        Ok(tunables)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_read_as_it_was_written_and_garbage_is_refused() {
        let volume = RecordedVolume {
            cache: "/dev/c".into(),
            backing: "/dev/b".into(),
            serve: FrontEnd::Auto,
            insecure: false,
            sector_size: None,
            tunables: BTreeMap::new(),
        };
        let standing = Standing {
            volume,
            sector_size: 512,
            front_end: FrontEnd::Loop,
            device: "/dev/loop7".into(),
            backing_terms: None,
            tunables: by_name(&Tunables::default()),
            paused: true,
            announced: true,
        };
        let text = serde_json::to_string(&standing).unwrap();
        assert_eq!(Standing::read(&text).unwrap(), standing);
        assert_eq!(by_name(&standing.tunables().unwrap()), by_name(&Tunables::default()));
        for garbage in ["", "{}", "[1]", "{\"volume\":3}", &text[1..]] {
            assert!(Standing::read(garbage).is_err(), "{garbage}");
        }
    }
}
