use super::*;
use crate::device::probe::{Access, open};
use event_listener::Event;
use futures_lite::future::poll_once;

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn a_task_that_another_thread_polls_while_the_reactor_ends_is_dropped_after_that() {
    let reactor = Reactor::start().expect("io_uring");
    let (polled, is_polled) = mpsc::channel();
    let (ended, has_ended) = mpsc::channel::<()>();
    let (kept, dropped) = mpsc::channel::<()>();
    let handle = reactor.handle().clone();
    let other = std::thread::spawn(move || {
        handle.run_now(async move {
            let _ = polled.send(());
            let _ = has_ended.recv();
            std::future::pending::<()>().await;
            drop(kept);
        });
    });
    is_polled.recv().expect("it is polled at once");
    drop(reactor);
    drop(ended);
    other.join().expect("no panic");
    assert_eq!(dropped.try_recv(), Err(mpsc::TryRecvError::Disconnected));
}

#[test]
fn the_end_drops_a_task_that_waits_for_ever_and_the_device_that_it_owns() {
    let (reactor, event) = (Reactor::start().expect("io_uring"), Arc::new(Event::new()));
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(4096).expect("room");
    let device = open(file.path(), Access::Write).expect("nobody has it");
    let (listening, listens) = mpsc::channel();
    let of_task = event.clone();
    reactor.handle().spawn(Box::pin(async move {
        let listener = of_task.listen();
        let _ = listening.send(());
        listener.await;
        drop(device);
    }));
    listens.recv().expect("the task runs");
    assert!(open(file.path(), Access::Write).is_err(), "the task has locked it");
    let handle = reactor.handle().clone();
    drop(reactor);
    open(file.path(), Access::Write).expect("nobody has it any more");
    let late = handle.run_watched(std::future::pending::<()>(), HOUR, || true);
    assert!(late.is_none(), "a task that comes too late is dropped");
}

#[test]
fn sleeps_end_in_their_order_and_nothing_is_left_of_dropped_ones() {
    let reactor = Reactor::start().expect("io_uring");
    let handle = reactor.handle();
    let sleep = |millis| handle.sleep(Duration::from_millis(millis));
    let order = reactor.block_on(async {
        let order = Mutex::new(Vec::new());
        let note = async |millis| {
            sleep(millis).await;
            order.lock().push(millis);
        };
        for _ in 0..1000 {
            // Polled once, and dropped.
            assert!(poll_once(handle.sleep(HOUR)).await.is_none());
        }
        futures_util::join!(note(30), note(1), note(10));
        order.into_inner()
    });
    assert_eq!(order, [1, 10, 30]);
    assert_eq!(handle.0.inbox.lock().timers.next(), None);
    let (waiting, handle) = (reactor.handle().sleep(HOUR), reactor.handle().clone());
    let waiter = std::thread::spawn(|| futures_lite::future::block_on(waiting));
    while handle.0.inbox.lock().timers.next().is_none() {
        std::thread::yield_now();
    }
    drop(reactor);
    waiter.join().expect("its sleep ends with the reactor");
}

#[test]
fn a_task_that_sleeps_again_and_again_is_dropped_when_the_reactor_stops() {
    let reactor = Reactor::start().expect("io_uring");
    let handle = reactor.handle().clone();
    let (running, runs) = mpsc::channel();
    reactor.handle().spawn(Box::pin(async move {
        let _ = running.send(());
        while !handle.0.inbox.lock().stop {
            std::thread::yield_now();
        }
        loop {
            handle.sleep(HOUR).await;
        }
    }));
    runs.recv().expect("the task runs");
    drop(reactor);
}
