use super::super::SessionError;
use super::client::{go, name, request};
use super::{NAME, SIZE, Server};
use crate::format::to_u64;
use crate::nbd::{
    BlockSizes, ClientFlags, ClientOption, Command, Decoded, Export, Info, InfoKind, InfoRequest,
    OptionError, OptionReply, TransmissionFlags, decode_export,
};

const BOTH: ClientFlags = ClientFlags::FIXED_NEWSTYLE.union(ClientFlags::NO_ZEROES);

fn error_of(replies: &[OptionReply]) -> OptionError {
    match replies {
        [OptionReply::Error { error, .. }] => *error,
        other => panic!("no error: {other:?}"),
    }
}

fn export_of(replies: &[OptionReply]) -> Export {
    match replies {
        [OptionReply::Info(Info::Export(export)), ..] => *export,
        other => panic!("no export: {other:?}"),
    }
}

#[test]
fn the_volume_is_listed_and_described_as_it_is_served() {
    let (ended, ()) = Server::new().serve(async |client| {
        client.greet(BOTH).await;
        let listed = OptionReply::Server { name: name(NAME), details: String::new() };
        assert_eq!(client.ask(&ClientOption::List).await, [listed, OptionReply::Ack]);
        let wanted = vec![InfoKind::BlockSize as u16, InfoKind::Name as u16, 77];
        let request = InfoRequest { name: name(""), wanted };
        let described = client.ask(&ClientOption::Info(request.clone())).await;
        let export = export_of(&described);
        assert_eq!(export.size, to_u64(SIZE));
        assert!(!export.flags.contains(TransmissionFlags::READ_ONLY));
        assert!(!export.flags.contains(TransmissionFlags::SEND_DF));
        let sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 32 << 20 };
        assert_eq!(
            described[1..],
            [
                OptionReply::Info(Info::Name(name(NAME))),
                OptionReply::Info(Info::BlockSize(sizes)),
                OptionReply::Ack
            ]
        );
        assert_eq!(client.ask(&ClientOption::Go(request)).await, described);
        assert_eq!(client.call(request_to_flush(), &[]).await, Ok(()));
    });
    ended.unwrap();
}

fn request_to_flush() -> crate::nbd::Request {
    request(Command::Flush, 1, 0, 0)
}

#[test]
fn flags_say_what_is_negotiated_and_how_the_volume_is_served() {
    let mut server = Server::new();
    server.options.read_only = true;
    server.options.backing.rotational = true;
    server.options.sector_size = 4096;
    let (ended, ()) = server.serve(async |client| {
        client.greet(BOTH).await;
        assert_eq!(client.ask(&ClientOption::StructuredReply).await, [OptionReply::Ack]);
        let flags = export_of(&client.ask(&go(NAME, &[])).await).flags;
        let set = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::READ_ONLY
            | TransmissionFlags::ROTATIONAL
            | TransmissionFlags::SEND_DF
            | TransmissionFlags::CAN_MULTI_CONN;
        assert!(flags.contains(set), "{flags:?}");
    });
    ended.unwrap();
}

#[test]
fn the_oldest_way_to_choose_an_export_works() {
    for (flags, length) in
        [(BOTH, 10), (ClientFlags::FIXED_NEWSTYLE, 134), (ClientFlags::empty(), 134)]
    {
        let (ended, ()) = Server::new().serve(async |client| {
            client.greet(flags).await;
            let mut option = Vec::new();
            ClientOption::ExportName(name(NAME)).encode(&mut option);
            client.send(&option).await.unwrap();
            let bytes = client.take(length).await;
            let export = decode_export(&bytes, length == 10);
            assert!(
                matches!(export, Decoded::Value(Export { size, .. }, _) if size == to_u64(SIZE))
            );
            assert_eq!(client.call(request_to_flush(), &[]).await, Ok(()));
        });
        ended.unwrap();
    }
}

#[test]
fn what_cannot_be_done_is_refused_and_negotiation_goes_on() {
    let (ended, ()) = Server::new().serve(async |client| {
        client.greet(BOTH).await;
        let unknown = |length| ClientOption::Unknown { code: 10, data: vec![7; length] };
        assert_eq!(error_of(&client.ask(&unknown(0)).await), OptionError::Unsupported);
        assert_eq!(error_of(&client.ask(&unknown(5_000_000)).await), OptionError::Unsupported);
        assert_eq!(error_of(&client.ask(&ClientOption::StartTls).await), OptionError::Policy);
        assert_eq!(error_of(&client.ask(&go("other", &[])).await), OptionError::UnknownExport);
        for (code, data, error) in [
            (3, vec![1], OptionError::Invalid),
            (7, vec![0, 0, 0, 9, 1], OptionError::Invalid),
            (7, vec![0; 100_000], OptionError::TooBig),
            (1 << 31, vec![], OptionError::Unsupported),
        ] {
            let option = ClientOption::Unknown { code, data };
            assert_eq!(error_of(&client.ask(&option).await), error, "option {code}");
        }
        assert_eq!(client.ask(&go(NAME, &[])).await.last(), Some(&OptionReply::Ack));
    });
    ended.unwrap();
}

#[test]
fn who_goes_away_is_told_so() {
    let (ended, ()) = Server::new().serve(async |client| {
        client.greet(BOTH).await;
        assert_eq!(client.ask(&ClientOption::Abort).await, [OptionReply::Ack]);
        assert!(client.is_at_end().await);
    });
    ended.unwrap();
}

#[test]
fn who_cannot_be_told_of_an_error_is_cut_off() {
    type Is = fn(&SessionError) -> bool;
    let option = |code: u32, data: &[u8]| {
        let mut bytes = Vec::new();
        ClientOption::Unknown { code, data: data.to_vec() }.encode(&mut bytes);
        [&[0, 0, 0, 3][..], &bytes].concat()
    };
    let cases: [(Vec<u8>, Is); 5] = [
        (vec![0, 0, 0, 7], |error| matches!(error, SessionError::ClientFlags(7))),
        (b"GET / HTTP/1.1\r\n\r\nabcd".to_vec(), |error| {
            matches!(error, SessionError::ClientFlags(_))
        }),
        ([&[0, 0, 0, 3], &b"IHAVEOPX12345678"[..]].concat(), |error| {
            matches!(error, SessionError::Wire(_))
        }),
        (option(1, b"other"), |error| matches!(error, SessionError::UnknownExport(_))),
        (option(1, b"\xff"), |error| matches!(error, SessionError::Option { .. })),
    ];
    for (bytes, is) in cases {
        let (ended, ()) = Server::new().serve(async |client| {
            client.take(18).await;
            // It may have hung up already.
            let _ = client.send(&bytes).await;
            assert!(client.is_at_end().await);
        });
        let error = ended.unwrap_err();
        assert!(is(&error), "{error}");
    }
}

#[test]
fn nobody_negotiates_for_ever() {
    let (ended, ()) = Server::new().serve(async |client| {
        client.greet(BOTH).await;
        for _ in 0..100 {
            client.ask(&ClientOption::List).await;
        }
        assert!(client.is_at_end().await);
    });
    assert!(matches!(ended, Err(SessionError::TooManyOptions(100))), "{ended:?}");

    let server = Server::new();
    let (ended, ()) = server.serve(async |client| {
        client.greet(BOTH).await;
        client.send(b"IHAVE").await.unwrap();
        server.time.pass();
        assert!(client.is_at_end().await);
    });
    assert!(matches!(ended, Err(SessionError::TooSlow)), "{ended:?}");
}

#[test]
fn a_server_that_ends_does_not_wait_for_who_negotiates() {
    let server = Server::new();
    let (ended, ()) = server.serve(async |client| {
        client.greet(BOTH).await;
        server.stop.stop();
        assert!(client.is_at_end().await);
    });
    assert!(matches!(ended, Err(SessionError::Stopped)), "{ended:?}");
}
