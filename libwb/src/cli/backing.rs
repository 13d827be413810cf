//! Opening a backing device, wherever it is.

use super::Io;
use crate::device::nbd::{Dial, NbdDevice, Options, Terms};
use crate::device::probe::{Access, OpenError, Opened, Traits, open};
use crate::device::{Device, Place, Watched};
use crate::nbd::Uri;
use clap::builder::{OsStringValueParser, TypedValueParser};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A backing device, open.
pub struct Backing {
    /// The device.
    pub device: Device,
    /// What users of a volume on it should know.
    pub traits: Traits,
    /// Tells whether its file or device is still there. An export has no such thing.
    pub watched: Option<Watched>,
    /// On what terms an export is used, for a process that goes on with it.
    pub terms: Option<Terms>,
}

/// Reads a place from the command line.
pub fn place() -> impl TypedValueParser<Value = Place> {
    OsStringValueParser::new().try_map(|text| Place::parse(&text))
}

/// A backing device would be reached over a network without TLS.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0}: refused without TLS: anybody on the way could read and change the data. Use nbds://, or \
     an address of this host that leads there, such as that of an SSH tunnel. --insecure uses it \
     anyway"
)]
pub struct InTheClear(String);

/// Refuses a backing device that would be reached over a network without TLS, unless that is
/// allowed.
///
/// # Errors
/// Says what to do.
pub fn refuse_in_the_clear(backing: &Place, insecure: bool) -> Result<(), InTheClear> {
    match backing {
        Place::Export(uri) if uri.tls.is_none() && !uri.address.is_local() && !insecure => {
            Err(InTheClear(uri.to_string()))
        }
        _ => Ok(()),
    }
}

impl Io {
    /// Opens the cache device and the backing device of a pair, each with its own access.
    ///
    /// # Errors
    /// As [`open`], and when both are the same device, or the backing device is empty.
    pub fn open_pair(
        &self,
        cache: &Path,
        backing: &Place,
        [for_cache, for_backing]: [Access; 2],
    ) -> Result<(Opened, Backing), OpenError> {
        match backing {
            Place::Path(path) => {
                let (cache, opened) =
                    crate::device::probe::open_pair(cache, path, [for_cache, for_backing])?;
                Ok((cache, self.backing_of(opened)?))
            }
            Place::Export(uri) => {
                let backing = self.open_export(uri, for_backing, None)?;
                if backing.device.size() == 0 {
                    return Err(OpenError::Empty { path: name(uri) });
                }
                Ok((open(cache, for_cache)?, backing))
            }
        }
    }

    /// Opens a pair after a process that has died. An export need not be there yet: requests to it
    /// wait.
    ///
    /// # Errors
    /// As [`Io::open_pair`].
    pub fn reopen_pair(
        &self,
        cache: &Path,
        backing: &Place,
        access: Access,
        terms: Option<Terms>,
    ) -> Result<(Opened, Backing), OpenError> {
        match (backing, terms) {
            (Place::Export(uri), Some(terms)) => {
                let backing = self.open_export(uri, access, Some(terms))?;
                Ok((open(cache, access)?, backing))
            }
            _ => self.open_pair(cache, backing, [access; 2]),
        }
    }

    /// Opens a backing device. Does not lock one that is on a server.
    ///
    /// # Errors
    /// As [`open`], and when an export cannot be used.
    pub fn open_backing(&self, at: &Place, access: Access) -> Result<Backing, OpenError> {
        match at {
            Place::Path(path) => self.backing_of(open(path, access)?),
            Place::Export(uri) => self.open_export(uri, access, None),
        }
    }

    fn backing_of(&self, opened: Opened) -> Result<Backing, OpenError> {
        let cannot_watch = |cause| OpenError::System { path: opened.path.clone(), cause };
        let watched = Watched::new(&opened).map_err(cannot_watch)?;
        let traits = opened.traits;
        Ok(Backing { device: self.serve(opened), traits, watched: Some(watched), terms: None })
    }

    fn open_export(
        &self,
        uri: &Uri,
        access: Access,
        terms: Option<Terms>,
    ) -> Result<Backing, OpenError> {
        let failed = |cause| OpenError::Export { path: name(uri), cause };
        let dial = Dial::new(self.reactor.handle(), uri)
            .map_err(|cause| OpenError::Tls { path: name(uri), cause })?;
        let options = Options::new(uri.export.clone()).writable(access == Access::Write);
        let (runtime, dial, text) = (self.runtime(), Arc::new(dial), uri.to_string());
        let device = match terms {
            Some(terms) => NbdDevice::go_on(runtime, dial, &text, options, terms),
            None => self.block_on(NbdDevice::open(runtime, dial, &text, options)),
        };
        let device = device.map_err(failed)?;
        let terms = Some(device.terms());
        Ok(Backing { device: Arc::new(device), traits: Traits::default(), watched: None, terms })
    }
}

fn name(uri: &Uri) -> PathBuf {
    uri.to_string().into()
}
