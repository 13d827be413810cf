//! CRC-32C (Castagnoli; initial value and final xor all ones), over ranges that come in pieces.

/// CRC-32C of a byte range.
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

/// A CRC-32C that grows as ranges are appended to it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksum(u32);

impl Checksum {
    /// Takes in the bytes that follow.
    #[must_use]
    pub fn append(self, bytes: &[u8]) -> Checksum {
        Checksum(::crc32c::crc32c_append(self.0, bytes))
    }

    /// Takes in `length` bytes that follow, of which only the CRC-32C is known.
    #[must_use]
    pub fn append_crc(self, crc: u32, length: usize) -> Checksum {
        Checksum(::crc32c::crc32c_combine(self.0, crc, length))
    }

    /// The CRC-32C of everything taken in.
    pub fn value(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(Checksum::default().append(b"1234").append(b"56789").value(), 0xe306_9283);
        assert_eq!(Checksum::default().append(b"1234").append_crc(crc32c(b"56789"), 5).value(), 0xe306_9283);
    }
}
