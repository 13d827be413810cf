//! Two ends of a connection in memory. Each direction holds a limited number of bytes.

use futures_lite::io::{AsyncRead, AsyncWrite};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

#[derive(Default)]
struct Direction {
    bytes: VecDeque<u8>,
    /// The most that it holds.
    room: usize,
    is_closed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Direction {
    fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }
}

/// One end. Dropping it ends both directions.
pub(super) struct End {
    input: Arc<Mutex<Direction>>,
    output: Arc<Mutex<Direction>>,
}

/// A connection that holds `room` bytes in each direction.
pub(super) fn link(room: usize) -> (End, End) {
    let [there, back] =
        [0; 2].map(|_| Arc::new(Mutex::new(Direction { room, ..Direction::default() })));
    (End { input: there.clone(), output: back.clone() }, End { input: back, output: there })
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut input = self.input.lock();
        if input.bytes.is_empty() && !input.is_closed {
            input.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        let length = buf.len().min(input.bytes.len());
        buf.iter_mut().zip(input.bytes.drain(..length)).for_each(|(to, byte)| *to = byte);
        input.wake();
        Poll::Ready(Ok(length))
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut output = self.output.lock();
        if output.is_closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let length = buf.len().min(output.room - output.bytes.len());
        if length == 0 {
            output.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        output.bytes.extend(&buf[..length]);
        output.wake();
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut output = self.output.lock();
        output.is_closed = true;
        output.wake();
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        for direction in [&self.input, &self.output] {
            let mut direction = direction.lock();
            direction.is_closed = true;
            direction.wake();
        }
    }
}
