//! What a server answers during negotiation.

use super::bytes::{
    Decoded, ExportName, MAX_NAME_BYTES, Parts, Put, WireError, head, readable, sendable,
};
use super::flags::TransmissionFlags;
use crate::format::to_u64;
use byteorder::{BigEndian, ByteOrder};

const MAGIC: u64 = 0x0003_e889_0455_65a9;
const HEADER_BYTES: usize = 20;
/// The longest data of a reply in bytes: a name, and a description of it.
const MAX_DATA_BYTES: u32 = 2 * 4096 + 64;
const _: () = assert!(MAX_DATA_BYTES as usize >= 2 * MAX_NAME_BYTES);
/// Length of an encoded [`Export`] in bytes.
const EXPORT_BYTES: usize = 10;
/// Zeros after the reply to `EXPORT_NAME`.
const ZEROES: usize = 124;

mod kind {
    pub(super) const ACK: u32 = 1;
    pub(super) const SERVER: u32 = 2;
    pub(super) const INFO: u32 = 3;
    /// Set in those that are errors.
    pub(super) const ERROR: u32 = 1 << 31;
}

/// An answer to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionReply {
    /// Done. No further answer to this option follows.
    Ack,
    /// One export of a list.
    Server {
        /// Its name.
        name: ExportName,
        /// Text for people about it.
        details: String,
    },
    /// Something about an export.
    Info(Info),
    /// The option is refused. No further answer to it follows.
    Error {
        /// Why.
        error: OptionError,
        /// Text for people.
        message: String,
    },
    /// Something else, which is no error.
    Unknown {
        /// The number of the reply.
        kind: u32,
        /// Its data.
        data: Vec<u8>,
    },
}

/// Why an option is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionError {
    /// The server does not know the option.
    Unsupported,
    /// The server's configuration forbids it.
    Policy,
    /// The option makes no sense as it was sent.
    Invalid,
    /// The server's system cannot do this.
    Platform,
    /// TLS must be started first.
    TlsRequired,
    /// There is no such export.
    UnknownExport,
    /// The server ends.
    Shutdown,
    /// The client must ask for the sizes of blocks.
    BlockSizeRequired,
    /// The option is too long.
    TooBig,
    /// Another error, with its number.
    Other(u32),
}

const ERRORS: [(OptionError, u32); 9] = [
    (OptionError::Unsupported, 1),
    (OptionError::Policy, 2),
    (OptionError::Invalid, 3),
    (OptionError::Platform, 4),
    (OptionError::TlsRequired, 5),
    (OptionError::UnknownExport, 6),
    (OptionError::Shutdown, 7),
    (OptionError::BlockSizeRequired, 8),
    (OptionError::TooBig, 9),
];

impl OptionError {
    fn number(self) -> u32 {
        let known = ERRORS.iter().find(|(error, _)| *error == self).map(|&(_, number)| number);
        match self {
            OptionError::Other(number) => number | kind::ERROR,
            _ => known.unwrap_or_default() | kind::ERROR,
        }
    }

    fn of(number: u32) -> OptionError {
        let known = ERRORS.iter().find(|(_, known)| known | kind::ERROR == number);
        known.map_or(OptionError::Other(number), |&(error, _)| error)
    }
}

/// The kinds of information that a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum InfoKind {
    /// Size and flags. It comes unasked.
    Export = 0,
    /// The name that the server prefers.
    Name = 1,
    /// Text for people.
    Description = 2,
    /// Which requests the server takes.
    BlockSize = 3,
}

/// What an export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    /// What the server can do with it.
    pub flags: TransmissionFlags,
}

/// Which requests a server takes. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Every offset and length must be a multiple of this.
    pub minimum: u32,
    /// Multiples of this are handled well.
    pub preferred: u32,
    /// The longest data of a request.
    pub maximum: u32,
}

/// Something about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Info {
    /// Size and flags.
    Export(Export),
    /// The name that the server prefers.
    Name(ExportName),
    /// Text for people.
    Description(String),
    /// Which requests the server takes.
    BlockSize(BlockSizes),
    /// Something else.
    Unknown {
        /// Its kind.
        kind: u16,
        /// Its data.
        data: Vec<u8>,
    },
}

impl Info {
    fn encode(&self, to: &mut Vec<u8>) {
        to.put_u16(match self {
            Info::Export(_) => InfoKind::Export as u16,
            Info::Name(_) => InfoKind::Name as u16,
            Info::Description(_) => InfoKind::Description as u16,
            Info::BlockSize(_) => InfoKind::BlockSize as u16,
            Info::Unknown { kind, .. } => *kind,
        });
        match self {
            Info::Export(export) => export.encode(to),
            Info::Name(name) => to.extend(name.as_str().as_bytes()),
            Info::Description(text) => to.extend(sendable(text).as_bytes()),
            Info::BlockSize(sizes) => {
                to.put_u32(sizes.minimum);
                to.put_u32(sizes.preferred);
                to.put_u32(sizes.maximum);
            }
            Info::Unknown { data, .. } => to.extend(data),
        }
    }

    fn decode(data: &[u8]) -> Result<Info, WireError> {
        let mut parts = Parts(data);
        let kind = parts.u16("the kind of information")?;
        let exactly = |length: usize, what, expected| match data.len() {
            found if found == length => Ok(()),
            found => Err(WireError::WrongLength { what, length: to_u64(found), expected }),
        };
        if kind == InfoKind::Export as u16 {
            let what = "the information about the export";
            exactly(2 + EXPORT_BYTES, what, "12")?;
            let (size, flags) = (parts.u64(what)?, parts.u16(what)?);
            Ok(Info::Export(Export { size, flags: TransmissionFlags::from_bits_retain(flags) }))
        } else if kind == InfoKind::Name as u16 {
            Ok(Info::Name(ExportName::decode(parts.rest())?))
        } else if kind == InfoKind::Description as u16 {
            Ok(Info::Description(readable(parts.rest())))
        } else if kind == InfoKind::BlockSize as u16 {
            let what = "the information about block sizes";
            exactly(14, what, "14")?;
            let (minimum, preferred) = (parts.u32(what)?, parts.u32(what)?);
            Ok(Info::BlockSize(BlockSizes { minimum, preferred, maximum: parts.u32(what)? }))
        } else {
            Ok(Info::Unknown { kind, data: parts.rest().to_vec() })
        }
    }
}

impl OptionReply {
    /// Appends the reply to the option with this number.
    pub fn encode(&self, option: u32, to: &mut Vec<u8>) {
        let mut data = Vec::new();
        let kind = match self {
            OptionReply::Ack => kind::ACK,
            OptionReply::Server { name, details } => {
                data.put_length(name.as_str().len());
                data.extend(name.as_str().as_bytes());
                data.extend(sendable(details).as_bytes());
                kind::SERVER
            }
            OptionReply::Info(info) => {
                info.encode(&mut data);
                kind::INFO
            }
            OptionReply::Error { error, message } => {
                data.extend(sendable(message).as_bytes());
                error.number()
            }
            OptionReply::Unknown { kind, data: unknown } => {
                data.extend(unknown);
                *kind
            }
        };
        to.put_u64(MAGIC);
        to.put_u32(option);
        to.put_u32(kind);
        to.put_length(data.len());
        to.extend(data);
    }

    /// Reads a reply, and the number of the option that it answers.
    ///
    /// # Errors
    /// When it is none, or longer than any that makes sense.
    pub fn decode(bytes: &[u8]) -> Result<Decoded<(u32, OptionReply)>, WireError> {
        let header: &[u8; HEADER_BYTES] = match head(bytes) {
            Ok(header) => header,
            Err(more) => return Ok(Decoded::More(more)),
        };
        let (mut parts, what) = (Parts(header), "the reply to an option");
        let found = parts.u64(what)?;
        if found != MAGIC {
            return Err(WireError::WrongMagic { what, found, expected: "0x3e889045565a9" });
        }
        let (option, kind, length) = (parts.u32(what)?, parts.u32(what)?, parts.u32(what)?);
        if length > MAX_DATA_BYTES {
            let (length, most) = (length.into(), MAX_DATA_BYTES.into());
            return Err(WireError::TooLong { what, length, most });
        }
        let end = HEADER_BYTES + length as usize;
        match bytes.get(HEADER_BYTES..end) {
            None => Ok(Decoded::More(end - bytes.len())),
            Some(data) => Ok(Decoded::Value((option, OptionReply::of(kind, data)?), end)),
        }
    }

    fn of(kind: u32, data: &[u8]) -> Result<OptionReply, WireError> {
        let mut parts = Parts(data);
        match kind {
            kind::ACK => {
                parts.end("an acknowledgement of an option")?;
                Ok(OptionReply::Ack)
            }
            kind::SERVER => {
                let name = parts.name()?;
                Ok(OptionReply::Server { name, details: readable(parts.rest()) })
            }
            kind::INFO => Ok(OptionReply::Info(Info::decode(data)?)),
            kind if kind & kind::ERROR != 0 => {
                Ok(OptionReply::Error { error: OptionError::of(kind), message: readable(data) })
            }
            kind => Ok(OptionReply::Unknown { kind, data: data.to_vec() }),
        }
    }
}

impl Export {
    fn encode(&self, to: &mut Vec<u8>) {
        to.put_u64(self.size);
        to.put_u16(self.flags.bits());
    }
}

/// Appends the answer to `EXPORT_NAME`, which ends negotiation. `no_zeroes` says whether both
/// sides have agreed to leave out the zeros after it.
pub fn encode_export(export: &Export, no_zeroes: bool, to: &mut Vec<u8>) {
    export.encode(to);
    if !no_zeroes {
        to.extend([0; ZEROES]);
    }
}

/// Reads the answer to `EXPORT_NAME`.
pub fn decode_export(bytes: &[u8], no_zeroes: bool) -> Decoded<Export> {
    let length = if no_zeroes { EXPORT_BYTES } else { EXPORT_BYTES + ZEROES };
    if bytes.len() < length {
        return Decoded::More(length - bytes.len());
    }
    let flags = TransmissionFlags::from_bits_retain(BigEndian::read_u16(&bytes[8..]));
    Decoded::Value(Export { size: BigEndian::read_u64(bytes), flags }, length)
}
