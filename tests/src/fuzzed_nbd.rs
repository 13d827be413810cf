//! Any bytes as what a peer sends over NBD, in both directions. What is understood means the same
//! after it was encoded again.

use libwb::nbd::{
    ClientOption, Command, CommandFlags, Decoded, Export, ExportName, Greeting, HandshakeFlags,
    InfoRequest, OptionReply, Reply, Request, TransmissionFlags, Uri, WireError,
    decode_client_flags, decode_export,
};

/// Decodes bytes as everything that may come over a connection, and as an address.
///
/// # Panics
/// When a value does not survive being encoded.
pub fn nbd(bytes: &[u8]) {
    let _ = Greeting::decode(bytes);
    let _ = decode_client_flags(bytes);
    let _ = decode_export(bytes, true);
    messages(bytes, Request::decode, |request, to| request.encode(to));
    messages(bytes, Reply::decode, |reply, to| reply.encode(to));
    messages(bytes, OptionReply::decode, |(option, reply), to| reply.encode(*option, to));
    messages(bytes, ClientOption::decode_whole, |option, to| option.encode(to));
    if let Some(uri) = std::str::from_utf8(bytes).ok().and_then(|text| text.parse::<Uri>().ok()) {
        assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
    }
}

/// Decodes one message after the other.
fn messages<T: PartialEq + std::fmt::Debug>(
    mut bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<Decoded<T>, WireError>,
    encode: impl Fn(&T, &mut Vec<u8>),
) {
    loop {
        match decode(bytes) {
            Err(_) => return,
            Ok(Decoded::More(more)) => return assert!(more > 0),
            Ok(Decoded::Value(value, taken)) => {
                assert!(0 < taken && taken <= bytes.len());
                let mut again = Vec::new();
                encode(&value, &mut again);
                assert_eq!(decode(&again), Ok(Decoded::Value(value, again.len())));
                bytes = &bytes[taken..];
            }
        }
    }
}

/// The inputs that fuzzing starts from.
///
/// # Panics
/// Never: all names are short.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![b"nbds+unix:///a%20b?socket=/s&tls-verify-peer=0".to_vec()];
    let mut add = |encode: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        encode(&mut bytes);
        seeds.push(bytes);
    };
    let name = ExportName::new("disk").expect("a short name");
    let export = Export { size: 1 << 30, flags: TransmissionFlags::all() };
    add(&|to| Greeting { flags: HandshakeFlags::all() }.encode(to));
    add(&|to| {
        let wanted = vec![0, 3];
        ClientOption::StructuredReply.encode(to);
        ClientOption::Go(InfoRequest { name: name.clone(), wanted }).encode(to);
    });
    add(&|to| {
        let details = "a disk".into();
        OptionReply::Server { name: name.clone(), details }.encode(3, to);
        OptionReply::Info(libwb::nbd::Info::Export(export)).encode(7, to);
        OptionReply::Ack.encode(7, to);
    });
    add(&|to| {
        let flags = CommandFlags::FUA;
        Request { flags, command: Command::Write, cookie: 1, offset: 4096, length: 4 }.encode(to);
    });
    add(&|to| Reply::Simple { cookie: 1, result: Ok(()) }.encode(to));
    add(&|to| {
        let error = libwb::nbd::Chunk::Error {
            errno: nix::errno::Errno::ENOSPC,
            message: "full".into(),
            offset: Some(4096),
        };
        let hole = libwb::nbd::Chunk::Hole { offset: 0, length: 4096 };
        Reply::Chunk { cookie: 1, done: false, chunk: hole }.encode(to);
        Reply::Chunk { cookie: 1, done: true, chunk: error }.encode(to);
    });
    seeds
}
