use super::*;
use event_listener::Event;

#[test]
fn tasks_that_are_woken_when_the_reactor_has_ended_are_dropped() {
    let (reactor, event) = (Reactor::start().expect("io_uring"), Arc::new(Event::new()));
    let (listening, listens) = mpsc::channel();
    let (kept, dropped) = mpsc::channel::<()>();
    for _ in 0..3 {
        let (event, listening, kept) = (event.clone(), listening.clone(), kept.clone());
        reactor.handle().spawn(Box::pin(async move {
            let listener = event.listen();
            let _ = listening.send(());
            listener.await;
            drop(kept);
        }));
        listens.recv().expect("the task runs");
    }
    drop(kept);
    drop(reactor);
    let notifying = std::thread::spawn(move || event.notify(1));
    // Each passes the notification on as it is dropped, under a lock that the next one takes.
    let outcome = dropped.recv_timeout(Duration::from_secs(60));
    assert_eq!(outcome, Err(mpsc::RecvTimeoutError::Disconnected), "a task is stuck");
    assert_eq!(notifying.join().expect("no panic"), 1);
}
