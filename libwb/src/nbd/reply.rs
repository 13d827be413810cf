//! Replies of the transmission phase: simple ones, and the chunks of structured ones.

use super::bytes::{Decoded, MAX_NAME_BYTES, Parts, Put, WireError, head, readable, sendable};
use super::errors::{errno_of, error_of};
use super::request::MAX_PAYLOAD_BYTES;
use nix::errno::Errno;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// Length of a simple reply in bytes, without the data of a read.
pub const SIMPLE_REPLY_BYTES: usize = 16;
const CHUNK_BYTES: usize = 20;
/// The flag of the last chunk of a reply.
const DONE: u16 = 1;

mod kind {
    pub(super) const NONE: u16 = 0;
    pub(super) const OFFSET_DATA: u16 = 1;
    pub(super) const OFFSET_HOLE: u16 = 2;
    /// Set in those that are errors.
    pub(super) const ERROR: u16 = 1 << 15;
    pub(super) const JUST_ERROR: u16 = ERROR + 1;
    pub(super) const ERROR_OFFSET: u16 = ERROR + 2;
}

/// Lengths that the data of a chunk may have, in bytes.
mod length {
    use super::{MAX_NAME_BYTES, MAX_PAYLOAD_BYTES};

    pub(super) const MAX_DATA: u32 = 8 + MAX_PAYLOAD_BYTES;
    pub(super) const HOLE: u32 = 12;
    /// A message, an offset, and what future kinds of errors may add.
    pub(super) const MAX_ERROR: u32 = 4096 + 64;
    const _: () = assert!(MAX_ERROR as usize > 6 + MAX_NAME_BYTES + 8);
}

/// A reply, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The whole reply. If a read succeeded, its data follows.
    Simple {
        /// Which request it answers.
        cookie: u64,
        /// How the request ended.
        result: Result<(), Errno>,
    },
    /// A part of a structured reply.
    Chunk {
        /// Which request it answers.
        cookie: u64,
        /// No further chunk follows for this request.
        done: bool,
        /// What it says.
        chunk: Chunk,
    },
}

/// A part of a structured reply. Offsets are those on the export, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Chunk {
    /// Nothing. If no error came before, the request succeeded.
    Nothing,
    /// Data of a read follows this chunk.
    Data {
        /// Where the data belongs.
        offset: u64,
        /// How much follows: 1 to [`MAX_PAYLOAD_BYTES`].
        length: u32,
    },
    /// Data of a read that is zeros.
    Hole {
        /// Where they belong.
        offset: u64,
        /// How many bytes, which nothing bounds; not 0.
        length: u32,
    },
    /// The request failed, perhaps after other chunks.
    Error {
        /// Why.
        errno: Errno,
        /// Text for people.
        message: String,
        /// Where, if it says so.
        offset: Option<u64>,
    },
    /// Something else, and no error. Data follows it.
    Unknown {
        /// Its kind.
        kind: u16,
        /// Length of its data in bytes, which nothing bounds.
        length: u32,
    },
}

impl Chunk {
    fn kind(&self) -> u16 {
        match self {
            Chunk::Nothing => kind::NONE,
            Chunk::Data { .. } => kind::OFFSET_DATA,
            Chunk::Hole { .. } => kind::OFFSET_HOLE,
            Chunk::Error { offset: None, .. } => kind::JUST_ERROR,
            Chunk::Error { offset: Some(_), .. } => kind::ERROR_OFFSET,
            Chunk::Unknown { kind, .. } => *kind,
        }
    }

    /// Appends the length of the data, and the data without what follows the chunk.
    fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Chunk::Nothing => to.put_u32(0),
            Chunk::Data { offset, length } => {
                to.put_u32(length.saturating_add(8));
                to.put_u64(*offset);
            }
            Chunk::Hole { offset, length } => {
                to.put_u32(length::HOLE);
                to.put_u64(*offset);
                to.put_u32(*length);
            }
            Chunk::Error { errno, message, offset } => {
                let message = sendable(message);
                to.put_length(6 + message.len() + offset.map_or(0, |_| 8));
                to.put_u32(error_of(*errno));
                to.put_u16(u16::try_from(message.len()).unwrap_or_default());
                to.extend(message.as_bytes());
                offset.iter().for_each(|&offset| to.put_u64(offset));
            }
            Chunk::Unknown { length, .. } => to.put_u32(*length),
        }
    }
}

impl Reply {
    /// Appends the reply. The caller appends data that follows it.
    pub fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Reply::Simple { cookie, result } => {
                to.put_u32(SIMPLE_MAGIC);
                to.put_u32(result.map_or_else(error_of, |()| 0));
                to.put_u64(*cookie);
            }
            Reply::Chunk { cookie, done, chunk } => {
                to.put_u32(CHUNK_MAGIC);
                to.put_u16(if *done { DONE } else { 0 });
                to.put_u16(chunk.kind());
                to.put_u64(*cookie);
                chunk.encode(to);
            }
        }
    }

    /// Reads a reply, without the data that follows it.
    ///
    /// # Errors
    /// When it is none, or its length does not fit its kind.
    pub fn decode(bytes: &[u8]) -> Result<Decoded<Reply>, WireError> {
        let magic: &[u8; 4] = match head(bytes) {
            Ok(magic) => magic,
            Err(_) => return Ok(Decoded::More(SIMPLE_REPLY_BYTES - bytes.len())),
        };
        match u32::from_be_bytes(*magic) {
            SIMPLE_MAGIC => decode_simple(bytes),
            CHUNK_MAGIC => decode_chunk(bytes),
            found => Err(WireError::WrongMagic {
                what: "a reply",
                found: found.into(),
                expected: "0x67446698 or 0x668e33ef",
            }),
        }
    }
}

fn decode_simple(bytes: &[u8]) -> Result<Decoded<Reply>, WireError> {
    let bytes: &[u8; SIMPLE_REPLY_BYTES] = match head(bytes) {
        Ok(bytes) => bytes,
        Err(more) => return Ok(Decoded::More(more)),
    };
    let (mut parts, what) = (Parts(&bytes[4..]), "a reply");
    let result = match parts.u32(what)? {
        0 => Ok(()),
        error => Err(errno_of(error)),
    };
    let reply = Reply::Simple { cookie: parts.u64(what)?, result };
    Ok(Decoded::Value(reply, SIMPLE_REPLY_BYTES))
}

fn decode_chunk(bytes: &[u8]) -> Result<Decoded<Reply>, WireError> {
    let header: &[u8; CHUNK_BYTES] = match head(bytes) {
        Ok(header) => header,
        Err(more) => return Ok(Decoded::More(more)),
    };
    let (mut parts, what) = (Parts(&header[4..]), "a chunk");
    let (flags, kind) = (parts.u16(what)?, parts.u16(what)?);
    let (cookie, length) = (parts.u64(what)?, parts.u32(what)?);
    let done = flags & DONE != 0;
    let own = own_length(kind, length, done)? as usize;
    let end = CHUNK_BYTES + own;
    let Some(data) = bytes.get(CHUNK_BYTES..end) else {
        return Ok(Decoded::More(end - bytes.len()));
    };
    let chunk = chunk_of(kind, length, &mut Parts(data))?;
    Ok(Decoded::Value(Reply::Chunk { cookie, done, chunk }, end))
}

/// How much of the data of a chunk belongs to its value, in bytes. Checks the length of all of it.
fn own_length(kind: u16, length: u32, done: bool) -> Result<u32, WireError> {
    let wrong =
        |what, expected| Err(WireError::WrongLength { what, length: length.into(), expected });
    let too_long = |what, most: u32| {
        Err(WireError::TooLong { what, length: length.into(), most: most.into() })
    };
    match (kind, length) {
        (kind::NONE, 0) if !done => Err(WireError::NotDone),
        (kind::NONE, 0) => Ok(0),
        (kind::NONE, _) => wrong("an empty chunk", "0"),
        (kind::OFFSET_DATA, 0..=8) => wrong("a chunk of data", "9 or more"),
        (kind::OFFSET_DATA, 9..=length::MAX_DATA) => Ok(8),
        (kind::OFFSET_DATA, _) => too_long("a chunk of data", length::MAX_DATA),
        (kind::OFFSET_HOLE, length::HOLE) => Ok(length::HOLE),
        (kind::OFFSET_HOLE, _) => wrong("a chunk of zeros", "12"),
        (kind::ERROR.., 0..=5) => wrong("an error chunk", "6 or more"),
        (kind::ERROR.., 6..=length::MAX_ERROR) => Ok(length),
        (kind::ERROR.., _) => too_long("an error chunk", length::MAX_ERROR),
        _ => Ok(0),
    }
}

fn chunk_of(kind: u16, length: u32, parts: &mut Parts<'_>) -> Result<Chunk, WireError> {
    let what = "a part of a chunk";
    Ok(match kind {
        kind::NONE => Chunk::Nothing,
        kind::OFFSET_DATA => Chunk::Data { offset: parts.u64(what)?, length: length - 8 },
        kind::OFFSET_HOLE => {
            let (offset, length) = (parts.u64(what)?, parts.u32(what)?);
            if length == 0 {
                return Err(WireError::Zero { what: "the length of a chunk of zeros" });
            }
            Chunk::Hole { offset, length }
        }
        kind::ERROR.. => {
            let (error, length) = (parts.u32(what)?, parts.u16(what)?);
            if error == 0 {
                return Err(WireError::Zero { what: "the error of an error chunk" });
            }
            let message = readable(parts.bytes(length.into(), "the message of an error chunk")?);
            let is_somewhere = kind == kind::ERROR_OFFSET;
            let offset = is_somewhere.then(|| parts.u64("the offset of an error chunk"));
            Chunk::Error { errno: errno_of(error), message, offset: offset.transpose()? }
        }
        kind => Chunk::Unknown { kind, length },
    })
}
