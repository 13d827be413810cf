//! A simulated connection: two directions, each slow, until something happens to it.

use super::super::SimRuntime;
use crate::runtime::Runtime;
use fastrand::Rng;
use futures_util::io::{AsyncRead, AsyncWrite};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// How many bytes are on their way in one direction at most.
const CAPACITY: usize = 64 << 10;

/// One direction.
#[derive(Default)]
struct Way {
    /// Bytes, and when they arrive.
    bytes: VecDeque<(Duration, Vec<u8>)>,
    on_the_way: usize,
    /// The sender will send no more.
    is_closed: bool,
    /// The receiver has gone.
    is_refused: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// It breaks after this many more bytes, counted in both directions together.
    CutAfter(usize),
    /// All that is sent vanishes, and neither side hears of that.
    HalfOpen,
}

struct State {
    rng: Rng,
    ways: [Way; 2],
    /// The longest that bytes take.
    delay: Duration,
    cut_after: Option<usize>,
    is_cut: bool,
    is_half_open: bool,
}

/// A connection, to do something to it.
#[derive(Clone)]
pub(super) struct Wire {
    runtime: SimRuntime,
    state: Arc<Mutex<State>>,
}

impl Wire {
    pub(super) fn new(runtime: &SimRuntime) -> Wire {
        let mut rng = runtime.fork_rng();
        let delay = Duration::from_micros(rng.u64(10..20_000));
        let state = State {
            rng,
            ways: Default::default(),
            delay,
            cut_after: None,
            is_cut: false,
            is_half_open: false,
        };
        Wire { runtime: runtime.clone(), state: Arc::new(Mutex::new(state)) }
    }

    /// The ends of the client and of the server.
    pub(super) fn ends(&self) -> [End; 2] {
        [0, 1].map(|side| End { wire: self.clone(), side })
    }

    pub(super) fn suffer(&self, mishap: Mishap) {
        match mishap {
            Mishap::CutAfter(0) => self.cut(),
            Mishap::CutAfter(bytes) => self.state.lock().cut_after = Some(bytes),
            Mishap::HalfOpen => self.state.lock().is_half_open = true,
        }
    }

    /// Breaks it. What is on its way is lost, or arrives in part.
    pub(super) fn cut(&self) {
        let wakers = {
            let mut state = self.state.lock();
            state.is_cut = true;
            let keep = state.rng.usize(..4);
            state.ways.iter_mut().for_each(|way| way.bytes.truncate(keep));
            state.wakers()
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Whether the client has gone.
    pub(super) fn is_left(&self) -> bool {
        let state = self.state.lock();
        let [_, to_client] = &state.ways;
        state.is_cut || to_client.is_refused
    }

    /// Whether nothing more can happen to it.
    pub(super) fn is_over(&self) -> bool {
        let state = self.state.lock();
        state.is_cut || state.ways.iter().all(|way| way.is_refused)
    }
}

impl State {
    fn wakers(&mut self) -> Vec<Waker> {
        self.ways
            .iter_mut()
            .flat_map(|way| [way.reader.take(), way.writer.take()])
            .flatten()
            .collect()
    }
}

/// One end of a connection.
pub(super) struct End {
    wire: Wire,
    side: usize,
}

fn broken() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let now = self.wire.runtime.now();
        let mut state = self.wire.state.lock();
        let (is_cut, is_half_open) = (state.is_cut, state.is_half_open);
        let way = &mut state.ways[1 - self.side];
        let Some((arrives, bytes)) = way.bytes.front_mut().filter(|_| !is_half_open) else {
            if is_cut {
                return Poll::Ready(Err(broken()));
            }
            if way.is_closed && !is_half_open {
                return Poll::Ready(Ok(0));
            }
            way.reader = Some(context.waker().clone());
            return Poll::Pending;
        };
        if *arrives > now {
            way.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        let taken = bytes.len().min(buf.len());
        buf[..taken].copy_from_slice(&bytes[..taken]);
        bytes.drain(..taken);
        if bytes.is_empty() {
            way.bytes.pop_front();
        }
        way.on_the_way -= taken.min(way.on_the_way);
        let writer = way.writer.take();
        drop(state);
        writer.into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(taken))
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let now = self.wire.runtime.now();
        let mut guard = self.wire.state.lock();
        let state = &mut *guard;
        if state.is_cut || state.ways[self.side].is_refused {
            return Poll::Ready(Err(broken()));
        }
        let way = &mut state.ways[self.side];
        let room = CAPACITY.saturating_sub(way.on_the_way).min(state.cut_after.unwrap_or(CAPACITY));
        if room == 0 {
            way.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let most = buf.len().min(room);
        // At times, only a part is taken.
        let sent = if state.rng.u8(..8) == 0 { state.rng.usize(1..=most.max(1)) } else { most };
        let delay = state.delay.mul_f64(state.rng.f64());
        let arrives = way.bytes.back().map_or(now, |(arrives, _)| *arrives).max(now + delay);
        way.on_the_way += sent;
        if !state.is_half_open {
            way.bytes.push_back((arrives, buf[..sent].to_vec()));
        }
        let is_over = state.cut_after.as_mut().is_some_and(|left| {
            *left -= sent.min(*left);
            *left == 0
        });
        drop(guard);
        let (wire, to) = (self.wire.clone(), self.side);
        self.wire.runtime.call_after(arrives - now, move || {
            if is_over {
                wire.cut();
            }
            let reader = wire.state.lock().ways[to].reader.take();
            reader.into_iter().for_each(Waker::wake);
        });
        Poll::Ready(Ok(sent))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let reader = {
            let way = &mut self.wire.state.lock().ways[self.side];
            way.is_closed = true;
            way.reader.take()
        };
        reader.into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let wakers = {
            let mut state = self.wire.state.lock();
            state.ways[self.side].is_closed = true;
            // The other side sends into nothing.
            state.ways[1 - self.side].is_refused = true;
            state.wakers()
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}
