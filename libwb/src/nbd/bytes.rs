//! What all messages are made of.

use crate::format::to_u64;
use byteorder::{BigEndian, ByteOrder};
use std::fmt;

/// The longest string of the protocol in bytes, such as the name of an export.
pub const MAX_NAME_BYTES: usize = 4096;

/// What decoding made of the bytes that have come so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded<T> {
    /// At least this many more bytes are needed.
    More(usize),
    /// A value, and how many bytes it took.
    Value(T, usize),
}

/// Why bytes are no message of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// A message does not begin with its magic number.
    #[error("{what} begins with {found:#x} instead of {expected}")]
    WrongMagic {
        /// The message.
        what: &'static str,
        /// What came.
        found: u64,
        /// The magic numbers that may come.
        expected: &'static str,
    },
    /// The server speaks the protocol of before 2010.
    #[error("the server speaks the oldstyle protocol; wb needs the fixed newstyle one")]
    Oldstyle,
    /// Something is longer than it may be.
    #[error("{what} is {length} bytes long; at most {most} are allowed")]
    TooLong {
        /// The message, or a part of it.
        what: &'static str,
        /// Its length in bytes.
        length: u64,
        /// The greatest length in bytes.
        most: u64,
    },
    /// Something has another length than its kind demands.
    #[error("{what} has {length} bytes of data instead of {expected}")]
    WrongLength {
        /// The message.
        what: &'static str,
        /// Its length in bytes.
        length: u64,
        /// The lengths that it may have.
        expected: &'static str,
    },
    /// A part reaches beyond the message that it is in.
    #[error("{what} reaches beyond the end of its message")]
    Overrun {
        /// The part.
        what: &'static str,
    },
    /// A message continues after its last part.
    #[error("{what} has {left} bytes after its end")]
    Excess {
        /// The message.
        what: &'static str,
        /// How many bytes are left over.
        left: u64,
    },
    /// A string cannot be the name of an export.
    #[error("{0}")]
    Name(#[from] NameError),
    /// Something must not be zero.
    #[error("{what} is zero")]
    Zero {
        /// The value.
        what: &'static str,
    },
    /// The last chunk of a reply must say that it is the last.
    #[error("an empty chunk does not end its reply")]
    NotDone,
}

/// Why a string cannot be the name of an export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// It is too long.
    #[error("the export name is {0} bytes long; at most {MAX_NAME_BYTES} are allowed")]
    TooLong(usize),
    /// It is not text.
    #[error("the export name is not valid UTF-8")]
    NotUtf8,
    /// It contains a zero byte.
    #[error("the export name contains a zero byte")]
    Zero,
}

/// The name of an export. The empty name means the server's default export.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ExportName(String);

impl ExportName {
    /// Checks a name.
    ///
    /// # Errors
    /// When it is longer than [`MAX_NAME_BYTES`] or contains a zero byte.
    pub fn new(name: impl Into<String>) -> Result<ExportName, NameError> {
        let name = name.into();
        if name.len() > MAX_NAME_BYTES {
            return Err(NameError::TooLong(name.len()));
        }
        if name.contains('\0') { Err(NameError::Zero) } else { Ok(ExportName(name)) }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<ExportName, NameError> {
        if bytes.len() > MAX_NAME_BYTES {
            return Err(NameError::TooLong(bytes.len()));
        }
        ExportName::new(std::str::from_utf8(bytes).map_err(|_| NameError::NotUtf8)?)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The first `N` bytes.
pub(super) fn head<const N: usize>(bytes: &[u8]) -> Result<&[u8; N], usize> {
    bytes.first_chunk().ok_or(N - bytes.len().min(N))
}

/// The parts of a message, one after the other.
pub(super) struct Parts<'a>(pub(super) &'a [u8]);

impl<'a> Parts<'a> {
    pub(super) fn bytes(
        &mut self,
        length: usize,
        what: &'static str,
    ) -> Result<&'a [u8], WireError> {
        let (part, rest) = self.0.split_at_checked(length).ok_or(WireError::Overrun { what })?;
        self.0 = rest;
        Ok(part)
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        self.bytes(2, what).map(BigEndian::read_u16)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        self.bytes(4, what).map(BigEndian::read_u32)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        self.bytes(8, what).map(BigEndian::read_u64)
    }

    /// A name with its length before it.
    pub(super) fn name(&mut self) -> Result<ExportName, WireError> {
        let length = self.u32("the length of a name")?;
        Ok(ExportName::decode(self.bytes(length as usize, "a name")?)?)
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub(super) fn end(&self, what: &'static str) -> Result<(), WireError> {
        let left = to_u64(self.0.len());
        if left == 0 { Ok(()) } else { Err(WireError::Excess { what, left }) }
    }
}

/// Appends parts to a message.
pub(super) trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);

    /// Appends a length, or `u32::MAX` if it is larger than that.
    fn put_length(&mut self, length: usize) {
        self.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    }
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend(value.to_be_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend(value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend(value.to_be_bytes());
    }
}

/// The first part of a text that may be sent.
pub(super) fn sendable(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_NAME_BYTES)]
}

/// What a person may read of a text that came.
pub(super) fn readable(bytes: &[u8]) -> String {
    sendable(&String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_NAME_BYTES)])).into()
}
