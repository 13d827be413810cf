use super::super::IoBuf;
use super::*;
use crate::nbd::{
    BlockSizes, Chunk, Export, Greeting, HandshakeFlags, Info, OptionReply, REQUEST_BYTES, Reply,
    Request, Uri,
};
use crate::reactor::{Reactor, Socket};
use futures_util::future::BoxFuture;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const SIZE: u64 = 1 << 20;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;

/// A server that a function plays, on a thread for each connection.
struct Played<F> {
    reactor: crate::reactor::Handle,
    play: F,
    /// It takes one connection, and leaves any other waiting.
    once: Option<AtomicBool>,
}

impl<F: Fn(UnixStream) + Clone + Send + Sync + 'static> Connector for Played<F> {
    fn connect(&self) -> BoxFuture<'static, io::Result<BoxStream>> {
        if self.once.as_ref().is_some_and(|taken| taken.swap(true, Ordering::Relaxed)) {
            return Box::pin(std::future::pending());
        }
        let (near, far) = UnixStream::pair().expect("a pair");
        let play = self.play.clone();
        std::thread::spawn(move || play(far));
        let socket: BoxStream =
            Box::new(Socket::new(&self.reactor, near.into()).expect("a socket"));
        Box::pin(std::future::ready(Ok(socket)))
    }
}

fn options() -> Options {
    Options::new(ExportName::default()).writable(true).timeout(Some(Duration::from_millis(300)))
}

fn open_played(
    reactor: &Reactor,
    play: impl Fn(UnixStream) + Clone + Send + Sync + 'static,
) -> Result<NbdDevice, LinkError> {
    open_with(reactor, Played { reactor: reactor.handle().clone(), play, once: None })
}

fn open_with(reactor: &Reactor, connector: impl Connector) -> Result<NbdDevice, LinkError> {
    let connector = Arc::new(connector);
    let runtime = Arc::new(reactor.handle().clone());
    reactor.block_on(NbdDevice::open(runtime, connector, "export", options()))
}

fn greeting() -> Vec<u8> {
    let mut bytes = Vec::new();
    let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    Greeting { flags }.encode(&mut bytes);
    bytes
}

fn flags() -> TransmissionFlags {
    TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH
}

fn with(mut bytes: Vec<u8>, option: u32, replies: &[OptionReply]) -> Vec<u8> {
    replies.iter().for_each(|reply| reply.encode(option, &mut bytes));
    bytes
}

/// All that a server says until requests are sent.
fn offering(export: Export, sizes: Option<BlockSizes>) -> Vec<u8> {
    let said = with(greeting(), STRUCTURED_REPLY, &[OptionReply::Ack]);
    let sizes = sizes.map(|sizes| OptionReply::Info(Info::BlockSize(sizes)));
    let mut replies: Vec<_> = sizes.into_iter().collect();
    replies.extend([OptionReply::Info(Info::Export(export)), OptionReply::Ack]);
    with(said, GO, &replies)
}

fn offer() -> Vec<u8> {
    offering(Export { size: SIZE, flags: flags() }, None)
}

/// Says this at once, and then takes in all that comes.
fn saying(bytes: Vec<u8>) -> impl Fn(UnixStream) + Clone + Send + Sync + 'static {
    move |mut stream: UnixStream| {
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = io::copy(&mut stream, &mut io::sink());
    }
}

#[test]
fn a_server_that_says_what_makes_no_sense_is_refused() {
    let reactor = Reactor::start().expect("io_uring");
    let sized = |minimum, maximum| {
        let sizes = BlockSizes { minimum, preferred: 4096, maximum };
        offering(Export { size: SIZE, flags: flags() }, Some(sizes))
    };
    let export = |size, flags| offering(Export { size, flags }, None);
    let greet = |flags| {
        let mut bytes = Vec::new();
        Greeting { flags }.encode(&mut bytes);
        bytes
    };
    let endless = vec![OptionReply::Info(Info::Description("again".into())); 1000];
    let structured = with(greeting(), STRUCTURED_REPLY, &[OptionReply::Ack]);
    let mut enormous = greeting();
    enormous
        .extend([&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &[0, 0, 0, 8, 0, 0, 0, 1]].concat());
    enormous.extend(u32::MAX.to_be_bytes());
    let read_only = flags() | TransmissionFlags::READ_ONLY;
    for (said, what) in [
        (Vec::new(), "the server has closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "begins with"),
        (greet(HandshakeFlags::empty()), "fixed newstyle"),
        (enormous, "at most"),
        (with(greeting(), GO, &[OptionReply::Ack]), "answers option 7"),
        (with(structured.clone(), GO, &[OptionReply::Ack]), "how large the export is"),
        (with(structured, GO, &endless), "more than 64 answers"),
        (export(513, flags()), "513 bytes, not a multiple of 512"),
        (export(1 << 63, flags()), "2^63 bytes or more"),
        (export(SIZE, TransmissionFlags::HAS_FLAGS), "offers no flushes"),
        (export(SIZE, read_only), "the export is read-only"),
        (sized(8192, 1 << 20), "whole 8192 bytes"),
        (sized(0, 1 << 20), "no power of two"),
        (sized(3, 1 << 20), "no power of two"),
        (sized(512, 0), "below a sector"),
        (sized(4096, 512), "below a sector"),
    ] {
        let error = open_played(&reactor, saying(said)).err().expect(what).to_string();
        assert!(error.contains(what), "'{error}' does not say '{what}'");
    }
}

/// Offers an export, flushes, and answers every other request with this.
fn answering(
    answer: impl Fn(Request) -> Vec<u8> + Clone + Send + Sync + 'static,
) -> impl Fn(UnixStream) + Clone + Send + Sync + 'static {
    move |mut stream: UnixStream| {
        let _ = stream.write_all(&offer());
        // Flags, and two options: to have structured replies, and to go.
        let mut asked = [0; 4 + 16 + 16 + 4 + 2 + 2];
        let _ = stream.read_exact(&mut asked);
        let mut bytes = [0; REQUEST_BYTES];
        while stream.read_exact(&mut bytes).is_ok() {
            let Ok(crate::nbd::Decoded::Value(request, _)) = Request::decode(&bytes) else {
                return;
            };
            let mut data = vec![0; to_usize(request.payload().into())];
            let answer = match request.command {
                crate::nbd::Command::Flush => chunk(request.cookie, true, Chunk::Nothing),
                _ => answer(request),
            };
            if stream.read_exact(&mut data).is_err() || stream.write_all(&answer).is_err() {
                return;
            }
        }
    }
}

fn chunk(cookie: u64, done: bool, chunk: Chunk) -> Vec<u8> {
    let mut bytes = Vec::new();
    Reply::Chunk { cookie, done, chunk }.encode(&mut bytes);
    bytes
}

#[test]
fn an_answer_that_breaks_the_protocol_costs_the_link_and_no_memory() {
    type Answer = fn(Request) -> Vec<u8>;
    let reactor = Reactor::start().expect("io_uring");
    let answers: [(Answer, &str); 9] = [
        (|_| b"this is no reply".to_vec(), "begins with"),
        (|one| chunk(one.cookie + 1, true, Chunk::Nothing), "was not sent"),
        (|one| chunk(one.cookie, true, Chunk::Nothing), "not sent all data"),
        (
            |one| chunk(one.cookie, true, Chunk::Data { offset: one.offset + 512, length: 4096 }),
            "not asked for",
        ),
        (
            |one| chunk(one.cookie, true, Chunk::Hole { offset: u64::MAX, length: 9 }),
            "not asked for",
        ),
        (
            |one| chunk(one.cookie, true, Chunk::Hole { offset: 0, length: u32::MAX }),
            "not asked for",
        ),
        (
            |one| {
                let hole = Chunk::Hole { offset: one.offset, length: 512 };
                [chunk(one.cookie, false, hole.clone()), chunk(one.cookie, true, hole)].concat()
            },
            "twice",
        ),
        (|one| chunk(one.cookie, true, Chunk::Unknown { kind: 77, length: u32::MAX }), "kind 77"),
        (
            |one| {
                let mut bytes = Vec::new();
                Reply::Simple { cookie: one.cookie, result: Ok(()) }.encode(&mut bytes);
                bytes
            },
            "a simple reply",
        ),
    ];
    for (answer, what) in answers {
        // The problem stays the same, since nothing becomes of another connection before the read
        // has failed.
        let (play, once) = (answering(answer), Some(AtomicBool::default()));
        let played = Played { reactor: reactor.handle().clone(), play, once };
        let device = open_with(&reactor, played).expect("an export");
        let failed = reactor.block_on(device.read(0, IoBuf::zeroed(4096))).expect_err(what);
        assert_eq!(failed.cause, Errno::ETIMEDOUT, "{what}");
        let problem = device.link().and_then(|link| link.problem).expect(what);
        assert!(problem.contains(what), "'{problem}' does not say '{what}'");
    }
}

#[test]
fn errors_of_the_disk_are_passed_on_and_data_is_put_together() {
    let reactor = Reactor::start().expect("io_uring");
    let device = open_played(
        &reactor,
        answering(|one| {
            if one.command == crate::nbd::Command::Write {
                let (errno, message) = (Errno::ENOSPC, "full".to_string());
                return chunk(one.cookie, true, Chunk::Error { errno, message, offset: None });
            }
            let half = one.length / 2;
            let hole = Chunk::Hole { offset: one.offset, length: half };
            let data = Chunk::Data { offset: one.offset + u64::from(half), length: half };
            let mut bytes = chunk(one.cookie, false, data);
            bytes.extend(vec![7; to_usize(half.into())]);
            bytes.extend(chunk(one.cookie, false, hole));
            bytes.extend(chunk(one.cookie, true, Chunk::Nothing));
            bytes
        }),
    )
    .expect("an export");
    let read = reactor.block_on(device.read(512, IoBuf::copy_of(&[9; 1024]))).expect("an answer");
    assert_eq!(read[..], [[0; 512], [7; 512]].concat());
    let written = device.write(0, IoBuf::zeroed(512).into());
    assert_eq!(reactor.block_on(written).expect_err("it is full").cause, Errno::ENOSPC);
    assert_eq!(device.link().expect("a link").unflushed, 0);
    let outside = device.read(SIZE, IoBuf::zeroed(512));
    assert_eq!(reactor.block_on(outside).expect_err("outside").cause, Errno::EINVAL);
    let discard = reactor.block_on(device.discard(0, 512)).expect_err("not offered");
    assert_eq!(discard.cause, Errno::EOPNOTSUPP);
}

#[test]
fn writes_are_divided_among_requests() {
    let part = |length| SharedBuf::from(IoBuf::zeroed(length));
    let lengths = |parts, most| -> Vec<Vec<usize>> {
        split(parts, most)
            .iter()
            .map(|parts| parts.iter().map(|part| part.len()).collect())
            .collect()
    };
    assert_eq!(lengths(vec![part(10), part(0), part(5)], 8), [vec![8], vec![2, 5]]);
    assert_eq!(lengths(vec![part(8), part(8)], 8), [[8], [8]]);
    assert!(lengths(vec![part(0)], 8).is_empty());
    assert_eq!(ranges(3, 5, 2).collect::<Vec<_>>(), [3..5, 5..7, 7..8]);
}

/// A server of its own, until it is killed.
struct Server(Child);

impl Server {
    /// Waits until it listens.
    fn start(program: &str, arguments: &[&str], listens: impl Fn() -> bool) -> Option<Server> {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .inspect_err(|e| println!("skipped: {program}: {e}"))
            .ok()?;
        let server = Server(child);
        let began = Instant::now();
        while !listens() {
            assert!(began.elapsed() < Duration::from_secs(20), "{program} does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes, reads and flushes, while `restart` ends the server and starts it again.
fn survives(reactor: &Reactor, uri: &str, mut restart: impl FnMut(bool)) {
    let uri: Uri = uri.parse().expect("a URI");
    let dial = Arc::new(Dial::new(reactor.handle(), &uri).expect("certificates"));
    let runtime = Arc::new(reactor.handle().clone());
    let options = Options::new(uri.export.clone()).writable(true);
    let open = NbdDevice::open(runtime, dial, "export", options);
    let device = reactor.block_on(open).expect("a server");
    let block = |with: u8| SharedBuf::from(IoBuf::copy_of(&vec![with; 128 << 10]));
    let place = |number: u8| u64::from(number) * (128 << 10);
    let writes = (0..48).map(|n| device.write(place(n), block(n + 1)));
    let done = reactor.block_on(join_all(writes));
    assert!(done.iter().all(Result::is_ok), "{done:?}");
    restart(false);
    let more: Vec<_> = (48..96).map(|n| device.write(place(n), block(n + 1))).collect();
    std::thread::sleep(Duration::from_millis(200));
    assert!(device.link().expect("a link").down_for.is_some());
    restart(true);
    let done = reactor.block_on(join_all(more));
    assert!(done.iter().all(Result::is_ok), "{done:?}");
    reactor.block_on(device.flush()).expect("a server");
    reactor.block_on(device.zero(place(0), 128 << 10)).expect("a server");
    for n in 0..96 {
        let read = device.read(place(n), IoBuf::zeroed(128 << 10));
        let read = reactor.block_on(read).expect("a server");
        let expected = if n == 0 { 0 } else { n + 1 };
        assert!(read.iter().all(|&byte| byte == expected), "block {n} holds {}", read[0]);
    }
    let link = device.link().expect("a link");
    assert_eq!((link.reconnects, link.waiting, link.problem), (1, 0, None));
}

fn listens_at(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

fn uri_of(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

#[test]
fn a_killed_nbdkit_comes_back_without_its_memory_and_nothing_is_lost() {
    let reactor = Reactor::start().expect("io_uring");
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("socket");
    let start = || {
        let _ = std::fs::remove_file(&socket);
        let path = socket.to_str().expect("UTF-8");
        let arguments = ["--exit-with-parent", "-f", "-U", path, "memory", "16M"];
        Server::start("nbdkit", &arguments, || listens_at(&socket))
    };
    let Some(server) = start() else { return };
    let mut server = Some(server);
    let restart = |starts| server = if starts { start() } else { None };
    survives(&reactor, &uri_of(&socket), restart);
}

#[test]
fn a_killed_qemu_nbd_comes_back_and_nothing_is_lost() {
    let reactor = Reactor::start().expect("io_uring");
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, image) = (folder.path().join("socket"), folder.path().join("image"));
    std::fs::File::create(&image).and_then(|file| file.set_len(16 << 20)).expect("a file");
    let start = || {
        let _ = std::fs::remove_file(&socket);
        let [path, image] = [&socket, &image].map(|path| path.to_str().expect("UTF-8"));
        let arguments = ["-t", "-f", "raw", "-e", "8", "-k", path, image];
        Server::start("qemu-nbd", &arguments, || listens_at(&socket))
    };
    let Some(server) = start() else { return };
    let mut server = Some(server);
    let restart = |starts| server = if starts { start() } else { None };
    survives(&reactor, &uri_of(&socket), restart);
}

/// Makes a key, and a certificate that is signed by itself or by the authority in the folder.
fn certify(folder: &Path, name: &str, more: &[&str]) -> bool {
    let common = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
    Command::new("openssl")
        .current_dir(folder)
        .args(common.split(' '))
        .args(["-keyout", &format!("{name}-key.pem"), "-out", &format!("{name}-cert.pem")])
        .args(["-subj", &format!("/CN={name}")])
        .args(more)
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn certificates(folder: &Path) -> bool {
    let signed = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-addext"];
    let no_authority = "basicConstraints=critical,CA:FALSE";
    let name = ["-addext", "subjectAltName=DNS:localhost"];
    certify(folder, "ca", &[])
        && certify(folder, "server", &[&signed[..], &[no_authority], &name].concat())
        && certify(folder, "client", &[&signed[..], &[no_authority]].concat())
}

#[test]
fn over_tls_both_sides_know_each_other_and_nothing_is_lost() {
    let reactor = Reactor::start().expect("io_uring");
    let [folder, other] = [(), ()].map(|()| tempfile::tempdir().expect("a folder"));
    if !certificates(folder.path()) || !certificates(other.path()) {
        return println!("skipped: openssl cannot make certificates");
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = free.local_addr().expect("bound").port().to_string();
    drop(free);
    let listens = || std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_ok();
    let start = || {
        let certificates = format!("--tls-certificates={}", folder.path().display());
        let tls = ["--tls=require", "--tls-verify-peer", &certificates];
        let rest = ["-f", "-i", "127.0.0.1", "-p", &port, "memory", "16M"];
        Server::start("nbdkit", &[&tls[..], &rest].concat(), listens)
    };
    let Some(server) = start() else { return };
    let uri = |certificates: &Path, more: &str| {
        format!("nbds://localhost:{port}/?tls-certificates={}{more}", certificates.display())
    };
    let refused = |uri: &str| {
        let uri: Uri = uri.parse().expect("a URI");
        let dial = Arc::new(Dial::new(reactor.handle(), &uri).expect("certificates"));
        let runtime = Arc::new(reactor.handle().clone());
        let open = NbdDevice::open(runtime, dial, "export", Options::new(uri.export));
        reactor.block_on(open).err().expect("they do not know each other").to_string()
    };
    let error = refused(&format!("nbd://localhost:{port}/"));
    assert!(error.contains("the server demands TLS"), "{error}");
    let error = refused(&uri(other.path(), ""));
    assert!(error.contains("certificate"), "{error}");
    let error = refused(&uri(folder.path(), "&tls-hostname=example.com"));
    assert!(error.contains("certificate"), "{error}");
    // The client trusts the server, but the server does not trust the client.
    refused(&uri(other.path(), "&tls-verify-peer=0"));
    let mut server = Some(server);
    let restart = |starts| server = if starts { start() } else { None };
    survives(&reactor, &uri(folder.path(), ""), restart);
}

#[test]
fn what_is_wrong_with_certificates_is_said() {
    let reactor = Reactor::start().expect("io_uring");
    let folder = tempfile::tempdir().expect("a folder");
    let uri = format!("nbds://localhost/?tls-certificates={}", folder.path().display());
    let uri: Uri = uri.parse().expect("a URI");
    let error = || Dial::new(reactor.handle(), &uri).err().expect("no certificates").to_string();
    let missing = error();
    assert!(missing.contains("ca-cert.pem"), "{missing}");
    std::fs::write(folder.path().join("ca-cert.pem"), "no certificate").expect("room");
    assert!(error().ends_with("ca-cert.pem: there is no certificate in it"), "{}", error());
}
