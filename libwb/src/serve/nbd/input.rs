//! What has come from a client and is not understood yet.

use crate::nbd::REQUEST_BYTES;
use futures_lite::io::AsyncRead;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Room for many small requests, so that one system call gets them all, and for one request of the
/// size that programs use to copy images.
const USUAL_BYTES: usize = (512 << 10) + REQUEST_BYTES;

/// Bytes from a client. The buffer grows for a long request, and shrinks once
/// it is empty.
pub(super) struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Input {
        Input { buffer: vec![0; USUAL_BYTES], start: 0, end: 0 }
    }

    /// What has come.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Forgets the first bytes.
    pub(super) fn take(&mut self, bytes: usize) {
        self.start += bytes;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > USUAL_BYTES {
                self.buffer = vec![0; USUAL_BYTES];
            }
        }
    }

    /// Makes room for more of a message of this length in bytes. A part of it may have come
    /// already.
    pub(super) fn make_room_for(&mut self, bytes: usize) {
        if bytes <= self.buffer.len() - self.start {
            return;
        }
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if bytes > self.buffer.len() {
            // A header alone must not take the memory of its data.
            self.buffer.resize(bytes.min(2 * self.buffer.len()), 0);
        }
    }

    /// Gets more bytes; 0 at the end of the stream. There must be room.
    pub(super) fn poll_fill(
        &mut self,
        stream: Pin<&mut impl AsyncRead>,
        context: &mut Context<'_>,
    ) -> io::Result<Poll<usize>> {
        let room = &mut self.buffer[self.end..];
        debug_assert!(!room.is_empty());
        let filled = match stream.poll_read(context, room) {
            Poll::Ready(filled) => Poll::Ready(filled?),
            Poll::Pending => Poll::Pending,
        };
        if let Poll::Ready(length) = filled {
            self.end += length;
        }
        Ok(filled)
    }
}
