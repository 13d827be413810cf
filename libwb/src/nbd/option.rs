//! Options: what a client says during negotiation.

use super::bytes::{Decoded, ExportName, MAX_NAME_BYTES, Parts, Put, WireError, head};
use super::greeting::OPTION_MAGIC;
use crate::format::{to_u64, to_usize};

/// Length of the header of an option in bytes.
pub const OPTION_HEADER_BYTES: usize = 16;
/// The longest data of an option in bytes: a name, and any list of information that makes sense.
pub const MAX_OPTION_BYTES: usize = MAX_NAME_BYTES + 4096;

mod code {
    pub(super) const EXPORT_NAME: u32 = 1;
    pub(super) const ABORT: u32 = 2;
    pub(super) const LIST: u32 = 3;
    pub(super) const START_TLS: u32 = 5;
    pub(super) const INFO: u32 = 6;
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
}

/// What precedes the data of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option it is, see [`ClientOption::code`].
    pub code: u32,
    /// Length of the data that follows, in bytes. May be beyond [`MAX_OPTION_BYTES`]; a server can
    /// skip such data.
    pub length: u32,
}

impl OptionHeader {
    /// The code of the one option that cannot be refused with a reply.
    pub const EXPORT_NAME: u32 = code::EXPORT_NAME;

    /// Whether [`ClientOption`] has a variant of its own for the option.
    pub fn is_known(&self) -> bool {
        matches!(
            self.code,
            code::EXPORT_NAME
                | code::ABORT
                | code::LIST
                | code::START_TLS
                | code::INFO
                | code::GO
                | code::STRUCTURED_REPLY
        )
    }

    /// Reads a header.
    ///
    /// # Errors
    /// When it begins with another magic number.
    pub fn decode(bytes: &[u8]) -> Result<Decoded<OptionHeader>, WireError> {
        let bytes: &[u8; OPTION_HEADER_BYTES] = match head(bytes) {
            Ok(bytes) => bytes,
            Err(more) => return Ok(Decoded::More(more)),
        };
        let (mut parts, what) = (Parts(bytes), "an option");
        let found = parts.u64(what)?;
        if found != OPTION_MAGIC {
            return Err(WireError::WrongMagic { what, found, expected: "\"IHAVEOPT\"" });
        }
        let header = OptionHeader { code: parts.u32(what)?, length: parts.u32(what)? };
        Ok(Decoded::Value(header, OPTION_HEADER_BYTES))
    }
}

/// What a client wants to know about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export.
    pub name: ExportName,
    /// The kinds of information, see [`InfoKind`](super::InfoKind).
    pub wanted: Vec<u16>,
}

/// What a client says during negotiation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientOption {
    /// It wants this export, and cannot be told of an error.
    ExportName(ExportName),
    /// It goes away.
    Abort,
    /// It wants a list of exports.
    List,
    /// It wants to speak TLS from here on.
    StartTls,
    /// It wants to know about an export.
    Info(InfoRequest),
    /// It wants this export.
    Go(InfoRequest),
    /// It understands structured replies.
    StructuredReply,
    /// Something else.
    Unknown {
        /// The number of the option.
        code: u32,
        /// Its data.
        data: Vec<u8>,
    },
}

impl ClientOption {
    /// The number of the option.
    pub fn code(&self) -> u32 {
        match self {
            ClientOption::ExportName(_) => code::EXPORT_NAME,
            ClientOption::Abort => code::ABORT,
            ClientOption::List => code::LIST,
            ClientOption::StartTls => code::START_TLS,
            ClientOption::Info(_) => code::INFO,
            ClientOption::Go(_) => code::GO,
            ClientOption::StructuredReply => code::STRUCTURED_REPLY,
            ClientOption::Unknown { code, .. } => *code,
        }
    }

    /// Appends the header and the data.
    pub fn encode(&self, to: &mut Vec<u8>) {
        let mut data = Vec::new();
        match self {
            ClientOption::ExportName(name) => data.extend(name.as_str().as_bytes()),
            ClientOption::Info(request) | ClientOption::Go(request) => request.encode(&mut data),
            ClientOption::Unknown { data: unknown, .. } => data.extend(unknown),
            ClientOption::Abort
            | ClientOption::List
            | ClientOption::StartTls
            | ClientOption::StructuredReply => {}
        }
        to.put_u64(OPTION_MAGIC);
        to.put_u32(self.code());
        to.put_length(data.len());
        to.extend(data);
    }

    /// Reads the data of an option, all of it.
    ///
    /// # Errors
    /// When the data does not fit the option. The connection is in order nevertheless.
    pub fn decode(header: OptionHeader, data: &[u8]) -> Result<ClientOption, WireError> {
        let empty = |what, option| match to_u64(data.len()) {
            0 => Ok(option),
            length => Err(WireError::WrongLength { what, length, expected: "0" }),
        };
        match header.code {
            code::EXPORT_NAME => Ok(ClientOption::ExportName(ExportName::decode(data)?)),
            // Whatever it says, the client goes away.
            code::ABORT => Ok(ClientOption::Abort),
            code::LIST => empty("the option LIST", ClientOption::List),
            code::START_TLS => empty("the option STARTTLS", ClientOption::StartTls),
            code::INFO => Ok(ClientOption::Info(InfoRequest::decode(data)?)),
            code::GO => Ok(ClientOption::Go(InfoRequest::decode(data)?)),
            code::STRUCTURED_REPLY => {
                empty("the option STRUCTURED_REPLY", ClientOption::StructuredReply)
            }
            code => Ok(ClientOption::Unknown { code, data: data.to_vec() }),
        }
    }

    /// Reads an option with its data.
    ///
    /// # Errors
    /// When it makes no sense, or has more than [`MAX_OPTION_BYTES`] of data.
    pub fn decode_whole(bytes: &[u8]) -> Result<Decoded<ClientOption>, WireError> {
        let (header, taken) = match OptionHeader::decode(bytes)? {
            Decoded::More(more) => return Ok(Decoded::More(more)),
            Decoded::Value(header, taken) => (header, taken),
        };
        let (length, most) = (u64::from(header.length), to_u64(MAX_OPTION_BYTES));
        if length > most {
            return Err(WireError::TooLong { what: "the data of an option", length, most });
        }
        let end = taken + to_usize(length);
        match bytes.get(taken..end) {
            None => Ok(Decoded::More(end - bytes.len())),
            Some(data) => Ok(Decoded::Value(ClientOption::decode(header, data)?, end)),
        }
    }
}

impl InfoRequest {
    fn encode(&self, to: &mut Vec<u8>) {
        let count = u16::try_from(self.wanted.len()).unwrap_or(u16::MAX);
        to.put_length(self.name.as_str().len());
        to.extend(self.name.as_str().as_bytes());
        to.put_u16(count);
        self.wanted.iter().take(count.into()).for_each(|&kind| to.put_u16(kind));
    }

    fn decode(data: &[u8]) -> Result<InfoRequest, WireError> {
        let mut parts = Parts(data);
        let name = parts.name()?;
        let count = parts.u16("the number of information requests")?;
        let kinds = parts.bytes(2 * usize::from(count), "the list of information requests")?;
        parts.end("an information request")?;
        let wanted = kinds.as_chunks().0.iter().map(|&kind| u16::from_be_bytes(kind)).collect();
        Ok(InfoRequest { name, wanted })
    }
}
