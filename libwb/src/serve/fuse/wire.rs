//! The messages of the kernel's FUSE protocol (linux/fuse.h), as far as a single file needs them:
//! bytes to values and back. Numbers are in the machine's own byte order.

use byteorder::{ByteOrder, NativeEndian};
use nix::errno::Errno;

/// The version of the protocol. A kernel of the same major version understands it.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
const HEADER: usize = 40;
/// How long the kernel may cache what it was told about the file, which never changes: seconds.
const FOREVER: u64 = 1 << 31;

/// Among the flags of the kernel: a second word of flags follows.
const HAS_MORE_FLAGS: u32 = 1 << 30;
/// In the second word: [`resend`] works (Linux 6.9).
const HAS_RESEND: u32 = 1 << (39 - 32);

/// A request of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    /// What the answer refers to.
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) call: Call<'a>,
}

/// What the kernel asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Call<'a> {
    Init {
        major: u32,
        readahead: u32,
        flags: u32,
        /// The kernel can hand out requests again.
        can_resend: bool,
    },
    Lookup {
        name: &'a [u8],
    },
    Attributes,
    Open,
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
    },
    Sync,
    Allocate {
        offset: u64,
        length: u64,
        mode: u32,
    },
    Statistics,
    /// A file is closed, or the mount ends: there is nothing to do.
    Close,
    /// The kernel wants no answer.
    Forget,
    Unknown,
}

/// The arguments of a message, which may be cut short.
struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    fn u32_at(&self, at: usize) -> Option<u32> {
        self.0.get(at..at + 4).map(NativeEndian::read_u32)
    }

    fn u64_at(&self, at: usize) -> Option<u64> {
        self.0.get(at..at + 8).map(NativeEndian::read_u64)
    }

    fn from(&self, at: usize) -> Option<&'a [u8]> {
        self.0.get(at..)
    }
}

impl Message<'_> {
    /// Reads a message; `None` if it is none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Message<'_>> {
        let header = bytes.get(..HEADER)?;
        if NativeEndian::read_u32(header) as usize != bytes.len() {
            return None;
        }
        let unique = NativeEndian::read_u64(&header[8..]);
        let node = NativeEndian::read_u64(&header[16..]);
        let call = decode_call(NativeEndian::read_u32(&header[4..]), &bytes[HEADER..])?;
        Some(Message { unique, node, call })
    }
}

/// The number of a request that cannot be understood, if it says one.
pub(super) fn unique(bytes: &[u8]) -> Option<u64> {
    bytes.get(..HEADER).map(|header| NativeEndian::read_u64(&header[8..]))
}

fn decode_call(code: u32, arguments: &[u8]) -> Option<Call<'_>> {
    let it = Arguments(arguments);
    Some(match code {
        1 => Call::Lookup { name: it.from(0)?.strip_suffix(&[0])? },
        2 | 42 => Call::Forget,
        3 => Call::Attributes,
        14 => Call::Open,
        15 => Call::Read { offset: it.u64_at(8)?, size: it.u32_at(16)? },
        16 => {
            let (data, size) = (it.from(40)?, it.u32_at(16)?);
            (data.len() == size as usize).then_some(Call::Write { offset: it.u64_at(8)?, data })?
        }
        17 => Call::Statistics,
        18 | 25 | 38 => Call::Close,
        20 => Call::Sync,
        26 => Call::Init {
            major: it.u32_at(0)?,
            readahead: it.u32_at(8)?,
            flags: it.u32_at(12)?,
            can_resend: it.u32_at(12)? & HAS_MORE_FLAGS != 0
                && it.u32_at(16).is_some_and(|more| more & HAS_RESEND != 0),
        },
        43 => {
            Call::Allocate { offset: it.u64_at(8)?, length: it.u64_at(16)?, mode: it.u32_at(24)? }
        }
        _ => Call::Unknown,
    })
}

/// The header of an answer: to what, how it ended, and how many bytes follow.
pub(super) fn answer(unique: u64, ended: Result<(), Errno>, length: usize) -> [u8; 16] {
    let mut it = [0; 16];
    NativeEndian::write_u32(&mut it, u32::try_from(16 + length).unwrap_or(u32::MAX));
    NativeEndian::write_i32(&mut it[4..], ended.map_or_else(|errno| -(errno as i32), |()| 0));
    NativeEndian::write_u64(&mut it[8..], unique);
    it
}

/// The notice upon which the kernel hands out again all requests that were not answered.
pub(super) fn resend() -> [u8; 16] {
    const NOTIFY_RESEND: i32 = 7;
    let mut it = [0; 16];
    NativeEndian::write_u32(&mut it, 16);
    NativeEndian::write_i32(&mut it[4..], NOTIFY_RESEND);
    it
}

/// What the connection is to be like. Lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) max_request: u32,
    /// Requests that the kernel keeps in flight.
    pub(super) in_flight: u16,
}

/// The answer to [`Call::Init`], with those of the kernel's `flags` that are wanted.
pub(super) fn init(readahead: u32, flags: u32, limits: Limits) -> [u8; 64] {
    const ASYNC_READ: u32 = 1;
    const BIG_WRITES: u32 = 1 << 5;
    const ASYNC_DIO: u32 = 1 << 15;
    const MAX_PAGES: u32 = 1 << 22;
    let wanted = ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES;
    let pages = limits.max_request as usize / rustix::param::page_size();
    let mut it = [0; 64];
    NativeEndian::write_u32(&mut it[0..], MAJOR);
    NativeEndian::write_u32(&mut it[4..], MINOR);
    NativeEndian::write_u32(&mut it[8..], readahead);
    NativeEndian::write_u32(&mut it[12..], flags & wanted);
    NativeEndian::write_u16(&mut it[16..], limits.in_flight);
    NativeEndian::write_u16(&mut it[18..], limits.in_flight); // when to call it congested
    NativeEndian::write_u32(&mut it[20..], limits.max_request);
    NativeEndian::write_u32(&mut it[24..], 1); // granularity of times: nanoseconds
    NativeEndian::write_u16(&mut it[28..], u16::try_from(pages).unwrap_or(u16::MAX));
    it
}

/// What the kernel is told about the file, or about its folder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) node: u64,
    /// Size in bytes.
    pub(super) size: u64,
    /// File type and permissions, as in `st_mode`.
    pub(super) mode: u32,
    /// The preferred unit of I/O in bytes.
    pub(super) unit: u32,
}

impl Attributes {
    fn write(&self, it: &mut [u8]) {
        NativeEndian::write_u64(&mut it[0..], self.node);
        NativeEndian::write_u64(&mut it[8..], self.size);
        NativeEndian::write_u64(&mut it[16..], self.size / 512);
        NativeEndian::write_u32(&mut it[60..], self.mode);
        NativeEndian::write_u32(&mut it[64..], 1); // links
        NativeEndian::write_u32(&mut it[80..], self.unit);
    }

    /// The answer to [`Call::Attributes`].
    pub(super) fn encode(&self) -> [u8; 104] {
        let mut it = [0; 104];
        NativeEndian::write_u64(&mut it, FOREVER);
        self.write(&mut it[16..]);
        it
    }

    /// The answer to [`Call::Lookup`].
    pub(super) fn entry(&self) -> [u8; 128] {
        let mut it = [0; 128];
        NativeEndian::write_u64(&mut it[0..], self.node);
        NativeEndian::write_u64(&mut it[16..], FOREVER); // the name
        NativeEndian::write_u64(&mut it[24..], FOREVER); // the attributes
        self.write(&mut it[40..]);
        it
    }
}

/// The answer to [`Call::Open`]: I/O goes past the page cache, and writes need not wait for each
/// other.
pub(super) fn opened() -> [u8; 16] {
    const DIRECT_IO: u32 = 1;
    const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    let mut it = [0; 16];
    NativeEndian::write_u32(&mut it[8..], DIRECT_IO | PARALLEL_DIRECT_WRITES);
    it
}

/// The answer to [`Call::Write`]: how many bytes were written.
pub(super) fn written(bytes: usize) -> [u8; 8] {
    let mut it = [0; 8];
    NativeEndian::write_u32(&mut it, u32::try_from(bytes).unwrap_or(u32::MAX));
    it
}

/// The answer to [`Call::Statistics`].
pub(super) fn statistics() -> [u8; 80] {
    let mut it = [0; 80];
    NativeEndian::write_u32(&mut it[40..], 512); // block size
    NativeEndian::write_u32(&mut it[44..], 255); // longest name
    it
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(code: u32, arguments: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        NativeEndian::write_u32(&mut bytes, u32::try_from(HEADER + arguments.len()).unwrap());
        NativeEndian::write_u32(&mut bytes[4..], code);
        NativeEndian::write_u64(&mut bytes[8..], 77);
        NativeEndian::write_u64(&mut bytes[16..], 2);
        bytes.extend(arguments);
        bytes
    }

    #[test]
    fn a_write_is_read_with_its_data_and_not_if_that_is_cut_short() {
        let mut arguments = vec![0; 40];
        NativeEndian::write_u64(&mut arguments[8..], 4096);
        NativeEndian::write_u32(&mut arguments[16..], 3);
        arguments.extend(b"abc");
        let bytes = message(16, &arguments);
        let call = Call::Write { offset: 4096, data: b"abc" };
        assert_eq!(Message::decode(&bytes), Some(Message { unique: 77, node: 2, call }));
        for length in 0..bytes.len() {
            assert_eq!(Message::decode(&bytes[..length]), None, "{length} bytes");
        }
        assert_eq!(Message::decode(&message(16, &arguments[..42])), None);
    }

    #[test]
    fn names_end_with_a_zero_and_unknown_calls_are_known_as_such() {
        let named = message(1, b"volume.wb\0");
        assert_eq!(Message::decode(&named).unwrap().call, Call::Lookup { name: b"volume.wb" });
        assert_eq!(Message::decode(&message(1, b"volume.wb")), None);
        assert_eq!(Message::decode(&message(9999, b"")).unwrap().call, Call::Unknown);
    }

    #[test]
    fn a_kernel_that_can_hand_out_requests_again_says_so_in_its_second_word_of_flags() {
        let can_resend = |words: &[u32]| {
            let mut arguments = vec![0; words.len() * 4];
            NativeEndian::write_u32_into(words, &mut arguments);
            let Call::Init { can_resend, .. } = Message::decode(&message(26, &arguments))?.call
            else {
                panic!("another call")
            };
            Some(can_resend)
        };
        assert_eq!(can_resend(&[7, 41, 0, HAS_MORE_FLAGS, HAS_RESEND]), Some(true));
        assert_eq!(can_resend(&[7, 41, 0, 0, HAS_RESEND]), Some(false));
        assert_eq!(can_resend(&[7, 31, 0, HAS_MORE_FLAGS]), Some(false));
        assert_eq!(can_resend(&[7, 31, 0]), None);
    }

    #[test]
    fn the_kernel_is_promised_only_what_it_offers() {
        let limits = Limits { max_request: 1 << 20, in_flight: 256 };
        let all = init(1 << 17, u32::MAX, limits);
        assert_eq!(NativeEndian::read_u32(&all[12..]), 1 | 1 << 5 | 1 << 15 | 1 << 22);
        assert_eq!(NativeEndian::read_u32(&init(0, 1, limits)[12..]), 1);
        assert_eq!(NativeEndian::read_u32(&all[20..]), 1 << 20);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_none(bytes: Vec<u8>, code in 0u32..50) {
            let _ = Message::decode(&bytes);
            let _ = Message::decode(&message(code, &bytes));
        }
    }
}
