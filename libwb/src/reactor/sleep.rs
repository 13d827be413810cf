//! The future that lets time pass.

use super::inbox::Shared;
use super::timers::Timer;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

pub(super) struct Sleep {
    shared: Arc<Shared>,
    end: Instant,
    timer: Option<Timer>,
}

impl Sleep {
    /// Begins now.
    pub(super) fn new(shared: Arc<Shared>, duration: Duration) -> Sleep {
        Sleep { shared, end: Instant::now() + duration, timer: None }
    }

    fn cancel(&mut self) {
        if let Some(timer) = self.timer.take() {
            let waker = self.shared.inbox.lock().timers.remove(timer);
            drop(waker);
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.cancel();
        if Instant::now() >= self.end {
            return Poll::Ready(());
        }
        let (shared, end) = (self.shared.clone(), self.end);
        shared.post(|inbox| {
            // Once the reactor has ended, nothing would wake this sleep, so it ends at once. It
            // must not end before: a task that sleeps in a loop would never return, and so could
            // not be dropped.
            self.timer = (!inbox.ended).then(|| inbox.timers.add(end, context.waker().clone()));
        });
        if self.timer.is_some() { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.cancel();
    }
}
