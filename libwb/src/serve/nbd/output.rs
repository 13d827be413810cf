//! Replies that a client has not taken yet.

use crate::device::IoBuf;
use crate::nbd::Reply;
use futures_lite::io::AsyncWrite;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// How many parts go into one call.
const MOST_PARTS: usize = 64;
/// Replies share a part until it is this long in bytes. A part is freed once all of it was sent.
const MOST_REPLIES: usize = 64 << 10;

enum Part {
    Replies(Vec<u8>),
    Data(IoBuf),
}

impl Part {
    fn bytes(&self) -> &[u8] {
        match self {
            Part::Replies(bytes) => bytes,
            Part::Data(buf) => buf,
        }
    }
}

/// Replies to a client, in order.
#[derive(Default)]
pub(super) struct Output {
    parts: VecDeque<Part>,
    /// How much of the first part was sent.
    sent: usize,
    /// Length of all parts in bytes.
    bytes: usize,
    /// The stream may hold data back.
    is_held_back: bool,
}

impl Output {
    /// Its length in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many parts are held: each takes more memory than its bytes.
    pub(super) fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Appends a reply and the data that follows it.
    pub(super) fn push(&mut self, reply: &Reply, data: Option<IoBuf>) {
        let has_room = |part: &Part| match part {
            Part::Replies(replies) => replies.len() < MOST_REPLIES,
            Part::Data(_) => false,
        };
        if !self.parts.back().is_some_and(has_room) {
            self.parts.push_back(Part::Replies(Vec::new()));
        }
        if let Some(Part::Replies(replies)) = self.parts.back_mut() {
            let before = replies.len();
            reply.encode(replies);
            self.bytes += replies.len() - before;
        }
        if let Some(data) = data {
            self.bytes += data.len();
            self.parts.push_back(Part::Data(data));
        }
    }

    /// Sends as much as the stream takes. Ready once it has taken everything.
    pub(super) fn poll_send<S: AsyncWrite>(
        &mut self,
        mut stream: Pin<&mut S>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.parts.is_empty() {
            let mut slices = [IoSlice::new(&[]); MOST_PARTS];
            for (nth, (slice, part)) in slices.iter_mut().zip(&self.parts).enumerate() {
                *slice = IoSlice::new(&part.bytes()[if nth == 0 { self.sent } else { 0 }..]);
            }
            let slices = &slices[..self.parts.len().min(MOST_PARTS)];
            match ready!(stream.as_mut().poll_write_vectored(context, slices))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.forget(sent),
            }
            self.is_held_back = true;
        }
        if self.is_held_back {
            ready!(stream.poll_flush(context))?;
            self.is_held_back = false;
        }
        Poll::Ready(Ok(()))
    }

    fn forget(&mut self, sent: usize) {
        self.bytes -= sent;
        self.sent += sent;
        while let Some(first) = self.parts.front().map(|part| part.bytes().len())
            && first <= self.sent
        {
            self.sent -= first;
            self.parts.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_fn, poll_once};

    /// Takes all but the last byte that it is offered.
    struct Reluctant;

    impl AsyncWrite for Reluctant {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            if buf.len() > 1 { Poll::Ready(Ok(buf.len() - 1)) } else { Poll::Pending }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn replies_that_were_sent_are_freed_although_some_are_always_left() {
        let (mut output, mut stream) = (Output::default(), Reluctant);
        for cookie in 0..1 << 18 {
            output.push(&Reply::Simple { cookie, result: Ok(()) }, None);
            let sending = poll_fn(|context| output.poll_send(Pin::new(&mut stream), context));
            assert!(block_on(poll_once(sending)).is_none());
            let held: usize = output.parts.iter().map(|part| part.bytes().len()).sum();
            assert!(held <= output.bytes() + MOST_REPLIES + 64, "{held} bytes are held");
        }
    }
}
