//! One connection while requests are sent: what goes out, and what comes in.

use super::connector::BoxStream;
use super::handshake::{LinkError, read_message};
use super::shared::Shared;
use super::state::{Next, Outgoing};
use crate::nbd::{Chunk, Command, CommandFlags, Reply, Request};
use futures_lite::future::yield_now;
use futures_util::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;

/// How much of the data of a read is waited for at a time, in bytes. That much counts as progress.
const STEP: usize = 256 << 10;
/// How many replies are taken in a row.
const IN_A_ROW: u32 = 32;
/// How much of what comes is taken in ahead, in bytes.
const AHEAD: usize = 4096;

/// Both directions of a connection.
pub(super) fn halves(stream: BoxStream) -> (Incoming, WriteHalf<BoxStream>) {
    let (incoming, outgoing) = stream.split();
    (BufReader::with_capacity(AHEAD, incoming), outgoing)
}

pub(super) type Incoming = BufReader<ReadHalf<BoxStream>>;

/// Why a connection is over, for people.
fn ended(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server has closed the connection".into(),
        _ => format!("the connection is broken: {error}"),
    }
}

/// Sends requests until all are done and no more will come.
///
/// # Errors
/// Why the connection is over.
pub(super) async fn send(
    mut stream: WriteHalf<BoxStream>,
    shared: &Shared,
    on: usize,
) -> Result<(), String> {
    loop {
        let news = shared.news.listen();
        let next = shared.state().next(on, shared.now());
        match next {
            Next::Wait => news.await,
            Next::Send(outgoing) => {
                write(&mut stream, outgoing, || shared.state().progress(on, shared.now()))
                    .await
                    .map_err(ended)?;
            }
            Next::Close => {
                let bye = Request {
                    flags: CommandFlags::empty(),
                    command: Command::Disconnect,
                    cookie: 0,
                    offset: 0,
                    length: 0,
                };
                let _ =
                    write(&mut stream, Outgoing { request: bye, parts: Vec::new() }, || ()).await;
                let _ = stream.close().await;
                return Ok(());
            }
        }
    }
}

async fn write(
    stream: &mut WriteHalf<BoxStream>,
    Outgoing { request, parts }: Outgoing,
    progress: impl Fn(),
) -> io::Result<()> {
    let mut header = Vec::new();
    request.encode(&mut header);
    let mut slices: Vec<IoSlice<'_>> = std::iter::once(&header[..])
        .chain(parts.iter().map(|part| &part[..]))
        .map(IoSlice::new)
        .collect();
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        let sent = poll_fn(|context| Pin::new(&mut *stream).poll_write_vectored(context, rest));
        match sent.await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            sent => IoSlice::advance_slices(&mut rest, sent),
        }
        progress();
    }
    stream.flush().await
}

/// Receives replies until the connection is over. Returns why.
pub(super) async fn receive(mut stream: Incoming, shared: &Shared, on: usize) -> String {
    let mut received = 0_u32;
    loop {
        if let Err(why) = receive_one(&mut stream, shared, on).await {
            return why;
        }
        shared.tell();
        // A server that always has something to say must not keep the thread from other tasks.
        received = received.wrapping_add(1);
        if received.is_multiple_of(IN_A_ROW) {
            yield_now().await;
        }
    }
}

async fn receive_one(stream: &mut Incoming, shared: &Shared, on: usize) -> Result<(), String> {
    let reply = read_message(stream, Reply::decode).await.map_err(|error| match error {
        LinkError::Io(error) => ended(error),
        error => error.to_string(),
    })?;
    shared.state().progress(on, shared.now());
    match reply {
        Reply::Simple { cookie, result } => {
            let (asked_for, is_structured) = {
                let mut state = shared.state();
                (state.is_read(on, cookie)?, state.is_structured())
            };
            match (result, asked_for) {
                (Err(errno), _) => drop(shared.state().error(on, cookie, errno)?),
                (Ok(()), Some(_)) if is_structured => {
                    return Err("the server answers a read with a simple reply".into());
                }
                (Ok(()), Some(range)) => {
                    let length = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
                    receive_data(stream, shared, on, cookie, range.start, length).await?;
                }
                (Ok(()), None) => {}
            }
            shared.state().answered(on, cookie)
        }
        Reply::Chunk { .. } if !shared.state().is_structured() => {
            Err("the server sends a structured reply, which it was not asked for".into())
        }
        Reply::Chunk { cookie, done, chunk } => {
            receive_chunk(stream, shared, on, cookie, chunk).await?;
            if done { shared.state().answered(on, cookie) } else { Ok(()) }
        }
    }
}

async fn receive_chunk(
    stream: &mut Incoming,
    shared: &Shared,
    on: usize,
    cookie: u64,
    chunk: Chunk,
) -> Result<(), String> {
    match chunk {
        Chunk::Nothing => shared.state().nothing(on, cookie),
        Chunk::Data { offset, length } => {
            receive_data(stream, shared, on, cookie, offset, length).await
        }
        Chunk::Hole { offset, length } => {
            let mut state = shared.state();
            let (mut buf, within) = state.data_begins(on, cookie, offset, length)?;
            buf[within].fill(0);
            state.data_ends(on, cookie, buf)
        }
        Chunk::Error { errno, message, .. } => {
            let is_first = shared.state().error(on, cookie, errno)?;
            if is_first && !message.is_empty() {
                tracing::warn!("the NBD server says: {message}");
            }
            Ok(())
        }
        Chunk::Unknown { kind, .. } => Err(format!("the server sends a chunk of kind {kind}")),
    }
}

async fn receive_data(
    stream: &mut Incoming,
    shared: &Shared,
    on: usize,
    cookie: u64,
    offset: u64,
    length: u32,
) -> Result<(), String> {
    let (mut buf, Range { start, end }) = shared.state().data_begins(on, cookie, offset, length)?;
    for step in buf[start..end].chunks_mut(STEP) {
        stream.read_exact(step).await.map_err(ended)?;
        shared.state().progress(on, shared.now());
        yield_now().await;
    }
    shared.state().data_ends(on, cookie, buf)
}
