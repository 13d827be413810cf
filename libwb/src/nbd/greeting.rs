//! The first message of each side.

use super::bytes::{Decoded, Parts, Put, WireError, head};
use super::flags::{ClientFlags, HandshakeFlags};

/// `NBDMAGIC`.
const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Length of a greeting in bytes.
pub const GREETING_BYTES: usize = 18;

/// What a server sends first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What it can do.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Appends the message.
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.put_u64(MAGIC);
        to.put_u64(OPTION_MAGIC);
        to.put_u16(self.flags.bits());
    }

    /// Reads the message.
    ///
    /// # Errors
    /// When it is none of this protocol.
    pub fn decode(bytes: &[u8]) -> Result<Decoded<Greeting>, WireError> {
        let bytes: &[u8; GREETING_BYTES] = match head(bytes) {
            Ok(bytes) => bytes,
            Err(more) => return Ok(Decoded::More(more)),
        };
        let mut parts = Parts(bytes);
        let what = "the server's greeting";
        let found = parts.u64(what)?;
        if found != MAGIC {
            return Err(WireError::WrongMagic { what, found, expected: "\"NBDMAGIC\"" });
        }
        match parts.u64(what)? {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(WireError::Oldstyle),
            found => {
                let what = "the second part of the server's greeting";
                return Err(WireError::WrongMagic { what, found, expected: "\"IHAVEOPT\"" });
            }
        }
        let flags = HandshakeFlags::from_bits_retain(parts.u16(what)?);
        Ok(Decoded::Value(Greeting { flags }, GREETING_BYTES))
    }
}

/// Appends a client's answer to the greeting.
pub fn encode_client_flags(flags: ClientFlags, to: &mut Vec<u8>) {
    to.put_u32(flags.bits());
}

/// Reads a client's answer to the greeting.
pub fn decode_client_flags(bytes: &[u8]) -> Decoded<ClientFlags> {
    match head::<4>(bytes) {
        Ok(bytes) => {
            Decoded::Value(ClientFlags::from_bits_retain(u32::from_be_bytes(*bytes)), bytes.len())
        }
        Err(more) => Decoded::More(more),
    }
}
