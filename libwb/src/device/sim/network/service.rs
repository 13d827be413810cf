//! How the simulated server serves one connection.

use super::super::super::nbd::{BoxStream, Connector, LinkError, read_message};
use super::super::super::{BlockDevice, DeviceError, IoBuf};
use super::super::SimDevice;
use super::pipe::{End, Wire};
use super::server::SimServer;
use crate::format::{to_u64, to_usize};
use crate::nbd::{
    Chunk, ClientOption, Command, CommandFlags, Export, Greeting, HandshakeFlags, Info,
    OptionError, OptionReply, Reply, Request, decode_client_flags,
};
use crate::runtime::Runtime;
use futures_channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use nix::errno::Errno;
use std::io;
use std::sync::Arc;
use std::time::Duration;

struct Service {
    server: SimServer,
    device: Arc<SimDevice>,
    export: Export,
    wire: Wire,
    accepted: Duration,
}

/// For how long a server carries out what it got over a connection that its client has left, once
/// it has accepted a newer one. Less than clients count on: the simulator's time jumps, and a
/// disk takes some, too.
const LATEST: Duration = Duration::from_secs(3);

impl Service {
    /// Whether the server does no more for this connection.
    fn is_forgotten(&self) -> bool {
        let newest = self.server.0.state.lock().newest;
        let now = self.server.0.runtime.now();
        self.wire.is_left() && newest > self.accepted && now >= newest + LATEST
    }

    /// Serves until the client or the connection has gone.
    async fn run(self, end: End) {
        let (mut incoming, outgoing) = end.split();
        let (answers, to_send) = unbounded();
        self.server.0.runtime.spawn(Box::pin(send(outgoing, to_send)));
        let structured = self.negotiate(&mut incoming, &answers).await;
        if let Ok(Some(structured)) = structured {
            let service = Arc::new(self);
            while let Ok(true) = service.take(&mut incoming, &answers, structured).await {}
        }
    }

    /// Returns whether replies are structured; none if the client goes.
    async fn negotiate(
        &self,
        incoming: &mut ReadHalf<End>,
        answers: &UnboundedSender<Vec<u8>>,
    ) -> Result<Option<bool>, LinkError> {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        let mut bytes = Vec::new();
        Greeting { flags }.encode(&mut bytes);
        let _ = answers.unbounded_send(bytes);
        read_message(incoming, |bytes| Ok(decode_client_flags(bytes))).await?;
        let mut structured = false;
        loop {
            let option = read_message(incoming, ClientOption::decode_whole).await?;
            self.server.while_it_hangs().await;
            let code = option.code();
            let (mut bytes, mut is_over) = (Vec::new(), false);
            let mut say = |reply: OptionReply| reply.encode(code, &mut bytes);
            match option {
                ClientOption::StructuredReply => {
                    structured = true;
                    say(OptionReply::Ack);
                }
                ClientOption::Go(_) => {
                    say(OptionReply::Info(Info::Export(self.export)));
                    say(OptionReply::Ack);
                    is_over = true;
                }
                ClientOption::Abort => return Ok(None),
                _ => {
                    let (error, message) = (OptionError::Unsupported, String::new());
                    say(OptionReply::Error { error, message });
                }
            }
            let _ = answers.unbounded_send(bytes);
            if is_over {
                return Ok(Some(structured));
            }
        }
    }

    /// Takes a request, and starts to carry it out. Returns false if the client says goodbye.
    async fn take(
        self: &Arc<Self>,
        incoming: &mut ReadHalf<End>,
        answers: &UnboundedSender<Vec<u8>>,
        structured: bool,
    ) -> Result<bool, LinkError> {
        let request = read_message(incoming, Request::decode).await?;
        if request.command == Command::Disconnect {
            return Ok(false);
        }
        let mut data = IoBuf::zeroed(to_usize(request.payload().into()));
        incoming.read_exact(&mut data).await?;
        let lateness = {
            let mut state = self.server.0.state.lock();
            let most = state.lateness.mul_f64(if state.rng.u8(..10) == 0 { 1.0 } else { 0.01 });
            most.mul_f64(state.rng.f64())
        };
        let (service, answers) = (self.clone(), answers.clone());
        self.server.0.runtime.spawn(Box::pin(async move {
            let answer = service.carry_out(request, data, structured, lateness).await;
            let _ = answers.unbounded_send(answer);
        }));
        Ok(true)
    }

    async fn carry_out(
        &self,
        request: Request,
        data: IoBuf,
        structured: bool,
        lateness: Duration,
    ) -> Vec<u8> {
        let Request { offset, cookie, .. } = request;
        self.server.while_it_hangs().await;
        self.server.0.runtime.sleep(lateness).await;
        if self.is_forgotten() {
            return Vec::new();
        }
        let length = u64::from(request.length);
        let none = |done: Result<(), DeviceError>| done.map(|()| None);
        let done = match request.command {
            Command::Read => {
                let buf = IoBuf::zeroed(to_usize(length));
                self.device.read(offset, buf).await.map(Some)
            }
            Command::Write if request.flags.contains(CommandFlags::FUA) => {
                none(self.device.write_durably(offset, vec![data.into()]).await)
            }
            Command::Write => none(self.device.write(offset, data.into()).await),
            Command::Flush => none(self.device.flush().await),
            Command::WriteZeroes => {
                let cleared = self.device.discard(offset, length).await;
                match request.flags.contains(CommandFlags::FUA) {
                    true => none(cleared.and(self.device.flush().await)),
                    false => none(cleared),
                }
            }
            _ => none(Ok(())),
        };
        self.server.while_it_hangs().await;
        let done = done.map_err(|error| match error.cause {
            Errno::ENODEV => Errno::ESHUTDOWN,
            cause => cause,
        });
        answer(cookie, offset, structured, done)
    }
}

/// A reply with the data of a read.
fn answer(
    cookie: u64,
    offset: u64,
    structured: bool,
    done: Result<Option<IoBuf>, Errno>,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    match done {
        Ok(Some(data)) if structured => {
            // In two parts, the last one first.
            let half = data.len() / 2;
            for (part, done) in [(half..data.len(), false), (0..half, true)] {
                let offset = offset + to_u64(part.start);
                let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
                let chunk = Chunk::Data { offset, length };
                Reply::Chunk { cookie, done, chunk }.encode(&mut bytes);
                bytes.extend(&data[part]);
            }
        }
        Ok(data) => {
            Reply::Simple { cookie, result: Ok(()) }.encode(&mut bytes);
            bytes.extend(data.iter().flat_map(|data| data.iter()));
        }
        Err(errno) => Reply::Simple { cookie, result: Err(errno) }.encode(&mut bytes),
    }
    bytes
}

async fn send(mut outgoing: WriteHalf<End>, mut answers: UnboundedReceiver<Vec<u8>>) {
    while let Some(answer) = answers.next().await {
        if outgoing.write_all(&answer).await.is_err() {
            return;
        }
    }
    let _ = outgoing.close().await;
}

impl Connector for SimServer {
    fn connect(&self) -> BoxFuture<'static, io::Result<BoxStream>> {
        let server = self.clone();
        Box::pin(async move {
            let runtime = server.0.runtime.clone();
            runtime.sleep(Duration::from_millis(1)).await;
            let wire = Wire::new(&runtime);
            let [client, end] = wire.ends();
            let service = {
                let mut state = server.0.state.lock();
                if !state.is_alive {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                state.wires.push(wire.clone());
                state.newest = runtime.now();
                let (device, export) = (state.device.clone(), state.export);
                Service { server: server.clone(), device, export, wire, accepted: state.newest }
            };
            runtime.spawn(Box::pin(service.run(end)));
            let client: BoxStream = Box::new(client);
            Ok(client)
        })
    }
}
