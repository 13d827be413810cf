//! How users choose a front end.

use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValue, StringValueParser, TypedValueParser, ValueParserFactory};
use clap::{Arg, Command};
use libwb::device::absolute_uri;
use libwb::nbd::{Address, Uri};
use libwb::reactor;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

/// How a volume is served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum FrontEnd {
    /// ublk where it works, else loop.
    #[default]
    Auto,
    /// A device of the kernel's ublk driver.
    Ublk,
    /// A loop device over FUSE.
    Loop,
    /// An NBD server at this address.
    Nbd(Uri),
}

/// The names of front ends that need no address.
const NAMES: [(&str, FrontEnd); 3] =
    [("auto", FrontEnd::Auto), ("ublk", FrontEnd::Ublk), ("loop", FrontEnd::Loop)];

impl FromStr for FrontEnd {
    type Err = String;

    fn from_str(text: &str) -> Result<FrontEnd, String> {
        if let Some((_, front_end)) = NAMES.into_iter().find(|(name, _)| *name == text) {
            return Ok(front_end);
        }
        if !text.contains("://") {
            return Err(format!(
                "'{text}' is no front end: it must be auto, ublk, loop, or an NBD address such as \
                 nbd+unix:///?socket=PATH or nbd://127.0.0.1"
            ));
        }
        let uri: Uri = text.parse().map_err(|e: libwb::nbd::UriError| e.to_string())?;
        match &uri.tls {
            Some(tls) if tls.hostname.is_some() || !tls.verify_peer => {
                Err("tls-hostname and tls-verify-peer are for clients; a server does not take them"
                    .into())
            }
            Some(tls) if tls.certificates.is_none() => {
                Err(format!("a server with TLS needs certificates: {}tls-certificates=FOLDER", {
                    let separator = if text.contains('?') { '&' } else { '?' };
                    format!("{text}{separator}")
                }))
            }
            _ => Ok(FrontEnd::Nbd(uri)),
        }
    }
}

impl fmt::Display for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, NAMES.iter().find(|(_, front_end)| front_end == self)) {
            (FrontEnd::Nbd(uri), _) => uri.fmt(f),
            (_, Some((name, _))) => f.write_str(name),
            (_, None) => Ok(()),
        }
    }
}

impl TryFrom<String> for FrontEnd {
    type Error = String;

    fn try_from(text: String) -> Result<FrontEnd, String> {
        text.parse()
    }
}

impl From<FrontEnd> for String {
    fn from(front_end: FrontEnd) -> String {
        front_end.to_string()
    }
}

impl FrontEnd {
    /// The NBD server's address, if it is one.
    pub(crate) fn nbd(&self) -> Option<&Uri> {
        match self {
            FrontEnd::Nbd(uri) => Some(uri),
            _ => None,
        }
    }

    /// The same, with paths that are valid in any working directory.
    fn absolute(self) -> Result<FrontEnd> {
        match self {
            FrontEnd::Nbd(uri) => {
                let absolute = absolute_uri(&uri).with_context(|| uri.to_string())?;
                Ok(FrontEnd::Nbd(absolute))
            }
            other => Ok(other),
        }
    }
}

/// Where the server of an address listens: at the first of these that works.
///
/// # Errors
/// When a host has no address. When other hosts could reach the server without TLS, unless that is
/// allowed.
pub(crate) fn addresses(uri: &Uri, insecure: bool) -> Result<Vec<reactor::Address>> {
    let (host, port) = match &uri.address {
        Address::Unix(path) => return Ok(vec![reactor::Address::Unix(path.clone())]),
        Address::Tcp { host, port } => (host.as_str(), *port),
    };
    let found = (host, port).to_socket_addrs();
    let found: Vec<SocketAddr> =
        found.with_context(|| format!("{uri}: cannot find the host '{host}'"))?.collect();
    let is_far = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
    match found.iter().find(is_far) {
        Some(far) if uri.tls.is_none() && !insecure => bail!(
            "refused to serve at {uri} without TLS: anybody who reaches {far} could read and write \
             the volume. Use nbds:// with ?tls-certificates=FOLDER, or a Unix socket, or an \
             address of this host alone, such as nbd://127.0.0.1. --insecure serves it anyway"
        ),
        _ if found.is_empty() => bail!("{uri}: the host '{host}' has no address"),
        _ => Ok(found.into_iter().map(reactor::Address::Tcp).collect()),
    }
}

/// The option `--serve`.
#[derive(clap::Args)]
pub(crate) struct ServeOption {
    /// How the volume is served. As a block device: ublk is faster and needs Linux 6.5; loop is a
    /// loop device over FUSE; auto is ublk where it works, else loop. Or over NBD, which needs no
    /// root: nbd://HOST[:PORT][/EXPORT], or nbd+unix:///[EXPORT]?socket=PATH; with TLS, nbds and
    /// nbds+unix, with tls-certificates=FOLDER. The default is auto, or what create recorded
    #[arg(long = "serve", value_name = "auto|ublk|loop|NBD-ADDRESS", hide_possible_values = true)]
    front_end: Option<FrontEnd>,
}

impl ServeOption {
    pub(crate) fn is_given(&self) -> bool {
        self.front_end.is_some()
    }

    /// The front end that the user has chosen, or else the recorded one. `insecure` says whether
    /// other hosts may use it without TLS.
    pub(crate) fn or(&self, recorded: FrontEnd, insecure: bool) -> Result<FrontEnd> {
        let chosen = self.front_end.clone().unwrap_or(recorded).absolute()?;
        if let Some(uri) = chosen.nbd() {
            addresses(uri, insecure)?;
        }
        Ok(chosen)
    }
}

/// Reads a front end, and offers the names to completions.
#[derive(Clone)]
pub(crate) struct FrontEndParser;

impl ValueParserFactory for FrontEnd {
    type Parser = FrontEndParser;

    fn value_parser() -> FrontEndParser {
        FrontEndParser
    }
}

impl TypedValueParser for FrontEndParser {
    type Value = FrontEnd;

    fn parse_ref(
        &self,
        command: &Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<FrontEnd, clap::Error> {
        let parse = StringValueParser::new().try_map(|text| text.parse::<FrontEnd>());
        parse.parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(NAMES.iter().map(|(name, _)| PossibleValue::new(*name))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<FrontEnd, String> {
        text.parse()
    }

    #[test]
    fn a_front_end_is_written_as_it_is_read() {
        for text in [
            "auto",
            "ublk",
            "loop",
            "nbd://127.0.0.1:10810/data",
            "nbd+unix:///?socket=/run/data",
            "nbds://[::1]/?tls-certificates=/etc/pki",
        ] {
            let front_end = parse(text).unwrap();
            assert_eq!(front_end.to_string(), text);
            let json = serde_json::to_string(&front_end).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<FrontEnd>(&json).unwrap(), front_end);
        }
    }

    #[test]
    fn a_typo_is_refused_with_what_is_known() {
        for (text, why) in [
            ("floppy", "must be auto, ublk, loop, or an NBD address"),
            ("Loop", "must be auto, ublk, loop, or an NBD address"),
            ("", "must be auto, ublk, loop, or an NBD address"),
            ("ndb://localhost", "must begin with nbd://"),
            ("nbd+unix:///?socke=/s", "unknown parameter 'socke'"),
            ("nbds://localhost", "nbds://localhost?tls-certificates=FOLDER"),
            ("nbds+unix:///?socket=/s", "?socket=/s&tls-certificates=FOLDER"),
            ("nbds://h?tls-certificates=/c&tls-verify-peer=0", "are for clients"),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn without_tls_only_this_host_is_served_unless_the_user_insists() {
        let addresses = |text: &str, insecure| {
            let uri = parse(text).unwrap().nbd().unwrap().clone();
            super::addresses(&uri, insecure).map(|found| found.len())
        };
        for near in ["nbd://127.0.0.1", "nbd://[::1]", "nbd://127.9.9.9:1", "nbd+unix:///?socket=s"]
        {
            assert!(addresses(near, false).unwrap() > 0, "{near}");
        }
        for far in ["nbd://0.0.0.0", "nbd://[::]", "nbd://192.0.2.1:99", "nbd://[2001:db8::1]"] {
            let refused = addresses(far, false).unwrap_err().to_string();
            assert!(refused.contains("without TLS") && refused.contains("--insecure"), "{refused}");
            assert!(addresses(far, true).unwrap() > 0, "{far}");
            let secure = far.replace("nbd://", "nbds://") + "?tls-certificates=/c";
            assert!(addresses(&secure, false).unwrap() > 0, "{secure}");
        }
    }
}
