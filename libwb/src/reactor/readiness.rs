//! Waiting until a file can be read or written. That may take for ever, so it can be given up.

use super::Handle;
use super::inbox::Shared;
use super::operation::{OpKind, OpResult, Target};
use futures_channel::oneshot;
use nix::errno::Errno;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// What a file is to be ready for.
#[derive(Clone, Copy)]
pub(crate) enum Readiness {
    Readable,
    #[cfg_attr(not(feature = "socket"), allow(dead_code, reason = "for sockets alone"))]
    Writable,
}

/// The future of a file that becomes ready. Dropping it gives up waiting, and lets go of the file.
pub(crate) struct Ready {
    shared: Arc<Shared>,
    result: oneshot::Receiver<OpResult>,
    is_done: bool,
}

impl Handle {
    /// Waits until a file is ready.
    pub(crate) fn ready(&self, file: &Target, what: Readiness) -> Ready {
        let kind = match what {
            Readiness::Readable => OpKind::Readable,
            Readiness::Writable => OpKind::Writable,
        };
        let result = self.begin(file.clone(), None, kind);
        Ready { shared: self.0.clone(), result, is_done: false }
    }
}

impl Future for Ready {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let result = std::task::ready!(Pin::new(&mut self.result).poll(context));
        self.is_done = true;
        Poll::Ready(result.map_or(Err(Errno::ECANCELED), |(outcome, _)| outcome))
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if !self.is_done {
            self.result.close();
            self.shared.post(|inbox| inbox.work.given_up = true);
        }
    }
}
