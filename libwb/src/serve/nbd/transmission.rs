//! The transmission phase with one client. One future does everything: it takes requests out of
//! what has come, carries them out, and sends replies in any order. This way, many requests need
//! few system calls, and no request needs a task of its own.

use super::asked::{Asked, ZEROS, perform, understand};
use super::error::SessionError;
use super::input::Input;
use super::output::Output;
use super::stop::Stop;
use crate::format::{to_u64, to_usize};
use crate::nbd::{Chunk, Command, Decoded, Reply, Request};
use crate::runtime::Runtime;
use crate::serve::request::{Answer, Outcome};
use crate::serve::{Options, Volume};
use futures_lite::future::{or, pending, yield_now};
use futures_lite::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use nix::errno::Errno;
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// How much data of requests and replies a client may have here until no more is taken from it, in
/// bytes. The last request and what has come of the next one may be beyond that.
const MAX_HELD: usize = 32 << 20;
/// The maximum number of requests of a client that are carried out at a time, with those whose
/// data it has not taken.
const MAX_IN_FLIGHT: usize = 512;
/// How often a client is looked after before other tasks get a turn.
const BURST: usize = 8;
/// Replies of this length are sent although more requests come, in bytes.
const ENOUGH_TO_SEND: usize = 128 << 10;
/// How long a client that goes may take for its last replies.
const TO_TAKE_REPLIES: Duration = Duration::from_secs(30);
/// How long a client may take to hang up after its last reply.
const TO_HANG_UP: Duration = Duration::from_secs(1);

/// A request that was carried out.
struct Done {
    request: Request,
    outcome: Outcome,
}

/// A request that is refused once its data has passed.
struct Refused {
    request: Request,
    errno: Errno,
    /// How much of its data is still to come, in bytes.
    left: u64,
}

/// What it takes until another request can be taken out of the input.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// More must come.
    Input,
    /// The client must get replies.
    Replies,
    /// There will be none.
    End,
}

/// Serves a client that has chosen its export.
pub(super) struct Transmission<V, S> {
    volume: V,
    size: u64,
    options: Options,
    /// Whether reads get structured replies.
    structured: bool,
    stream: S,
    input: Input,
    refused: Option<Refused>,
    in_flight: FuturesUnordered<BoxFuture<'static, Done>>,
    /// Data of the requests in flight, in bytes.
    in_flight_bytes: usize,
    output: Output,
}

impl<V: Volume, S: AsyncRead + AsyncWrite + Unpin + Send> Transmission<V, S> {
    pub(super) fn new(
        volume: V,
        size: u64,
        options: Options,
        structured: bool,
        stream: S,
    ) -> Transmission<V, S> {
        let (input, output) = (Input::new(), Output::default());
        let (in_flight, in_flight_bytes) = (FuturesUnordered::new(), 0);
        Transmission {
            volume,
            size,
            options,
            structured,
            stream,
            input,
            refused: None,
            in_flight,
            in_flight_bytes,
            output,
        }
    }

    pub(super) async fn run(
        mut self,
        runtime: &dyn Runtime,
        stop: &Stop,
    ) -> Result<(), SessionError> {
        let stopped = async {
            stop.stopped().await;
            Ok(())
        };
        let served = or(stopped, poll_fn(|context| self.poll_serve(context))).await;
        if stop.is_held() {
            // Other requests may wait for these.
            while self.in_flight.next().await.is_some() {}
            return pending().await;
        }
        let sent = match &served {
            Err(SessionError::Io(_)) => Ok(()),
            _ => self.finish(runtime).await,
        };
        // A request is never given up halfway, even if no one waits for it any more.
        while self.in_flight.next().await.is_some() {}
        served.and(sent)
    }

    /// Takes requests until the client goes.
    fn poll_serve(&mut self, context: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        for _ in 0..BURST {
            let (has_taken, needs) = self.take_requests()?;
            if needs == Needs::End {
                return Poll::Ready(Ok(()));
            }
            let has_collected = self.collect(context);
            let has_come = match needs {
                Needs::Input => match self.poll_fill(context)? {
                    Poll::Ready(0) => return Poll::Ready(Ok(())),
                    filled => filled.is_ready(),
                },
                _ => false,
            };
            // While requests come, their replies wait for each other: fewer calls send them all.
            let has_sent =
                (!has_come || self.output.bytes() >= ENOUGH_TO_SEND) && self.send_some(context)?;
            if !(has_taken || has_collected || has_come || has_sent) {
                return Poll::Pending;
            }
        }
        self.send_some(context)?;
        context.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_fill(&mut self, context: &mut Context<'_>) -> io::Result<Poll<usize>> {
        self.input.poll_fill(Pin::new(&mut self.stream), context)
    }

    /// Sends what the stream takes. Returns whether it has taken anything.
    fn send_some(&mut self, context: &mut Context<'_>) -> io::Result<bool> {
        let unsent = self.output.bytes();
        if let Poll::Ready(sent) = self.poll_send(context) {
            sent?;
        }
        Ok(self.output.bytes() < unsent)
    }

    /// Begins all requests that have come and that the client may have here. Also returns whether
    /// anything was taken out of the input.
    fn take_requests(&mut self) -> Result<(bool, Needs), SessionError> {
        let mut has_taken = false;
        loop {
            let held = self.in_flight_bytes + self.output.bytes();
            // A read takes two parts: its reply and its data.
            let requests = self.in_flight.len() + self.output.parts() / 2;
            if held >= MAX_HELD || requests >= MAX_IN_FLIGHT {
                return Ok((has_taken, Needs::Replies));
            }
            if let Some(mut refused) = self.refused.take() {
                let passed = refused.left.min(to_u64(self.input.bytes().len()));
                self.input.take(to_usize(passed));
                refused.left -= passed;
                has_taken |= passed > 0;
                if refused.left > 0 {
                    self.refused = Some(refused);
                    return Ok((has_taken, Needs::Input));
                }
                self.reply(&refused.request, Err(refused.errno));
            }
            let (request, head) = match Request::decode(self.input.bytes())? {
                Decoded::Value(request, head) => (request, head),
                Decoded::More(more) => {
                    self.input.make_room_for(self.input.bytes().len() + more);
                    return Ok((has_taken, Needs::Input));
                }
            };
            if request.command == Command::Disconnect {
                return Ok((true, Needs::End));
            }
            match understand(&request, self.size, &self.options) {
                Err(errno) => {
                    self.input.take(head);
                    self.refused = Some(Refused { request, errno, left: request.payload().into() });
                }
                Ok(asked) => {
                    let end = head + to_usize(request.payload().into());
                    if self.input.bytes().len() < end {
                        self.input.make_room_for(end);
                        return Ok((has_taken, Needs::Input));
                    }
                    self.begin(request, asked, head..end);
                    self.input.take(end);
                }
            }
            has_taken = true;
        }
    }

    /// Begins a request whose data is there.
    fn begin(&mut self, request: Request, asked: Asked, data: Range<usize>) {
        match perform(&self.volume, asked, &self.input.bytes()[data]) {
            Answer::Ready(outcome) => self.reply(&request, outcome),
            Answer::Later(work) => {
                self.in_flight_bytes += data_of(&request);
                self.in_flight.push(Box::pin(async move { Done { request, outcome: work.await } }));
            }
        }
    }

    /// Replies to the requests that have ended. Returns whether there were any.
    fn collect(&mut self, context: &mut Context<'_>) -> bool {
        let mut has_any = false;
        while let Poll::Ready(Some(Done { request, outcome })) =
            self.in_flight.poll_next_unpin(context)
        {
            self.in_flight_bytes -= data_of(&request);
            self.reply(&request, outcome);
            has_any = true;
        }
        has_any
    }

    fn reply(&mut self, request: &Request, outcome: Outcome) {
        let cookie = request.cookie;
        if !(self.structured && request.command == Command::Read) {
            let result = outcome.as_ref().map(drop).map_err(|&errno| errno);
            return self.output.push(&Reply::Simple { cookie, result }, outcome.ok().flatten());
        }
        let (chunk, data) = match outcome {
            Ok(data) => {
                let (offset, length) = (request.offset, request.length);
                (Chunk::Data { offset, length }, data)
            }
            Err(errno) => {
                let message = String::new();
                (Chunk::Error { errno, message, offset: None }, None)
            }
        };
        self.output.push(&Reply::Chunk { cookie, done: true, chunk }, data);
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.output.poll_send(Pin::new(&mut self.stream), context)
    }

    /// Waits for the requests in flight, and sends what is left.
    async fn finish(&mut self, runtime: &dyn Runtime) -> Result<(), SessionError> {
        poll_fn(|context| {
            self.collect(context);
            if let Poll::Ready(sent) = self.poll_send(context) {
                sent?;
            }
            if self.in_flight.is_empty() {
                Poll::Ready(Ok::<_, SessionError>(()))
            } else {
                Poll::Pending
            }
        })
        .await?;
        let send = async {
            poll_fn(|context| self.poll_send(context)).await?;
            Ok(self.stream.close().await?)
        };
        let too_slow = async {
            runtime.sleep(TO_TAKE_REPLIES).await;
            Err(SessionError::NotTaken)
        };
        or(send, too_slow).await?;
        or(self.hang_up(), runtime.sleep(TO_HANG_UP)).await;
        Ok(())
    }

    /// Waits until the client hangs up. If a socket is closed while it holds unread input, TCP may
    /// take away replies that the client has not read yet.
    async fn hang_up(&mut self) {
        let mut bytes = [0; 512];
        while self.stream.read(&mut bytes).await.is_ok_and(|length| length > 0) {
            yield_now().await;
        }
    }
}

/// How much memory a request takes while it is carried out, with its reply, in bytes.
fn data_of(request: &Request) -> usize {
    match request.command {
        Command::Read | Command::Write => to_usize(request.length.into()),
        // The zeros, and those of them that wait, if the volume writes zeros.
        Command::WriteZeroes => 2 * ZEROS.min(to_usize(request.length.into())),
        _ => 0,
    }
}
