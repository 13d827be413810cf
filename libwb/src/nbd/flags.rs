//! The flags of the protocol. Unknown ones are kept.

use bitflags::bitflags;

bitflags! {
    /// What a server says in its greeting.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// It speaks the fixed newstyle protocol.
        const FIXED_NEWSTYLE = 1 << 0;
        /// It can leave out the zeros after its reply to `EXPORT_NAME`.
        const NO_ZEROES = 1 << 1;
        const _ = !0;
    }

    /// What a client answers to the greeting.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// It speaks the fixed newstyle protocol.
        const FIXED_NEWSTYLE = 1 << 0;
        /// It wants no zeros after the reply to `EXPORT_NAME`.
        const NO_ZEROES = 1 << 1;
        const _ = !0;
    }

    /// What a server can do with an export.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1 << 0;
        /// It takes no writes.
        const READ_ONLY = 1 << 1;
        /// It knows `FLUSH`.
        const SEND_FLUSH = 1 << 2;
        /// It knows [`CommandFlags::FUA`].
        const SEND_FUA = 1 << 3;
        /// It is a disk that turns.
        const ROTATIONAL = 1 << 4;
        /// It knows `TRIM`.
        const SEND_TRIM = 1 << 5;
        /// It knows `WRITE_ZEROES` and [`CommandFlags::NO_HOLE`].
        const SEND_WRITE_ZEROES = 1 << 6;
        /// It knows [`CommandFlags::DF`].
        const SEND_DF = 1 << 7;
        /// A flush on one connection covers what other connections have written.
        const CAN_MULTI_CONN = 1 << 8;
        /// It knows `CACHE`.
        const SEND_CACHE = 1 << 10;
        /// It knows [`CommandFlags::FAST_ZERO`].
        const SEND_FAST_ZERO = 1 << 11;
        const _ = !0;
    }

    /// How a request is to be carried out.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Force unit access: what is written is durable before the reply.
        const FUA = 1 << 0;
        /// What is zeroed stays allocated.
        const NO_HOLE = 1 << 1;
        /// The data of a read is not split into several chunks.
        const DF = 1 << 2;
        /// Zeroing fails at once unless it is faster than writing.
        const FAST_ZERO = 1 << 4;
        const _ = !0;
    }
}
