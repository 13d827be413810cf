use super::*;
use crate::reactor::Reactor;
use futures_lite::future::{block_on, poll_once};
use futures_lite::io::{AsyncReadExt, AsyncWriteExt};
use std::io::Read;
use std::net::Ipv4Addr;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};

/// A pair of connected sockets: one on the reactor, and the other end.
fn pair(reactor: &Reactor) -> (Socket, UnixStream) {
    let (near, far) = UnixStream::pair().expect("a pair");
    (Socket::new(reactor.handle(), near.into()).expect("a socket"), far)
}

/// Sends more than any socket buffer holds to a listener that sends it back.
fn echo(to: Address, listener: Listener) {
    let handle = listener.handle.clone();
    let data: Vec<u8> = (0..8 << 20).map(|n: u32| n.to_le_bytes()[1]).collect();
    let server = async {
        let mut socket = listener.accept().await.expect("a connection");
        let mut got = Vec::new();
        socket.read_to_end(&mut got).await.expect("all data");
        socket.write_all(&got).await.expect("room");
    };
    let client = async {
        let mut socket = Socket::connect(&handle, &to).await.expect("a server");
        socket.write_all(&data).await.expect("room");
        socket.close().await.expect("connected");
        let mut got = Vec::new();
        socket.read_to_end(&mut got).await.expect("all data");
        got
    };
    let ((), got) = block_on(async { futures_util::join!(server, client) });
    assert!(got == data);
}

#[test]
fn data_goes_both_ways_over_unix_sockets() {
    let reactor = Reactor::start().expect("io_uring");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listening = UnixListener::bind(&path).expect("a new path");
    let listener = Listener::new(reactor.handle(), listening.into()).expect("it listens");
    echo(Address::Unix(path), listener);
}

#[test]
fn data_goes_both_ways_over_tcp_from_a_listener_of_somebody_else() {
    let reactor = Reactor::start().expect("io_uring");
    let listening = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = Address::Tcp(listening.local_addr().expect("bound"));
    let listener = Listener::new(reactor.handle(), listening.into()).expect("it listens");
    echo(address, listener);
}

#[test]
fn several_parts_go_in_one_call() {
    let reactor = Reactor::start().expect("io_uring");
    let (mut socket, mut far) = pair(&reactor);
    let parts = [IoSlice::new(b"ab"), IoSlice::new(b""), IoSlice::new(b"cd")];
    let sent = block_on(socket.write_vectored(&parts)).expect("room");
    assert_eq!(sent, 4);
    let mut got = [0; 4];
    far.read_exact(&mut got).expect("data");
    assert_eq!(&got, b"abcd");
}

#[test]
fn a_dropped_socket_is_closed_although_it_waits_for_data() {
    let reactor = Reactor::start().expect("io_uring");
    // More than the ring has room for at a time.
    for round in 0..20 {
        let pairs: Vec<_> = (0..40).map(|_| pair(&reactor)).collect();
        let mut others = Vec::new();
        for (mut socket, far) in pairs {
            assert!(block_on(poll_once(socket.read(&mut [0]))).is_none());
            others.push(far);
            if round % 2 == 0 {
                // The reactor has it by now, probably.
                std::thread::yield_now();
            }
        }
        for mut far in others {
            assert_eq!(far.read(&mut [0]).expect("the end"), 0);
        }
    }
}

#[test]
fn silent_sockets_leave_room_for_io_and_the_reactor_ends_with_them() {
    let reactor = Reactor::start().expect("io_uring");
    let mut pairs: Vec<_> = (0..600).map(|_| pair(&reactor)).collect();
    for (socket, _) in &mut pairs {
        assert!(block_on(poll_once(socket.read(&mut [0]))).is_none());
    }
    let (mut socket, far) = pair(&reactor);
    drop(far);
    assert_eq!(block_on(socket.read(&mut [0])).expect("the end"), 0);
    drop(reactor);
    let late = block_on(pairs[0].0.read(&mut [0])).expect_err("nobody waits for it any more");
    assert_eq!(late.raw_os_error(), Some(nix::libc::ECANCELED));
}

#[test]
fn who_cannot_connect_learns_why() {
    let reactor = Reactor::start().expect("io_uring");
    let listening = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = Address::Tcp(listening.local_addr().expect("bound"));
    drop(listening);
    let refused = block_on(Socket::connect(reactor.handle(), &address)).err().expect("refused");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let nowhere = Address::Unix("/nonexistent/socket".into());
    let missing = block_on(Socket::connect(reactor.handle(), &nowhere)).err().expect("missing");
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_host_is_looked_up() {
    let found = block_on(resolve("127.0.0.1", 10809)).expect("an address");
    assert_eq!(found, [SocketAddr::from(([127, 0, 0, 1], 10809))]);
    assert!(block_on(resolve("no such host", 1)).is_err());
}
