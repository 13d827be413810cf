//! CRC-32C (Castagnoli; initial value and final xor all ones), computed piece by piece.

use super::geometry::BLOCK_BYTES;
use std::ops::BitXor;
use std::sync::LazyLock;

/// How each byte of a CRC changes when a block with the CRC zero is appended. This change is
/// linear, so the XOR of four entries is the new CRC. The library does it bit by bit, which is far
/// slower.
static PAST_BLOCK: LazyLock<[[u32; 256]; 4]> = LazyLock::new(|| {
    let of = |byte: usize, value: u8| {
        let mut crc = [0; 4];
        crc[byte] = value;
        ::crc32c::crc32c_combine(u32::from_le_bytes(crc), 0, BLOCK_BYTES)
    };
    std::array::from_fn(|byte| {
        std::array::from_fn(|value| of(byte, u8::try_from(value).unwrap_or(u8::MAX)))
    })
});

/// CRC-32C of a byte range.
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

/// A CRC-32C that grows as ranges are appended to it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksum(u32);

impl Checksum {
    /// Appends bytes.
    #[must_use]
    pub fn append(self, bytes: &[u8]) -> Checksum {
        Checksum(::crc32c::crc32c_append(self.0, bytes))
    }

    /// Appends a block, given only its CRC-32C.
    #[must_use]
    pub fn append_block_crc(self, crc: u32) -> Checksum {
        let past_block: u32 = (0..4)
            .map(|byte| PAST_BLOCK[byte][usize::from(self.0.to_le_bytes()[byte])])
            .fold(0, BitXor::bitxor);
        Checksum(past_block ^ crc)
    }

    /// The CRC-32C of all that was appended.
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
    }

    #[test]
    fn the_crc_of_a_block_does_instead_of_its_bytes() {
        let block: Vec<u8> = (0..BLOCK_BYTES).map(|at| (at * 7 % 251).to_le_bytes()[0]).collect();
        for before in [&b""[..], b"1234", &block] {
            let sum = Checksum::default().append(before);
            assert_eq!(sum.append_block_crc(crc32c(&block)).value(), sum.append(&block).value());
        }
    }
}
