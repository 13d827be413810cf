//! The NBD protocol ("network block device"): bytes ⇄ values, for a client and for a server.
//!
//! Pure code, as [`mod@crate::format`]: no I/O, no clock. Its facts come from the protocol's public
//! documents (`doc/proto.md` and `doc/uri.md` of NetworkBlockDevice/nbd). It covers the fixed
//! newstyle negotiation, and transmission with simple or structured replies. Every integer is
//! big-endian.
//!
//! A value appends itself to a buffer with `encode`. `decode` takes the bytes that have come so
//! far, see [`Decoded`]. Nothing is allocated before its length is checked against a maximum.
//! The data of reads and writes is not part of a value: it follows, and the caller moves it.

mod bytes;
mod errors;
mod flags;
mod greeting;
mod option;
mod option_reply;
mod reply;
mod request;
#[cfg(test)]
mod tests;
mod uri;

pub use bytes::{Decoded, ExportName, MAX_NAME_BYTES, NameError, WireError};
pub use errors::{errno_of, error_of};
pub use flags::{ClientFlags, CommandFlags, HandshakeFlags, TransmissionFlags};
pub use greeting::{GREETING_BYTES, Greeting, decode_client_flags, encode_client_flags};
pub use option::{ClientOption, InfoRequest, MAX_OPTION_BYTES, OPTION_HEADER_BYTES, OptionHeader};
pub use option_reply::{
    BlockSizes, Export, Info, InfoKind, OptionError, OptionReply, decode_export, encode_export,
};
pub use reply::{Chunk, Reply, SIMPLE_REPLY_BYTES};
pub use request::{Command, MAX_PAYLOAD_BYTES, REQUEST_BYTES, Request};
pub use uri::{Address, DEFAULT_PORT, Tls, Uri, UriError};
