//! A client that says what a test wants, honest or not.

use super::NAME;
use super::link::End;
use crate::format::to_usize;
use crate::nbd::{
    Chunk, ClientFlags, ClientOption, Command, CommandFlags, Decoded, ExportName, GREETING_BYTES,
    Greeting, InfoRequest, OptionReply, Reply, Request, WireError, encode_client_flags,
};
use futures_lite::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use nix::errno::Errno;
use std::io;

/// The client's side of a connection.
pub(super) struct Client<S = End> {
    stream: S,
    /// What has come and is not decoded yet.
    bytes: Vec<u8>,
}

pub(super) fn name(text: &str) -> ExportName {
    ExportName::new(text).unwrap()
}

pub(super) fn go(text: &str, wanted: &[u16]) -> ClientOption {
    ClientOption::Go(InfoRequest { name: name(text), wanted: wanted.to_vec() })
}

pub(super) fn request(command: Command, cookie: u64, offset: u64, length: usize) -> Request {
    let length = u32::try_from(length).unwrap();
    Request { flags: CommandFlags::empty(), command, cookie, offset, length }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub(super) fn new(stream: S) -> Client<S> {
        Client { stream, bytes: Vec::new() }
    }

    pub(super) fn into_stream(self) -> S {
        assert!(self.bytes.is_empty(), "more has come");
        self.stream
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    pub(super) async fn send_request(&mut self, request: Request, data: &[u8]) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        bytes.extend(data);
        self.send(&bytes).await.unwrap();
    }

    /// One more message; `None` if the connection ends first.
    async fn next<T>(
        &mut self,
        decode: impl Fn(&[u8]) -> Result<Decoded<T>, WireError>,
    ) -> Option<T> {
        loop {
            match decode(&self.bytes).unwrap() {
                Decoded::Value(value, taken) => {
                    self.bytes.drain(..taken);
                    return Some(value);
                }
                Decoded::More(_) => self.fill().await?,
            }
        }
    }

    /// Says that no more will come.
    pub(super) async fn hang_up(&mut self) {
        self.stream.close().await.unwrap();
    }

    pub(super) async fn fill(&mut self) -> Option<()> {
        let mut bytes = [0; 4096];
        let length = self.stream.read(&mut bytes).await.ok()?;
        self.bytes.extend(&bytes[..length]);
        (length > 0).then_some(())
    }

    /// That many bytes as they come.
    pub(super) async fn take(&mut self, length: usize) -> Vec<u8> {
        while self.bytes.len() < length {
            self.fill().await.expect("more bytes");
        }
        self.bytes.drain(..length).collect()
    }

    /// Whether the server ends the connection and sends nothing before that.
    pub(super) async fn is_at_end(&mut self) -> bool {
        self.bytes.is_empty() && self.fill().await.is_none()
    }

    pub(super) async fn greet(&mut self, flags: ClientFlags) {
        let greeting = self.take(GREETING_BYTES).await;
        assert!(matches!(Greeting::decode(&greeting), Ok(Decoded::Value(..))));
        let mut bytes = Vec::new();
        encode_client_flags(flags, &mut bytes);
        self.send(&bytes).await.unwrap();
    }

    pub(super) async fn option_reply(&mut self) -> Option<(u32, OptionReply)> {
        self.next(OptionReply::decode).await
    }

    /// Sends an option. Returns all replies to it.
    pub(super) async fn ask(&mut self, option: &ClientOption) -> Vec<OptionReply> {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        self.send(&bytes).await.unwrap();
        let mut replies = Vec::new();
        while let Some((code, reply)) = self.option_reply().await {
            assert_eq!(code, option.code());
            let is_last = matches!(reply, OptionReply::Ack | OptionReply::Error { .. });
            replies.push(reply);
            if is_last {
                break;
            }
        }
        replies
    }

    /// Chooses the export.
    pub(super) async fn begin(&mut self, structured: bool) {
        self.greet(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).await;
        if structured {
            assert_eq!(self.ask(&ClientOption::StructuredReply).await, [OptionReply::Ack]);
        }
        assert_eq!(self.ask(&go(NAME, &[])).await.last(), Some(&OptionReply::Ack));
    }

    /// The next reply, and the data that follows it if that is known.
    pub(super) async fn reply(&mut self) -> Option<(Reply, Vec<u8>)> {
        let reply = self.next(Reply::decode).await?;
        let length = match &reply {
            Reply::Chunk { chunk: Chunk::Data { length, .. }, .. } => to_usize((*length).into()),
            _ => 0,
        };
        let data = self.take(length).await;
        Some((reply, data))
    }

    /// Sends a request and waits for its simple reply.
    pub(super) async fn call(&mut self, request: Request, data: &[u8]) -> Result<(), Errno> {
        self.send_request(request, data).await;
        match self.reply().await {
            Some((Reply::Simple { cookie, result }, _)) if cookie == request.cookie => result,
            other => panic!("the reply to {request:?} is {other:?}"),
        }
    }
}
