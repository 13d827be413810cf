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

    /// Appends a reply and the data that follows it.
    pub(super) fn push(&mut self, reply: &Reply, data: Option<IoBuf>) {
        if !matches!(self.parts.back(), Some(Part::Replies(_))) {
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
