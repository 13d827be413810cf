use super::client::{Client, go, request};
use super::{NAME, TestVolume};
use crate::device::probe::Traits;
use crate::nbd::{ClientFlags, Command};
use crate::reactor::{Address, Listener, Reactor, Socket};
use crate::runtime::Runtime;
use crate::serve::Options;
use crate::serve::nbd::connections::{MAX_CLIENTS, MAX_NEGOTIATING};
use crate::serve::nbd::{NbdServer, Session, listen, remove_abandoned};
use futures_lite::future::yield_now;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

fn serve(reactor: &Reactor, volume: &TestVolume, at: &Address) -> NbdServer {
    serve_on(reactor, volume, listen(at).unwrap())
}

fn serve_on(reactor: &Reactor, volume: &TestVolume, listening: OwnedFd) -> NbdServer {
    let runtime = reactor.handle();
    let options = Options { sector_size: 512, read_only: false, backing: Traits::default() };
    let session =
        Session::new(volume.clone(), NAME, options, None, Arc::new(runtime.clone())).unwrap();
    NbdServer::start(runtime, Listener::new(runtime, listening).unwrap(), session)
}

fn serve_over_tcp(reactor: &Reactor) -> (Address, NbdServer) {
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = Address::Tcp(listening.local_addr().unwrap());
    (at, serve_on(reactor, &TestVolume::new(), listening.into()))
}

#[test]
fn several_clients_are_served_and_a_server_ends_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let at = Address::Unix(folder.path().join("socket"));
    let (reactor, volume) = (Reactor::start().unwrap(), TestVolume::new());
    let server = serve(&reactor, &volume, &at);
    reactor.block_on(async {
        let mut clients = Vec::new();
        for n in 0..3 {
            let mut client = Client::new(Socket::connect(reactor.handle(), &at).await.unwrap());
            client.begin(true).await;
            let write = request(Command::Write, n, 512 * n, 512);
            assert_eq!(client.call(write, &[1; 512]).await, Ok(()));
            clients.push(client);
        }
        assert_eq!(server.clients().number(), 3);
        volume.hold();
        clients[1].send_request(request(Command::Flush, 9, 0, 0), &[]).await;
        // It has taken the request once it answers the next one.
        assert_eq!(clients[1].call(request(Command::Write, 8, 0, 512), &[2; 512]).await, Ok(()));
        let release = async { volume.release() };
        futures_lite::future::zip(server.stop(), release).await;
        assert!(clients[1].reply().await.is_some());
        for client in &mut clients {
            assert!(client.is_at_end().await);
        }
        // The reactor may still have to let go of the socket.
        while Socket::connect(reactor.handle(), &at).await.is_ok() {
            yield_now().await;
        }
    });
    assert_eq!(volume.at(0, 1), [2]);
    assert_eq!(volume.at(1535, 2), [1, 0]);
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced_and_another_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let at = Address::Unix(path.clone());
    drop(listen(&at).unwrap());
    let listening = listen(&at).unwrap();
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let refused = listen(&at).unwrap_err().to_string();
    assert!(refused.contains("cannot listen on") && refused.contains("in use"), "{refused}");
    drop(listening);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    assert!(listen(&at).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn clients_are_served_over_tcp_and_one_that_vanishes_hurts_no_other() {
    let reactor = Reactor::start().unwrap();
    let (at, server) = serve_over_tcp(&reactor);
    let runtime = reactor.handle();
    reactor.block_on(async {
        let mut client = Client::new(Socket::connect(runtime, &at).await.unwrap());
        client.begin(false).await;
        let mut other = Client::new(Socket::connect(runtime, &at).await.unwrap());
        other.begin(false).await;
        other.send(&[0x25, 0x60]).await.unwrap();
        drop(other);
        assert_eq!(client.call(request(Command::Write, 1, 0, 512), &[1; 512]).await, Ok(()));
        drop(client);
        server.stop().await;
    });
}

#[test]
fn connections_that_say_nothing_keep_no_client_out() {
    let folder = tempfile::tempdir().unwrap();
    let at = Address::Unix(folder.path().join("socket"));
    let (reactor, volume) = (Reactor::start().unwrap(), TestVolume::new());
    let server = serve(&reactor, &volume, &at);
    reactor.block_on(async {
        let mut early = Client::new(Socket::connect(reactor.handle(), &at).await.unwrap());
        early.begin(true).await;
        let mut silent = Vec::new();
        for _ in 0..3 * MAX_NEGOTIATING {
            silent.push(Socket::connect(reactor.handle(), &at).await.unwrap());
        }
        let mut client = Client::new(Socket::connect(reactor.handle(), &at).await.unwrap());
        client.begin(true).await;
        assert_eq!(server.clients().number(), 2);
        for client in [&mut early, &mut client] {
            assert_eq!(client.call(request(Command::Write, 1, 0, 512), &[1; 512]).await, Ok(()));
        }
        drop((early, client, silent));
        server.stop().await;
    });
}

#[test]
fn no_more_clients_are_served_than_there_are_places() {
    let folder = tempfile::tempdir().unwrap();
    let at = Address::Unix(folder.path().join("socket"));
    let (reactor, volume) = (Reactor::start().unwrap(), TestVolume::new());
    let server = serve(&reactor, &volume, &at);
    reactor.block_on(async {
        let connect = async || Client::new(Socket::connect(reactor.handle(), &at).await.unwrap());
        let mut clients = Vec::new();
        for _ in 0..MAX_CLIENTS - 1 {
            let mut client = connect().await;
            client.begin(false).await;
            clients.push(client);
        }
        // Both come while there is a place.
        let (mut one, mut other) = (connect().await, connect().await);
        one.greet(ClientFlags::FIXED_NEWSTYLE).await;
        other.greet(ClientFlags::FIXED_NEWSTYLE).await;
        one.ask(&go(NAME, &[])).await;
        other.ask(&go(NAME, &[])).await;
        assert!(other.is_at_end().await);
        assert_eq!(server.clients().number(), MAX_CLIENTS);
        assert_eq!(one.call(request(Command::Write, 1, 0, 512), &[1; 512]).await, Ok(()));
        drop((clients, one, other));
        server.stop().await;
    });
}

#[test]
fn clients_are_cut_off_although_the_volume_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let at = Address::Unix(path.clone());
    let (reactor, volume) = (Reactor::start().unwrap(), TestVolume::new());
    let server = serve(&reactor, &volume, &at);
    reactor.block_on(async {
        let mut client = Client::new(Socket::connect(reactor.handle(), &at).await.unwrap());
        client.begin(true).await;
        volume.hold();
        client.send_request(request(Command::Flush, 1, 0, 0), &[]).await;
        server.clients().cut_off();
        assert!(client.is_at_end().await);
        assert!(Socket::connect(reactor.handle(), &at).await.is_err());
        volume.release();
        server.stop().await;
    });
    assert!(remove_abandoned(&path).unwrap() && !path.exists());
}

#[test]
fn a_client_over_tcp_gets_its_last_replies_although_it_sends_more() {
    let reactor = Reactor::start().unwrap();
    let (at, server) = serve_over_tcp(&reactor);
    let runtime = reactor.handle();
    reactor.block_on(async {
        for _ in 0..20 {
            let mut client = Client::new(Socket::connect(runtime, &at).await.unwrap());
            client.begin(false).await;
            client.send_request(request(Command::Read, 1, 0, 1 << 20), &[]).await;
            client.send_request(request(Command::Disconnect, 2, 0, 0), &[]).await;
            // Nobody will read this.
            client.send(&[1; 4096]).await.unwrap();
            runtime.sleep(std::time::Duration::from_millis(2)).await;
            assert!(client.reply().await.is_some());
            client.take(1 << 20).await;
        }
        server.stop().await;
    });
}
