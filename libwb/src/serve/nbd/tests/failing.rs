use super::client::request;
use super::{Server, TestVolume};
use crate::nbd::{Command, CommandFlags, Reply, Request};
use futures_lite::future::yield_now;
use nix::errno::Errno;
use std::sync::atomic::Ordering;

#[test]
fn the_data_of_a_write_that_fails_is_not_taken_for_requests() {
    let server = Server::new();
    let (ended, ()) = server.serve(async |client| {
        client.begin(true).await;
        server.volume.0.refuses_writes.store(true, Ordering::SeqCst);
        // The data itself looks like requests.
        let mut data = Vec::new();
        (0..3).for_each(|n| request(Command::Write, 90 + n, 0, 512).encode(&mut data));
        data.resize(1 << 20, 0x25);
        let write = request(Command::Write, 1, 0, data.len());
        assert_eq!(client.call(write, &data).await, Err(Errno::EIO));
        server.volume.0.refuses_writes.store(false, Ordering::SeqCst);
        assert_eq!(client.call(request(Command::Write, 2, 0, 512), &[7; 512]).await, Ok(()));
    });
    ended.unwrap();
    assert_eq!(server.volume.at(511, 2), [7, 0]);
}

#[test]
fn a_flush_that_fails_is_reported_whoever_asked_for_it() {
    let server = Server::new();
    let (ended, ()) = server.serve(async |client| {
        client.begin(true).await;
        server.volume.0.refuses_flushes.store(true, Ordering::SeqCst);
        for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
            let durable = Request { flags: CommandFlags::FUA, ..request(command, 1, 4096, 512) };
            let data = if command == Command::Write { &[1; 512][..] } else { &[] };
            assert_eq!(client.call(durable, data).await, Err(Errno::EIO), "{command:?}");
        }
        let flush = request(Command::Flush, 1, 0, 0);
        assert_eq!(client.call(flush, &[]).await, Err(Errno::EIO));
        assert_eq!(client.call(request(Command::Write, 1, 0, 512), &[1; 512]).await, Ok(()));
    });
    ended.unwrap();
}

#[test]
fn no_more_than_512_requests_of_a_client_are_carried_out_at_a_time() {
    let server = Server::new();
    let (ended, ()) = server.serve(async |client| {
        client.begin(false).await;
        server.volume.hold();
        let mut bytes = Vec::new();
        (0..600).for_each(|n| request(Command::Read, n, 0, 512).encode(&mut bytes));
        client.send(&bytes).await.unwrap();
        for _ in 0..10_000 {
            yield_now().await;
        }
        assert_eq!(TestVolume::count(&server.volume.0.reads), 512);
        server.volume.release();
        for _ in 0..600 {
            assert!(matches!(client.reply().await, Some((Reply::Simple { .. }, _))));
            client.take(512).await;
        }
    });
    ended.unwrap();
    assert_eq!(TestVolume::count(&server.volume.0.reads), 600);
}

#[test]
fn a_session_that_is_held_takes_and_answers_nothing_more_and_does_not_hang_up() {
    let server = Server::new();
    let (server_end, client_end) = super::link::link(64 << 10);
    let session = server.session();
    let mut running = Box::pin(session.run(server_end, &server.stop));
    let client = async {
        let mut client = super::client::Client::new(client_end);
        client.begin(false).await;
        server.volume.hold();
        client.send_request(request(Command::Flush, 1, 0, 0), &[]).await;
        assert_eq!(client.call(request(Command::Write, 2, 0, 512), &[1; 512]).await, Ok(()));
        server.stop.hold();
        client.send_request(request(Command::Write, 3, 512, 512), &[1; 512]).await;
        server.volume.release();
        for _ in 0..1000 {
            yield_now().await;
        }
        // What was taken is carried out: other work may wait for it.
        assert_eq!(TestVolume::count(&server.volume.0.flushes), 1);
        let said = futures_lite::future::poll_once(client.fill()).await;
        assert!(said.is_none(), "the server has said {said:?}");
    };
    let ended = async { drop((&mut running).await) };
    futures_lite::future::block_on(futures_lite::future::or(client, ended));
    assert_eq!(server.volume.at(511, 2), [1, 0]);
}
