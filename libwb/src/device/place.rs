//! Where a backing device is, as users write it.

use super::probe::identity;
use crate::nbd::{Address, Uri, UriError};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf, absolute};

/// Where a backing device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A block device or a file.
    Path(PathBuf),
    /// An export of an NBD server.
    Export(Box<Uri>),
}

impl Place {
    /// Reads what a user has written. A text that begins as the address of an export is one; all
    /// else is a path.
    ///
    /// # Errors
    /// Says what is wrong with an address.
    pub fn parse(text: &OsStr) -> Result<Place, UriError> {
        match text.to_str().filter(|text| is_address(text)) {
            Some(address) => Ok(Place::Export(Box::new(address.parse()?))),
            None => Ok(Place::Path(text.into())),
        }
    }

    /// The path, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Place::Path(path) => Some(path),
            Place::Export(_) => None,
        }
    }

    /// The same place, valid in any working directory.
    ///
    /// # Errors
    /// When a path is empty, or the system does not tell the working directory. When no socket can
    /// have a path as long as this one has become.
    pub fn absolute(&self) -> io::Result<Place> {
        Ok(match self {
            Place::Path(path) => Place::Path(absolute(path)?),
            Place::Export(uri) => Place::Export(Box::new(absolute_uri(uri)?)),
        })
    }

    /// As a user may write it in a shell.
    pub fn in_shell(&self) -> String {
        match self {
            Place::Path(path) => path.display().to_string(),
            Place::Export(uri) => format!("'{uri}'"),
        }
    }

    /// Whether both lead to the same device, or are equal, even if there is no device. Exports may
    /// be the same where this cannot tell: a server may have several addresses.
    pub fn is_same(&self, other: &Place) -> bool {
        match (self, other) {
            (Place::Path(one), Place::Path(other)) => is_same_device(one, other),
            (Place::Export(one), Place::Export(other)) => {
                // An empty name means the export that the server has by default.
                let [name, other_name] = [one, other].map(|uri| uri.export.as_str());
                let may_be_same = name == other_name || name.is_empty() || other_name.is_empty();
                may_be_same && is_same_server(&one.address, &other.address)
            }
            _ => false,
        }
    }
}

/// The same address, valid in any working directory.
///
/// # Errors
/// As [`Place::absolute`].
pub fn absolute_uri(uri: &Uri) -> io::Result<Uri> {
    let mut uri = uri.clone();
    if let Address::Unix(socket) = &mut uri.address {
        *socket = absolute(&*socket)?;
    }
    if let Some(folder) = uri.tls.as_mut().and_then(|tls| tls.certificates.as_mut()) {
        *folder = absolute(&*folder)?;
    }
    uri.to_string().parse().map_err(|error: UriError| io::Error::other(error))
}

fn is_same_server(one: &Address, other: &Address) -> bool {
    match (one, other) {
        (Address::Unix(one), Address::Unix(other)) => is_same_device(one, other),
        (Address::Tcp { port, .. }, Address::Tcp { port: other_port, .. }) => {
            one == other || port == other_port && one.is_local() && other.is_local()
        }
        _ => false,
    }
}

/// Whether a text is meant to be the address of an export.
fn is_address(text: &str) -> bool {
    let Some((scheme, _)) = text.split_once("://") else { return false };
    let scheme = scheme.to_ascii_lowercase();
    ["nbd", "nbds"].iter().any(|nbd| {
        scheme == *nbd || scheme.strip_prefix(nbd).is_some_and(|rest| rest.starts_with('+'))
    })
}

/// Whether two paths lead to the same device, or are equal, even if there is no device.
pub fn is_same_device(a: &Path, b: &Path) -> bool {
    a == b || identity(a).is_ok_and(|a| identity(b).is_ok_and(|b| a == b))
}

impl Default for Place {
    fn default() -> Place {
        Place::Path(PathBuf::new())
    }
}

impl From<&Path> for Place {
    fn from(path: &Path) -> Place {
        Place::Path(path.into())
    }
}

impl From<&str> for Place {
    fn from(path: &str) -> Place {
        Place::Path(path.into())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Path(path) => path.display().fmt(f),
            Place::Export(uri) => uri.fmt(f),
        }
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Place::Path(path) => path.serialize(to),
            Place::Export(uri) => to.collect_str(uri),
        }
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Place, D::Error> {
        let path = PathBuf::deserialize(from)?;
        Place::parse(path.as_os_str()).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_told_from_a_path_and_is_the_same_in_any_form() {
        let place = |text: &str| Place::parse(OsStr::new(text));
        let export = place("NBD://Server/disk").unwrap();
        assert_eq!(export, place("nbd://Server:10809/disk").unwrap());
        assert!(export.is_same(&place("nbds://Server/disk").unwrap()));
        assert!(export.is_same(&place("nbd://Server").unwrap()));
        assert!(!export.is_same(&place("nbd://Server/other").unwrap()));
        assert!(!export.is_same(&place("nbd://Server:1/disk").unwrap()));
        let near = place("nbd://localhost/disk").unwrap();
        assert!(near.is_same(&place("nbd://127.0.0.1/disk").unwrap()) && !near.is_same(&export));
        assert_eq!(export.path(), None);
        for path in ["/dev/sda", "nbd", "nbd:/x", "nbdx://y", "http://server/disk", ""] {
            assert_eq!(place(path), Ok(Place::Path(path.into())), "{path}");
        }
        for typo in ["nbd://", "nbd+tcp://server", "nbd+unix:///disk", "nbds:///x", "nbd://a:b/"] {
            assert!(place(typo).is_err(), "{typo}");
        }
    }

    #[test]
    fn relative_paths_become_absolute_unless_that_makes_the_socket_too_long() {
        let place = |text: &str| Place::parse(OsStr::new(text)).unwrap().absolute();
        let here = std::env::current_dir().unwrap();
        let here = here.display();
        assert_eq!(place("disk").unwrap().to_string(), format!("{here}/disk"));
        assert_eq!(
            place("nbds+unix:///d?socket=s&tls-certificates=c").unwrap().to_string(),
            format!("nbds+unix:///d?socket={here}/s&tls-certificates={here}/c")
        );
        let long = place(&format!("nbd+unix:///?socket={}", "s".repeat(107))).unwrap_err();
        assert!(long.to_string().contains("Linux takes 1 to 107"), "{long}");
    }

    #[test]
    fn a_place_is_written_as_a_text_and_read_again() {
        for text in ["\"/dev/sda\"", "\"nbd+unix:///d?socket=/run/s\""] {
            let place: Place = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&place).unwrap(), text);
        }
        let typo = serde_json::from_str::<Place>("\"nbd://\"").unwrap_err().to_string();
        assert!(typo.contains("names no host"), "{typo}");
    }
}
