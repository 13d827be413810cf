use super::super::SessionError;
use super::client::{Client, go, request};
use super::link::link;
use super::{SIZE, Server, TestVolume};
use crate::format::{Sector, to_u64};
use crate::nbd::{
    Chunk, ClientFlags, ClientOption, Command, CommandFlags, Reply, Request, encode_client_flags,
};
use futures_lite::future::yield_now;
use nix::errno::Errno;
use proptest::prelude::*;
use std::sync::atomic::Ordering;

fn with(request: Request, flags: CommandFlags) -> Request {
    Request { flags, ..request }
}

#[test]
fn what_was_written_is_read_in_both_kinds_of_replies() {
    for structured in [false, true] {
        let server = Server::new();
        let (ended, ()) = server.serve(async |client| {
            client.begin(structured).await;
            let data: Vec<u8> = (0..8192).map(|n: u32| n.to_le_bytes()[0]).collect();
            let write = request(Command::Write, 7, 512, data.len());
            assert_eq!(client.call(write, &data).await, Ok(()));
            client.send_request(request(Command::Read, 8, 512, data.len()), &[]).await;
            let (reply, mut read) = client.reply().await.unwrap();
            if structured {
                let chunk = Chunk::Data { offset: 512, length: 8192 };
                assert_eq!(reply, Reply::Chunk { cookie: 8, done: true, chunk });
            } else {
                assert_eq!(reply, Reply::Simple { cookie: 8, result: Ok(()) });
                read = client.take(data.len()).await;
            }
            assert_eq!(read, data);
            client.send_request(request(Command::Disconnect, 9, 0, 0), &[]).await;
            assert!(client.is_at_end().await);
        });
        ended.unwrap();
    }
}

#[test]
fn durable_requests_are_flushed_before_the_reply() {
    let server = Server::new();
    let (ended, ()) = server.serve(async |client| {
        client.begin(true).await;
        for (flushes, command) in
            [(1, Command::Write), (2, Command::Trim), (3, Command::WriteZeroes)]
        {
            let durable = with(request(command, 1, 4096, 512), CommandFlags::FUA);
            let data = if command == Command::Write { &[1; 512][..] } else { &[] };
            assert_eq!(client.call(durable, data).await, Ok(()));
            assert_eq!(TestVolume::count(&server.volume.0.flushes), flushes);
        }
        assert_eq!(client.call(request(Command::Flush, 1, 0, 0), &[]).await, Ok(()));
        assert_eq!(client.call(request(Command::Write, 1, 0, 512), &[1; 512]).await, Ok(()));
        assert_eq!(TestVolume::count(&server.volume.0.flushes), 4);
    });
    ended.unwrap();
}

#[test]
fn zeros_are_written_where_the_volume_cannot_discard() {
    for cannot in [false, true] {
        let server = Server::new();
        server.volume.0.cannot_discard.store(cannot, Ordering::SeqCst);
        server.volume.put(Sector(0), &[9; 5 << 20]);
        let (ended, ()) = server.serve(async |client| {
            client.begin(true).await;
            let trim = request(Command::Trim, 1, 0, 512);
            assert_eq!(client.call(trim, &[]).await, Ok(()));
            let zero = request(Command::WriteZeroes, 1, 512, 3 << 20);
            assert_eq!(client.call(zero, &[]).await, Ok(()));
            let keep = with(request(Command::WriteZeroes, 1, 4 << 20, 512), CommandFlags::NO_HOLE);
            assert_eq!(client.call(keep, &[]).await, Ok(()));
        });
        ended.unwrap();
        assert_eq!(server.volume.at(511, 1)[0], if cannot { 9 } else { 0 });
        assert!(server.volume.at(512, 3 << 20).iter().all(|&byte| byte == 0));
        assert_eq!(server.volume.at((3 << 20) + 511, 2), [0, 9]);
        assert_eq!(server.volume.at((4 << 20) + 511, 2), [0, 9]);
    }
}

#[test]
fn requests_that_are_not_in_order_are_refused_and_the_connection_stays() {
    let (size, most) = (to_u64(SIZE), 32 << 20);
    let none = CommandFlags::empty();
    let cases = [
        (Command::Read, none, size, 512, Errno::EINVAL),
        (Command::Read, none, u64::MAX - 511, 512, Errno::EINVAL),
        (Command::Read, none, 1, 512, Errno::EINVAL),
        (Command::Read, none, 0, 511, Errno::EINVAL),
        (Command::Read, none, 0, 0, Errno::EINVAL),
        (Command::Read, none, 0, most + 512, Errno::EINVAL),
        (Command::Read, CommandFlags::NO_HOLE, 0, 512, Errno::EINVAL),
        (Command::Write, none, size - 512, 1024, Errno::ENOSPC),
        (Command::Write, none, 0, most + 512, Errno::EINVAL),
        (Command::Write, none, 3, 70_000, Errno::EINVAL),
        (Command::Write, CommandFlags::DF, 0, 512, Errno::EINVAL),
        (Command::Trim, none, size, 512, Errno::EINVAL),
        (Command::WriteZeroes, none, size, 512, Errno::ENOSPC),
        (Command::WriteZeroes, CommandFlags::FAST_ZERO, 0, 512, Errno::EOPNOTSUPP),
        (Command::Unknown(5), none, 0, 512, Errno::EINVAL),
        (Command::Flush, CommandFlags::from_bits_retain(1 << 15), 0, 0, Errno::EINVAL),
    ];
    let (ended, ()) = Server::new().serve(async |client| {
        client.begin(false).await;
        for (command, flags, offset, length, errno) in cases {
            let request = with(request(command, 5, offset, length), flags);
            let data = vec![1; if command == Command::Write { length } else { 0 }];
            let refused = client.call(request, &data).await;
            assert_eq!(refused, Err(errno), "{request:?}");
        }
        let read = with(request(Command::Read, 5, size - 512, 512), CommandFlags::FUA);
        client.send_request(read, &[]).await;
        assert_eq!(client.reply().await.unwrap().0, Reply::Simple { cookie: 5, result: Ok(()) });
    });
    ended.unwrap();
}

#[test]
fn errors_of_reads_are_structured_where_that_was_agreed() {
    let (ended, ()) = Server::new().serve(async |client| {
        client.begin(true).await;
        client.send_request(request(Command::Read, 5, to_u64(SIZE), 512), &[]).await;
        let chunk = Chunk::Error { errno: Errno::EINVAL, message: String::new(), offset: None };
        let expected = Reply::Chunk { cookie: 5, done: true, chunk };
        assert_eq!(client.reply().await.unwrap().0, expected);
    });
    ended.unwrap();
}

#[test]
fn a_volume_that_is_served_for_reading_takes_no_writes() {
    let mut server = Server::new();
    server.options.read_only = true;
    let (ended, ()) = server.serve(async |client| {
        client.begin(false).await;
        for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
            let data = if command == Command::Write { &[1; 512][..] } else { &[] };
            let refused = client.call(request(command, 5, 0, 512), data).await;
            assert_eq!(refused, Err(Errno::EPERM), "{command:?}");
        }
        assert_eq!(client.call(request(Command::Flush, 5, 0, 0), &[]).await, Ok(()));
    });
    ended.unwrap();
    assert!(server.volume.at(0, 512).iter().all(|&byte| byte == 0));
}

#[test]
fn the_unit_of_requests_is_the_sector_that_clients_are_told_of() {
    let mut server = Server::new();
    server.options.sector_size = 4096;
    let (ended, ()) = server.serve(async |client| {
        client.begin(false).await;
        let small = client.call(request(Command::Write, 5, 0, 512), &[1; 512]).await;
        assert_eq!(small, Err(Errno::EINVAL));
        assert_eq!(client.call(request(Command::Write, 5, 4096, 4096), &[1; 4096]).await, Ok(()));
    });
    ended.unwrap();
}

#[test]
fn a_request_that_waits_keeps_no_other_waiting() {
    let server = Server::new();
    let (ended, ()) = server.serve(async |client| {
        client.begin(true).await;
        server.volume.hold();
        client.send_request(request(Command::Read, 1, 0, 4096), &[]).await;
        assert_eq!(client.call(request(Command::Write, 2, 0, 512), &[1; 512]).await, Ok(()));
        server.volume.release();
        let (reply, data) = client.reply().await.unwrap();
        assert!(matches!(reply, Reply::Chunk { cookie: 1, .. }));
        assert_eq!(data.len(), 4096);
    });
    ended.unwrap();
}

#[test]
fn a_write_that_is_taken_in_part_is_finished() {
    let server = Server::new();
    server.volume.0.at_once.store(4096, Ordering::SeqCst);
    let (ended, ()) = server.serve(async |client| {
        client.begin(false).await;
        assert_eq!(
            client.call(request(Command::Write, 2, 0, 1 << 20), &[5; 1 << 20]).await,
            Ok(())
        );
    });
    ended.unwrap();
    assert!(server.volume.at(0, 1 << 20).iter().all(|&byte| byte == 5));
    assert_eq!(server.volume.at(1 << 20, 1), [0]);
}

#[test]
fn what_was_taken_is_answered_when_the_client_says_goodbye_or_the_server_ends() {
    for disconnects in [false, true] {
        let server = Server::new();
        let (ended, ()) = server.serve(async |client| {
            client.begin(false).await;
            server.volume.hold();
            client.send_request(request(Command::Flush, 1, 0, 0), &[]).await;
            client.send_request(request(Command::Flush, 2, 0, 0), &[]).await;
            assert_eq!(client.call(request(Command::Write, 3, 0, 512), &[1; 512]).await, Ok(()));
            if disconnects {
                client.send_request(request(Command::Disconnect, 4, 0, 0), &[]).await;
            } else {
                server.stop.stop();
                yield_now().await;
            }
            // Comes too late.
            client.send_request(request(Command::Flush, 5, 0, 0), &[]).await;
            server.volume.release();
            for cookie in [1, 2] {
                let reply = client.reply().await.unwrap().0;
                assert_eq!(reply, Reply::Simple { cookie, result: Ok(()) });
            }
            assert!(client.is_at_end().await);
        });
        ended.unwrap();
    }
}

#[test]
fn garbage_ends_the_connection_after_what_came_before_is_answered() {
    let (ended, ()) = Server::new().serve(async |client| {
        client.begin(false).await;
        let mut bytes = Vec::new();
        request(Command::Flush, 1, 0, 0).encode(&mut bytes);
        bytes.extend([7; 28]);
        client.send(&bytes).await.unwrap();
        let reply = client.reply().await.unwrap().0;
        assert_eq!(reply, Reply::Simple { cookie: 1, result: Ok(()) });
        assert!(client.is_at_end().await);
    });
    assert!(matches!(ended, Err(SessionError::Wire(_))), "{ended:?}");
}

#[test]
fn a_client_that_takes_no_replies_is_given_no_more_memory() {
    let server = Server::new();
    let (ended, ()) = server.serve(async |client| {
        client.begin(true).await;
        // Each asks for 1 MiB. The link takes all requests, and next to nothing of the replies.
        let mut bytes = Vec::new();
        (0..1000).for_each(|n| request(Command::Read, n, 0, 1 << 20).encode(&mut bytes));
        client.send(&bytes).await.unwrap();
        for _ in 0..10_000 {
            yield_now().await;
        }
        let reads = TestVolume::count(&server.volume.0.reads);
        assert!((30..40).contains(&reads), "{reads} reads of 1 MiB at a time");
        for _ in 0..1000 {
            assert_eq!(client.reply().await.unwrap().1.len(), 1 << 20);
        }
    });
    ended.unwrap();
}

#[test]
fn a_client_that_goes_and_takes_no_replies_is_not_waited_for_for_ever() {
    let server = Server::new();
    let (ended, _client) = server.serve(async |client| {
        client.begin(true).await;
        client.send_request(request(Command::Read, 1, 0, 1 << 20), &[]).await;
        client.send_request(request(Command::Disconnect, 1, 0, 0), &[]).await;
        for _ in 0..100 {
            yield_now().await;
        }
        server.time.pass();
        for _ in 0..100 {
            yield_now().await;
        }
    });
    assert!(matches!(ended, Err(SessionError::NotTaken)), "{ended:?}");
}

/// All that a client says, from its flags on.
fn said() -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_client_flags(ClientFlags::FIXED_NEWSTYLE, &mut bytes);
    ClientOption::StructuredReply.encode(&mut bytes);
    go("", &[3]).encode(&mut bytes);
    for n in 0..3 {
        request(Command::Write, n, 512 * n, 512).encode(&mut bytes);
        bytes.extend([1; 512]);
        request(Command::Read, n, 0, 4096).encode(&mut bytes);
        with(request(Command::Write, n, 3, 100), CommandFlags::FUA).encode(&mut bytes);
        bytes.extend([2; 100]);
        request(Command::Flush, n, 0, 0).encode(&mut bytes);
    }
    bytes
}

/// Serves a client that says something and hangs up at once.
fn says(bytes: &[u8]) -> Server {
    let server = Server::new();
    let (server_end, client_end) = link(1 << 20);
    let client = async |client: &mut Client| {
        // It may be cut off before.
        let _ = client.send(bytes).await;
        client.hang_up().await;
        while client.fill().await.is_some() {}
    };
    let (ended, ()) = server.serve_on(server_end, client_end, client);
    // However it ends.
    let _ = ended;
    server
}

#[test]
fn a_client_may_vanish_at_any_byte() {
    let said = said();
    for length in 0..said.len() {
        let server = says(&said[..length]);
        let written = server.volume.at(0, 2048);
        assert!(written[1536..].iter().all(|&byte| byte == 0));
        assert!(written.chunks(512).all(|sector| sector.iter().all(|&byte| byte == sector[0])));
    }
    assert_eq!(says(&said).volume.at(1535, 2), [1, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_garbage_does_harm(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut said = said();
        for (at, byte) in changes {
            let at = at.index(said.len());
            said[at] = byte;
        }
        says(&said);
    }
}
