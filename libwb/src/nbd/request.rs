//! Requests of the transmission phase.

use super::bytes::{Decoded, Parts, Put, WireError, head};
use super::flags::CommandFlags;

const MAGIC: u32 = 0x2560_9513;
/// Length of a request in bytes, without the data of a write.
pub const REQUEST_BYTES: usize = 28;
/// The longest data of a request or of one chunk of a reply that anyone should send, in bytes.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// Send data.
    Read,
    /// Take the data that follows the request.
    Write,
    /// Finish all requests and end. There is no reply.
    Disconnect,
    /// Make everything that was replied to durable.
    Flush,
    /// The client needs the data no more.
    Trim,
    /// Make the range read as zeros.
    WriteZeroes,
    /// Something else. No data follows it.
    Unknown(u16),
}

impl Command {
    fn number(self) -> u16 {
        match self {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::WriteZeroes => 6,
            Command::Unknown(number) => number,
        }
    }

    fn of(number: u16) -> Command {
        match number {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            number => Command::Unknown(number),
        }
    }
}

/// A request. The data of a write follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How to carry it out.
    pub flags: CommandFlags,
    /// What is asked for.
    pub command: Command,
    /// What the reply refers to.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u32,
}

impl Request {
    /// How many bytes of data follow. This is not checked against any maximum.
    pub fn payload(&self) -> u32 {
        if self.command == Command::Write { self.length } else { 0 }
    }

    /// Appends the request.
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.put_u32(MAGIC);
        to.put_u16(self.flags.bits());
        to.put_u16(self.command.number());
        to.put_u64(self.cookie);
        to.put_u64(self.offset);
        to.put_u32(self.length);
    }

    /// Reads a request.
    ///
    /// # Errors
    /// When it begins with another magic number.
    pub fn decode(bytes: &[u8]) -> Result<Decoded<Request>, WireError> {
        let bytes: &[u8; REQUEST_BYTES] = match head(bytes) {
            Ok(bytes) => bytes,
            Err(more) => return Ok(Decoded::More(more)),
        };
        let (mut parts, what) = (Parts(bytes), "a request");
        let found = parts.u32(what)?;
        if found != MAGIC {
            let (found, expected) = (found.into(), "0x25609513");
            return Err(WireError::WrongMagic { what, found, expected });
        }
        let request = Request {
            flags: CommandFlags::from_bits_retain(parts.u16(what)?),
            command: Command::of(parts.u16(what)?),
            cookie: parts.u64(what)?,
            offset: parts.u64(what)?,
            length: parts.u32(what)?,
        };
        Ok(Decoded::Value(request, REQUEST_BYTES))
    }
}
