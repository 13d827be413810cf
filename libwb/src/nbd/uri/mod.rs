//! The address of an export, as users write it.

#[cfg(test)]
mod tests;

use super::bytes::{ExportName, NameError};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

/// The TCP port of the protocol.
pub const DEFAULT_PORT: u16 = 10809;
/// The longest path of a Unix socket in bytes.
const MAX_SOCKET_BYTES: usize = 107;

/// What need not be encoded in a URI's query: characters that RFC 3986 calls unreserved, and a few
/// that are common in paths. A `+` is encoded, because some programs take it for a space.
const IN_QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/')
    .remove(b':')
    .remove(b'@')
    .remove(b',');
const IN_PATH: &AsciiSet = &IN_QUERY.remove(b'+').remove(b'=');

/// The address of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// Where the server is.
    pub address: Address,
    /// The export.
    pub export: ExportName,
    /// `None`: the connection is not encrypted.
    pub tls: Option<Tls>,
}

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port.
    Tcp {
        /// A name or an address. An IPv6 address has no brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// Whether no other host is involved: a Unix socket, or the loopback interface by its name or
    /// its address.
    pub fn is_local(&self) -> bool {
        let Address::Tcp { host, .. } = self else { return true };
        let is_loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
        host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(is_loopback)
    }
}

/// How a connection is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The folder with certificates and keys.
    pub certificates: Option<PathBuf>,
    /// The name that the server's certificate must have, if it is not that of the host.
    pub hostname: Option<String>,
    /// Whether a client checks the certificate of the server.
    pub verify_peer: bool,
}

impl Default for Tls {
    fn default() -> Tls {
        Tls { certificates: None, hostname: None, verify_peer: true }
    }
}

/// Why a text is not the address of an export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UriError {
    /// It does not begin as one.
    #[error(
        "'{0}' is no NBD address: it must begin with nbd://, nbds://, nbd+unix:/// or nbds+unix:///"
    )]
    Scheme(String),
    /// It has a `#`.
    #[error("an NBD address has no fragment; write %23 for a '#'")]
    Fragment,
    /// It names a user.
    #[error("wb does not authenticate users by name: leave out '{0}@'")]
    User(String),
    /// Its scheme needs a host.
    #[error("the NBD address names no host: write nbd://HOST[:PORT]/EXPORT")]
    NoHost,
    /// A Unix socket is on no host.
    #[error("an address of a Unix socket names no host: write nbd+unix:///EXPORT?socket=PATH")]
    HostOfSocket,
    /// The host cannot be one.
    #[error("'{0}' is no host name, IPv4 address, or IPv6 address in brackets")]
    Host(String),
    /// The port is no number.
    #[error("'{0}' is no TCP port: it must be a number from 1 to 65535")]
    Port(String),
    /// Percent-encoding is cut short.
    #[error("'%' must be followed by two hexadecimal digits in '{0}'; write %25 for a '%'")]
    Percent(String),
    /// The export cannot have this name.
    #[error("{0}")]
    Name(#[from] NameError),
    /// A Unix socket needs a path.
    #[error("the NBD address names no socket: write nbd+unix:///EXPORT?socket=PATH")]
    NoSocket,
    /// No Unix socket can have this path.
    #[error("the path of the socket is {0} bytes long; Linux takes 1 to {MAX_SOCKET_BYTES}")]
    SocketLength(usize),
    /// The socket is not a file.
    #[error("the path of the socket contains a zero byte; wb does not use abstract sockets")]
    AbstractSocket,
    /// A parameter is misspelt.
    #[error(
        "unknown parameter '{0}' in the NBD address; wb knows socket, tls-certificates, \
         tls-hostname, tls-type and tls-verify-peer"
    )]
    UnknownParameter(String),
    /// A parameter stands twice.
    #[error("the parameter '{0}' stands twice in the NBD address")]
    Twice(&'static str),
    /// Only Unix sockets have a path.
    #[error("the parameter 'socket' needs an address that begins with nbd+unix:///")]
    SocketOfHost,
    /// The scheme is one without TLS.
    #[error("the parameter '{0}' needs an address that begins with nbds: it turns on TLS")]
    NoTls(&'static str),
    /// A parameter has another value than it can have.
    #[error("the parameter '{name}' is '{value}'; wb knows {known}")]
    Value {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: String,
        /// The values that it can have.
        known: &'static str,
    },
}

const SOCKET: &str = "socket";
const CERTIFICATES: &str = "tls-certificates";
const HOSTNAME: &str = "tls-hostname";
const KIND: &str = "tls-type";
const VERIFY_PEER: &str = "tls-verify-peer";

/// The parameters of a URI as they stand there, but decoded.
struct Parameters<'a>(Vec<(&'static str, Cow<'a, [u8]>)>);

impl<'a> Parameters<'a> {
    fn parse(query: &'a str) -> Result<Parameters<'a>, UriError> {
        let mut found: Vec<(&'static str, Cow<'a, [u8]>)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let known = [SOCKET, CERTIFICATES, HOSTNAME, KIND, VERIFY_PEER];
            let name = known
                .into_iter()
                .find(|known| *known == name)
                .ok_or_else(|| UriError::UnknownParameter(name.into()))?;
            if found.iter().any(|(other, _)| *other == name) {
                return Err(UriError::Twice(name));
            }
            found.push((name, decoded(value)?));
        }
        Ok(Parameters(found))
    }

    fn take(&mut self, name: &str) -> Option<Cow<'a, [u8]>> {
        let at = self.0.iter().position(|(found, _)| *found == name)?;
        Some(self.0.swap_remove(at).1)
    }

    /// A parameter that has one of a few values.
    fn take_one_of<T>(
        &mut self,
        name: &'static str,
        known: &'static str,
        of: impl FnOnce(&[u8]) -> Option<T>,
    ) -> Result<Option<T>, UriError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let wrong =
            || UriError::Value { name, value: String::from_utf8_lossy(&value).into(), known };
        of(&value).ok_or_else(wrong).map(Some)
    }
}

fn decoded(text: &str) -> Result<Cow<'_, [u8]>, UriError> {
    let is_cut = |rest: &str| {
        !rest.as_bytes().first_chunk::<2>().is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit))
    };
    if text.split('%').skip(1).any(is_cut) {
        return Err(UriError::Percent(text.into()));
    }
    Ok(percent_decode_str(text).into())
}

fn path(bytes: &[u8]) -> PathBuf {
    OsStr::from_bytes(bytes).into()
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Uri, UriError> {
        let no_scheme = || UriError::Scheme(text.into());
        let (scheme, rest) = text.split_once("://").ok_or_else(no_scheme)?;
        let (is_unix, is_tls) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => (false, false),
            "nbds" => (false, true),
            "nbd+unix" => (true, false),
            "nbds+unix" => (true, true),
            _ => return Err(no_scheme()),
        };
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
        let mut parameters = Parameters::parse(query)?;
        let socket = parameters.take(SOCKET);
        let address = match (is_unix, socket) {
            (true, _) if !authority.is_empty() => return Err(UriError::HostOfSocket),
            (true, None) => return Err(UriError::NoSocket),
            (true, Some(socket)) => parse_socket(&socket)?,
            (false, Some(_)) => return Err(UriError::SocketOfHost),
            (false, None) => parse_authority(authority)?,
        };
        let tls = if is_tls { Some(parse_tls(&mut parameters)?) } else { None };
        if let Some((name, _)) = parameters.0.first() {
            return Err(UriError::NoTls(name));
        }
        let export = ExportName::decode(&decoded(name)?)?;
        Ok(Uri { address, export, tls })
    }
}

fn parse_socket(socket: &[u8]) -> Result<Address, UriError> {
    if socket.contains(&0) {
        return Err(UriError::AbstractSocket);
    }
    match socket.len() {
        1..=MAX_SOCKET_BYTES => Ok(Address::Unix(path(socket))),
        length => Err(UriError::SocketLength(length)),
    }
}

fn parse_authority(text: &str) -> Result<Address, UriError> {
    if let Some((user, _)) = text.split_once('@') {
        return Err(UriError::User(user.into()));
    }
    let wrong = || UriError::Host(text.into());
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
            host.parse::<Ipv6Addr>().map_err(|_| wrong())?;
            (host, port)
        }
        None => {
            let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
            let is_of_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            // An IPv6 address without brackets has many colons.
            if !host.chars().all(is_of_name) || port.matches(':').count() > 1 {
                return Err(wrong());
            }
            (host, port)
        }
    };
    if host.is_empty() {
        return Err(UriError::NoHost);
    }
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => DEFAULT_PORT,
        None => return Err(wrong()),
        Some("") => DEFAULT_PORT,
        Some(port) => parse_port(port)?,
    };
    Ok(Address::Tcp { host: host.into(), port })
}

fn parse_port(text: &str) -> Result<u16, UriError> {
    let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok());
    number.flatten().filter(|&port| port != 0).ok_or_else(|| UriError::Port(text.into()))
}

fn parse_tls(parameters: &mut Parameters<'_>) -> Result<Tls, UriError> {
    parameters.take_one_of(KIND, "x509", |value| (value == b"x509").then_some(()))?;
    let verify = parameters.take_one_of(VERIFY_PEER, "0 and 1", |value| match value {
        b"0" => Some(false),
        b"1" => Some(true),
        _ => None,
    })?;
    let hostname = parameters.take_one_of(HOSTNAME, "names of hosts", |value| {
        std::str::from_utf8(value).ok().filter(|name| !name.is_empty()).map(String::from)
    })?;
    let certificates = parameters.take_one_of(CERTIFICATES, "paths of folders", |value| {
        (!value.is_empty() && !value.contains(&0)).then(|| path(value))
    })?;
    Ok(Tls { certificates, hostname, verify_peer: verify.unwrap_or(true) })
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let encoded = |text: &[u8], set| percent_encode(text, set).to_string();
        let mut parameters = Vec::new();
        f.write_str(if self.tls.is_some() { "nbds" } else { "nbd" })?;
        match &self.address {
            Address::Tcp { host, port } => {
                match host.contains(':') {
                    true => write!(f, "://[{host}]")?,
                    false => write!(f, "://{host}")?,
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
            }
            Address::Unix(socket) => {
                f.write_str("+unix://")?;
                parameters.push((SOCKET, encoded(socket.as_os_str().as_bytes(), IN_QUERY)));
            }
        }
        write!(f, "/{}", encoded(self.export.as_str().as_bytes(), IN_PATH))?;
        if let Some(tls) = &self.tls {
            let folder = tls.certificates.as_ref().map(|path| path.as_os_str().as_bytes());
            parameters.extend(folder.map(|path| (CERTIFICATES, encoded(path, IN_QUERY))));
            let name = tls.hostname.as_ref().map(|name| name.as_bytes());
            parameters.extend(name.map(|name| (HOSTNAME, encoded(name, IN_QUERY))));
            parameters.extend((!tls.verify_peer).then(|| (VERIFY_PEER, "0".into())));
        }
        for (mark, (name, value)) in
            std::iter::once('?').chain(std::iter::repeat('&')).zip(parameters)
        {
            write!(f, "{mark}{name}={value}")?;
        }
        Ok(())
    }
}
