//! Every message survives a round trip, is asked for while it is cut short, and no garbage does
//! harm.

use super::*;
use nix::errno::Errno;
use proptest::collection::vec;
use proptest::prelude::*;
use std::fmt::Debug;

/// The bytes of a value decode to it, and to nothing while they are cut short.
fn survives<T: PartialEq + Debug>(
    value: &T,
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<Decoded<T>, WireError>,
) -> Result<(), TestCaseError> {
    for length in 0..bytes.len() {
        match decode(&bytes[..length]) {
            Ok(Decoded::More(more)) => prop_assert!(0 < more && more <= bytes.len() - length),
            other => return Err(TestCaseError::fail(format!("{length} bytes: {other:?}"))),
        }
    }
    let more = [bytes, b"and what follows"].concat();
    match decode(&more) {
        Ok(Decoded::Value(decoded, taken)) => {
            prop_assert_eq!(&decoded, value);
            prop_assert_eq!(taken, bytes.len());
        }
        other => return Err(TestCaseError::fail(format!("{value:?} decodes to {other:?}"))),
    }
    Ok(())
}

fn name() -> impl Strategy<Value = ExportName> {
    "[^\0]{0,40}".prop_map(|name| ExportName::new(name).unwrap())
}

fn info_request() -> impl Strategy<Value = InfoRequest> {
    (name(), vec(any::<u16>(), 0..5)).prop_map(|(name, wanted)| InfoRequest { name, wanted })
}

fn option() -> impl Strategy<Value = ClientOption> {
    prop_oneof![
        name().prop_map(ClientOption::ExportName),
        Just(ClientOption::Abort),
        Just(ClientOption::List),
        Just(ClientOption::StartTls),
        info_request().prop_map(ClientOption::Info),
        info_request().prop_map(ClientOption::Go),
        Just(ClientOption::StructuredReply),
        (9u32.., vec(any::<u8>(), 0..50))
            .prop_map(|(code, data)| ClientOption::Unknown { code, data }),
    ]
}

fn export() -> impl Strategy<Value = Export> {
    (any::<u64>(), any::<u16>()).prop_map(|(size, flags)| Export {
        size,
        flags: TransmissionFlags::from_bits_retain(flags),
    })
}

fn info() -> impl Strategy<Value = Info> {
    let sizes = (any::<u32>(), any::<u32>(), any::<u32>());
    prop_oneof![
        export().prop_map(Info::Export),
        name().prop_map(Info::Name),
        "\\PC{0,40}".prop_map(Info::Description),
        sizes.prop_map(|(minimum, preferred, maximum)| {
            Info::BlockSize(BlockSizes { minimum, preferred, maximum })
        }),
        (4u16.., vec(any::<u8>(), 0..50)).prop_map(|(kind, data)| Info::Unknown { kind, data }),
    ]
}

fn option_error() -> impl Strategy<Value = OptionError> {
    prop_oneof![
        Just(OptionError::Unsupported),
        Just(OptionError::Policy),
        Just(OptionError::Invalid),
        Just(OptionError::Platform),
        Just(OptionError::TlsRequired),
        Just(OptionError::UnknownExport),
        Just(OptionError::Shutdown),
        Just(OptionError::BlockSizeRequired),
        Just(OptionError::TooBig),
        ((1u32 << 31) + 10..).prop_map(OptionError::Other),
    ]
}

fn option_reply() -> impl Strategy<Value = OptionReply> {
    prop_oneof![
        Just(OptionReply::Ack),
        (name(), "\\PC{0,40}").prop_map(|(name, details)| OptionReply::Server { name, details }),
        info().prop_map(OptionReply::Info),
        (option_error(), "\\PC{0,40}")
            .prop_map(|(error, message)| OptionReply::Error { error, message }),
        (4u32..1 << 31, vec(any::<u8>(), 0..50))
            .prop_map(|(kind, data)| OptionReply::Unknown { kind, data }),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    let command = prop_oneof![
        Just(Command::Read),
        Just(Command::Write),
        Just(Command::Disconnect),
        Just(Command::Flush),
        Just(Command::Trim),
        Just(Command::WriteZeroes),
        (7u16..).prop_map(Command::Unknown),
    ];
    let numbers = (any::<u16>(), any::<u64>(), any::<u64>(), any::<u32>());
    (command, numbers).prop_map(|(command, (flags, cookie, offset, length))| Request {
        flags: CommandFlags::from_bits_retain(flags),
        command,
        cookie,
        offset,
        length,
    })
}

const ERRORS: [Errno; 8] = [
    Errno::EPERM,
    Errno::EIO,
    Errno::ENOMEM,
    Errno::EINVAL,
    Errno::ENOSPC,
    Errno::EOVERFLOW,
    Errno::EOPNOTSUPP,
    Errno::ESHUTDOWN,
];

fn errno() -> impl Strategy<Value = Errno> {
    prop::sample::select(&ERRORS[..])
}

fn chunk() -> impl Strategy<Value = Chunk> {
    prop_oneof![
        (any::<u64>(), 1..=MAX_PAYLOAD_BYTES)
            .prop_map(|(offset, length)| Chunk::Data { offset, length }),
        (any::<u64>(), 1u32..).prop_map(|(offset, length)| Chunk::Hole { offset, length }),
        (errno(), "\\PC{0,40}", any::<Option<u64>>())
            .prop_map(|(errno, message, offset)| Chunk::Error { errno, message, offset }),
        (3u16..1 << 15, any::<u32>()).prop_map(|(kind, length)| Chunk::Unknown { kind, length }),
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    let result = prop_oneof![Just(Ok(())), errno().prop_map(Err)];
    prop_oneof![
        (any::<u64>(), result).prop_map(|(cookie, result)| Reply::Simple { cookie, result }),
        any::<u64>().prop_map(|cookie| {
            let chunk = Chunk::Nothing;
            Reply::Chunk { cookie, done: true, chunk }
        }),
        (any::<u64>(), any::<bool>(), chunk()).prop_map(|(cookie, done, chunk)| Reply::Chunk {
            cookie,
            done,
            chunk
        }),
    ]
}

proptest! {
    #[test]
    fn greetings(server: u16, client: u32) {
        let mut bytes = Vec::new();
        let greeting = Greeting { flags: HandshakeFlags::from_bits_retain(server) };
        greeting.encode(&mut bytes);
        survives(&greeting, &bytes, Greeting::decode)?;
        bytes.clear();
        let flags = ClientFlags::from_bits_retain(client);
        encode_client_flags(flags, &mut bytes);
        survives(&flags, &bytes, |bytes| Ok(decode_client_flags(bytes)))?;
    }

    #[test]
    fn options(option in option()) {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        survives(&option, &bytes, ClientOption::decode_whole)?;
    }

    #[test]
    fn option_replies(reply in option_reply(), to: u32) {
        let mut bytes = Vec::new();
        reply.encode(to, &mut bytes);
        survives(&(to, reply), &bytes, OptionReply::decode)?;
    }

    #[test]
    fn exports(export in export(), no_zeroes: bool) {
        let mut bytes = Vec::new();
        encode_export(&export, no_zeroes, &mut bytes);
        survives(&export, &bytes, |bytes| Ok(decode_export(bytes, no_zeroes)))?;
    }

    #[test]
    fn requests(request in request()) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        survives(&request, &bytes, Request::decode)?;
    }

    #[test]
    fn replies(reply in reply()) {
        let mut bytes = Vec::new();
        reply.encode(&mut bytes);
        survives(&reply, &bytes, Reply::decode)?;
    }

    #[test]
    fn garbage_does_no_harm(
        mut bytes: Vec<u8>,
        from in prop_oneof![
            option().prop_map(|it| { let mut to = Vec::new(); it.encode(&mut to); to }),
            option_reply().prop_map(|it| { let mut to = Vec::new(); it.encode(7, &mut to); to }),
            reply().prop_map(|it| { let mut to = Vec::new(); it.encode(&mut to); to }),
        ],
        kept: prop::sample::Index,
    ) {
        // What follows a head that is right is garbage, too.
        bytes.splice(0..0, from[..kept.index(from.len() + 1)].iter().copied());
        let _ = Greeting::decode(&bytes);
        let _ = decode_client_flags(&bytes);
        let _ = ClientOption::decode_whole(&bytes);
        let _ = OptionReply::decode(&bytes);
        let _ = decode_export(&bytes, true);
        let _ = Request::decode(&bytes);
        let _ = Reply::decode(&bytes);
    }
}

#[test]
fn what_is_too_long_is_refused_before_it_has_come() {
    let mut bytes = Vec::new();
    OptionReply::Ack.encode(3, &mut bytes);
    bytes[16..].copy_from_slice(&u32::MAX.to_be_bytes());
    let error = OptionReply::decode(&bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the reply to an option is 4294967295 bytes long; at most 8256 are allowed"
    );
    for kind in [1u16, 1 << 15 | 1, 1 << 15 | 99] {
        let mut bytes = Vec::new();
        let chunk = Chunk::Unknown { kind, length: u32::MAX };
        Reply::Chunk { cookie: 1, done: true, chunk }.encode(&mut bytes);
        let error = Reply::decode(&bytes).unwrap_err();
        assert!(matches!(error, WireError::TooLong { length: 0xffff_ffff, .. }), "{error}");
    }
}

#[test]
fn errors_say_what_came_and_what_was_expected() {
    let oldstyle = [&b"NBDMAGIC"[..], &0x0000_4202_8186_1253u64.to_be_bytes(), &[0; 2]].concat();
    assert_eq!(Greeting::decode(&oldstyle), Err(WireError::Oldstyle));
    let http = Greeting::decode(b"HTTP/1.1 400 Bad Request").unwrap_err();
    assert_eq!(
        http.to_string(),
        "the server's greeting begins with 0x485454502f312e31 instead of \"NBDMAGIC\""
    );
    let header = OptionHeader { code: 7, length: 10 };
    let overrun = ClientOption::decode(header, b"\0\0\0\x09abcdef").unwrap_err();
    assert_eq!(overrun.to_string(), "a name reaches beyond the end of its message");
    let header = OptionHeader { code: 3, length: 2 };
    let data = ClientOption::decode(header, b"ab").unwrap_err();
    assert_eq!(data.to_string(), "the option LIST has 2 bytes of data instead of 0");
    let unending = Reply::Chunk { cookie: 1, done: false, chunk: Chunk::Nothing };
    let mut bytes = Vec::new();
    unending.encode(&mut bytes);
    assert_eq!(Reply::decode(&bytes), Err(WireError::NotDone));
}

#[test]
fn a_new_kind_of_error_is_an_error() {
    let mut bytes = Vec::new();
    let error = Chunk::Error { errno: Errno::ENOSPC, message: "full".into(), offset: None };
    Reply::Chunk { cookie: 1, done: true, chunk: error.clone() }.encode(&mut bytes);
    bytes[6..8].copy_from_slice(&0xffff_u16.to_be_bytes());
    let length = bytes.len();
    let reply = Reply::Chunk { cookie: 1, done: true, chunk: error };
    assert_eq!(Reply::decode(&bytes), Ok(Decoded::Value(reply, length)));
}

#[test]
fn names_that_no_peer_understands_are_refused() {
    assert_eq!(ExportName::new("a\0b"), Err(NameError::Zero));
    assert_eq!(ExportName::new("x".repeat(4097)), Err(NameError::TooLong(4097)));
    assert!(ExportName::new("x".repeat(4096)).is_ok());
    let header = OptionHeader { code: 1, length: 1 };
    let not_text = ClientOption::decode(header, b"\xff");
    assert_eq!(not_text, Err(WireError::Name(NameError::NotUtf8)));
}

#[test]
fn texts_are_cut_at_a_character() {
    let message = "\u{e4}".repeat(4096);
    let mut bytes = Vec::new();
    OptionReply::Error { error: OptionError::Policy, message }.encode(1, &mut bytes);
    assert_eq!(bytes.len(), 20 + 4096);
    assert!(matches!(
        OptionReply::decode(&bytes),
        Ok(Decoded::Value((1, OptionReply::Error { message, .. }), _)) if message.len() == 4096
    ));
}

#[test]
fn errors_of_the_system_have_a_number_on_the_wire() {
    for errno in ERRORS {
        assert_eq!(errno_of(error_of(errno)), errno);
    }
    assert_eq!(error_of(Errno::EROFS), error_of(Errno::EPERM));
    assert_eq!(error_of(Errno::EDQUOT), error_of(Errno::ENOSPC));
    assert_eq!(errno_of(error_of(Errno::ENODEV)), Errno::EIO);
    assert_eq!(errno_of(12345), Errno::EINVAL);
}
