use super::*;
use crate::device::IoBuf;
use crate::device::nbd::operation::Outcome;
use futures_channel::oneshot;

const TIMEOUT: Duration = Duration::from_secs(3);

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// The state of a device with `connections` connections, which remembers at most `most_remembered`
/// bytes.
fn connected(connections: usize, most_remembered: u64) -> State {
    let flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_WRITE_ZEROES;
    let agreed = Agreed { size: 1 << 20, flags, block_size: 512, most: 1 << 16, structured: true };
    let mut state = State::new(agreed, Some(TIMEOUT), most_remembered, Rules::default());
    state.connected(connections);
    state
}

fn begin(state: &mut State, offset: u64, kind: Kind) -> oneshot::Receiver<Outcome> {
    let length = if matches!(kind, Kind::Flush) { 0 } else { 512 };
    let (done, outcome) = oneshot::channel();
    state.begin(Operation { offset, length, kind, done, in_flight: None });
    outcome
}

fn write(durably: bool) -> Kind {
    Kind::Write { parts: vec![IoBuf::zeroed(512).into()], durably }
}

/// What goes out on a connection: the command and the cookie.
fn sent(state: &mut State, on: usize) -> Option<(Command, u64)> {
    match state.next(on, at(0)) {
        Next::Send(Outgoing { request, .. }) => Some((request.command, request.cookie)),
        Next::Wait | Next::Close => None,
    }
}

fn answer(state: &mut State, on: usize, cookie: u64, outcome: Result<(), Errno>) {
    if let Err(errno) = outcome {
        assert_eq!(state.error(on, cookie, errno), Ok(true));
    }
    assert_eq!(state.answered(on, cookie), Ok(()));
}

fn failed(outcome: &mut oneshot::Receiver<Outcome>) -> Option<Errno> {
    outcome.try_recv().expect("not canceled")?.err()
}

#[test]
fn a_flush_waits_for_the_one_that_the_device_makes_by_itself_and_tells_of_its_error() {
    for kind in [Kind::Flush, write(true)] {
        let mut state = connected(2, 512);
        let _first = begin(&mut state, 0, write(false));
        let (_, cookie) = sent(&mut state, 0).expect("a write");
        answer(&mut state, 0, cookie, Ok(()));
        let mut second = begin(&mut state, 512, write(false));
        let (command, own) = sent(&mut state, 0).expect("a flush for room");
        assert_eq!(command, Command::Flush);
        let is_flush = matches!(kind, Kind::Flush);
        let mut of_caller = begin(&mut state, 1024, kind);
        assert_eq!(sent(&mut state, 1), None, "the server might tell one alone of the loss");
        answer(&mut state, 0, own, Err(Errno::EIO));
        assert_eq!(failed(&mut second), Some(Errno::EIO));
        if is_flush {
            let (_, cookie) = sent(&mut state, 1).expect("the flush of the caller");
            answer(&mut state, 1, cookie, Ok(()));
        }
        assert_eq!(failed(&mut of_caller), Some(Errno::EIO));
    }
}

#[test]
fn no_change_waits_for_ever_for_room_that_no_flush_makes() {
    let mut state = connected(1, 511);
    let _first = begin(&mut state, 0, write(false));
    let (_, cookie) = sent(&mut state, 0).expect("a write");
    answer(&mut state, 0, cookie, Ok(()));
    let mut zero = begin(&mut state, 512, Kind::Zero { keep_space: true });
    let (command, own) = sent(&mut state, 0).expect("a flush for room");
    assert_eq!(command, Command::Flush);
    answer(&mut state, 0, own, Err(Errno::ENOSPC));
    assert_eq!(failed(&mut zero), Some(Errno::ENOSPC));
}

/// After a link was lost with writes under way, a flush shows that the server's disk works.
fn flush_first(state: &mut State) {
    let (command, cookie) = sent(state, 0).expect("a flush");
    assert_eq!(command, Command::Flush);
    assert_eq!(sent(state, 0), None, "all else waits for it");
    answer(state, 0, cookie, Ok(()));
}

#[test]
fn no_time_limit_ends_what_waits_for_late_writes_on_a_link_that_stands() {
    let mut state = connected(1, 1 << 20);
    let _first = begin(&mut state, 0, write(true));
    sent(&mut state, 0).expect("a write");
    state.lost("a test".into(), at(1));
    state.connected(1);
    flush_first(&mut state);
    let (_, cookie) = sent(&mut state, 0).expect("the same write");
    answer(&mut state, 0, cookie, Ok(()));
    state.lost("a test".into(), at(3));
    let mut second = begin(&mut state, 0, write(true));
    state.connected(1);
    flush_first(&mut state);
    assert_eq!(sent(&mut state, 0), None, "the first write may come late");
    state.pass(at(3));
    state.pass(at(3) + TIMEOUT);
    assert!(second.try_recv().expect("not canceled").is_none(), "it waits for no link");
    assert!(state.pass(at(8)));
    let (_, cookie) = sent(&mut state, 0).expect("the second write");
    answer(&mut state, 0, cookie, Ok(()));
    assert_eq!(failed(&mut second), None);
}

#[test]
fn a_new_time_limit_holds_for_what_waits_and_what_has_given_up_waits_again() {
    let mut state = connected(1, 1 << 20);
    state.lost("a test".into(), at(1));
    let mut waits = begin(&mut state, 0, write(true));
    state.set_timeout(None, at(100));
    assert!(!state.pass(at(100)), "there is no limit");
    state.set_timeout(Some(at(200)), at(100));
    assert!(!state.pass(at(200)));
    state.set_timeout(Some(at(150)), at(200));
    assert!(state.pass(at(200)));
    assert_eq!(failed(&mut waits), Some(Errno::ETIMEDOUT));
    let status = state.status(at(200));
    assert!(status.has_given_up && !status.is_awaited(), "{status:?}");
    state.set_timeout(Some(at(160)), at(201));
    assert_eq!(failed(&mut begin(&mut state, 0, write(true))), Some(Errno::ETIMEDOUT));
    state.set_timeout(Some(at(300)), at(201));
    let mut waits = begin(&mut state, 0, write(true));
    assert!(state.status(at(201)).is_awaited() && waits.try_recv().expect("it waits").is_none());
    state.connected(1);
    let (_, cookie) = sent(&mut state, 0).expect("a write");
    answer(&mut state, 0, cookie, Ok(()));
    assert_eq!(failed(&mut waits), None);
}

#[test]
fn no_time_limit_makes_another_export_the_right_one() {
    let mut state = connected(1, 1 << 20);
    state.lost("a test".into(), at(1));
    state.failed("another export".into(), true);
    state.set_timeout(None, at(2));
    assert_eq!(failed(&mut begin(&mut state, 0, write(true))), Some(Errno::ESTALE));
}

#[test]
fn a_reply_without_end_breaks_the_protocol() {
    let mut state = connected(1, 1 << 20);
    let _write = begin(&mut state, 0, write(false));
    let (_, cookie) = sent(&mut state, 0).expect("a write");
    for nth in 0..MOST_EMPTY_PARTS / 2 {
        assert_eq!(state.error(0, cookie, Errno::EIO), Ok(nth == 0));
        assert_eq!(state.nothing(0, cookie), Ok(()));
    }
    assert!(state.nothing(0, cookie).is_err() && state.error(0, cookie, Errno::EIO).is_err());
}
