use super::client::{Client, request};
use super::{NAME, TestVolume};
use crate::device::probe::Traits;
use crate::nbd::Command;
use crate::reactor::{Address, Listener, Reactor, Socket};
use crate::serve::Options;
use crate::serve::nbd::{NbdServer, Session, listen};
use futures_lite::future::yield_now;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

fn serve(reactor: &Reactor, volume: &TestVolume, at: &Address) -> NbdServer {
    let runtime = reactor.handle();
    let options = Options { sector_size: 512, read_only: false, backing: Traits::default() };
    let session =
        Session::new(volume.clone(), NAME, options, None, Arc::new(runtime.clone())).unwrap();
    let listener = Listener::new(runtime, listen(at).unwrap()).unwrap();
    NbdServer::start(runtime, listener, session)
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
        assert_eq!(server.clients(), 3);
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
    let (reactor, volume) = (Reactor::start().unwrap(), TestVolume::new());
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = Address::Tcp(listening.local_addr().unwrap());
    let runtime = reactor.handle();
    let options = Options { sector_size: 512, read_only: false, backing: Traits::default() };
    let session = Session::new(volume, NAME, options, None, Arc::new(runtime.clone())).unwrap();
    let listener = Listener::new(runtime, listening.into()).unwrap();
    let server = NbdServer::start(runtime, listener, session);
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
