//! Negotiation with a client: which export, how it is served, and whether over TLS.

use super::error::SessionError;
use crate::format::to_usize;
use crate::nbd::{
    BlockSizes, ClientFlags, ClientOption, Decoded, Export, ExportName, GREETING_BYTES, Greeting,
    HandshakeFlags, Info, InfoKind, InfoRequest, MAX_OPTION_BYTES, MAX_PAYLOAD_BYTES,
    OPTION_HEADER_BYTES, OptionError, OptionHeader, OptionReply, TransmissionFlags,
    decode_client_flags, encode_export,
};
use crate::serve::Options;
use futures_lite::future::yield_now;
use futures_lite::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use std::io;

/// The maximum number of options that a client may send.
const MAX_OPTIONS: usize = 100;
const PREFERRED_BYTES: u32 = 4096;

/// What a client may choose.
pub(super) struct Offer<'a> {
    /// The name of the only export. The empty name means it, too.
    pub(super) name: &'a ExportName,
    /// Size in bytes.
    pub(super) size: u64,
    pub(super) options: Options,
    /// Whether TLS can be started.
    pub(super) has_tls: bool,
    /// Whether the connection is over TLS already.
    pub(super) is_tls: bool,
}

/// How a negotiation has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agreed {
    /// On transmission.
    Export { structured: bool },
    /// On TLS: the client begins it, and negotiates again.
    Tls,
    /// The client goes away.
    Nothing,
}

/// Greets a client. Returns what it understands.
pub(super) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
) -> Result<ClientFlags, SessionError> {
    let mut greeting = Vec::with_capacity(GREETING_BYTES);
    let offered = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    Greeting { flags: offered }.encode(&mut greeting);
    send(stream, &greeting).await?;
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).await?;
    match decode_client_flags(&bytes) {
        Decoded::Value(flags, _)
            if (ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).contains(flags) =>
        {
            Ok(flags)
        }
        _ => Err(SessionError::ClientFlags(u32::from_be_bytes(bytes))),
    }
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), SessionError> {
    stream.write_all(bytes).await?;
    Ok(stream.flush().await?)
}

/// Answers the options of a client. Reads nothing beyond the last of them: what follows
/// `STARTTLS` must not be taken for what came over TLS.
pub(super) async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    client: ClientFlags,
    offer: &Offer<'_>,
) -> Result<Agreed, SessionError> {
    let mut structured = false;
    let mut replies = Vec::new();
    for _ in 0..MAX_OPTIONS {
        let (header, option) = next_option(stream).await?;
        let step = answer(header, option, client, offer, &mut structured, &mut replies);
        send(stream, &replies).await?;
        replies.clear();
        match step {
            Step::On => {}
            Step::Ended(agreed) => return Ok(agreed),
            Step::Refused(why) => return Err(why),
        }
    }
    Err(SessionError::TooManyOptions(MAX_OPTIONS))
}

/// An option, or why its data is not in order.
type Received = Result<ClientOption, (OptionError, String)>;

async fn next_option<S: AsyncRead + Unpin>(
    stream: &mut S,
) -> Result<(OptionHeader, Received), SessionError> {
    let mut bytes = [0; OPTION_HEADER_BYTES];
    stream.read_exact(&mut bytes).await?;
    let header = match OptionHeader::decode(&bytes)? {
        Decoded::Value(header, _) => header,
        Decoded::More(_) => return Err(SessionError::Io(io::ErrorKind::UnexpectedEof.into())),
    };
    let length = to_usize(header.length.into());
    if length > MAX_OPTION_BYTES {
        skip(stream, length).await?;
        let error = match header.is_known() {
            true => OptionError::TooBig,
            false => OptionError::Unsupported,
        };
        let text = format!("the option has {length} bytes of data; at most {MAX_OPTION_BYTES} fit");
        return Ok((header, Err((error, text))));
    }
    let mut data = vec![0; length];
    stream.read_exact(&mut data).await?;
    let option = ClientOption::decode(header, &data)
        .map_err(|error| (OptionError::Invalid, error.to_string()));
    Ok((header, option))
}

async fn skip<S: AsyncRead + Unpin>(stream: &mut S, length: usize) -> Result<(), SessionError> {
    let mut rest = length;
    let mut bytes = [0; 4096];
    while rest > 0 {
        let piece = rest.min(bytes.len());
        stream.read_exact(&mut bytes[..piece]).await?;
        rest -= piece;
        // A client that sends without a pause must not keep the thread from other tasks.
        yield_now().await;
    }
    Ok(())
}

/// What comes after an option.
enum Step {
    /// Another one.
    On,
    Ended(Agreed),
    Refused(SessionError),
}

fn answer(
    header: OptionHeader,
    received: Received,
    client: ClientFlags,
    offer: &Offer<'_>,
    structured: &mut bool,
    to: &mut Vec<u8>,
) -> Step {
    let mut reply = |reply: OptionReply| reply.encode(header.code, to);
    let refusal = |error, message: String| OptionReply::Error { error, message };
    let needs_tls = offer.has_tls && !offer.is_tls;
    match received {
        Ok(ClientOption::Abort) => {
            reply(OptionReply::Ack);
            return Step::Ended(Agreed::Nothing);
        }
        Ok(ClientOption::StartTls) if needs_tls => {
            reply(OptionReply::Ack);
            return Step::Ended(Agreed::Tls);
        }
        _ if needs_tls && header.code == OptionHeader::EXPORT_NAME => {
            return Step::Refused(SessionError::NoTls);
        }
        _ if needs_tls => {
            reply(refusal(OptionError::TlsRequired, "this server needs TLS".into()));
        }
        Ok(ClientOption::StartTls) if offer.is_tls => {
            reply(refusal(OptionError::Invalid, "TLS was started already".into()));
        }
        Ok(ClientOption::StartTls) => {
            reply(refusal(OptionError::Policy, "this server has no certificate for TLS".into()));
        }
        Ok(ClientOption::List) => {
            let (name, details) = (offer.name.clone(), String::new());
            reply(OptionReply::Server { name, details });
            reply(OptionReply::Ack);
        }
        Ok(ClientOption::StructuredReply) => {
            *structured = true;
            reply(OptionReply::Ack);
        }
        Ok(ClientOption::ExportName(name)) => {
            if !offer.has(&name) {
                return Step::Refused(SessionError::UnknownExport(name));
            }
            let no_zeroes = client.contains(ClientFlags::NO_ZEROES);
            encode_export(&offer.export(*structured), no_zeroes, to);
            return Step::Ended(Agreed::Export { structured: *structured });
        }
        Ok(ClientOption::Info(wanted)) => offer.describe(&wanted, *structured, reply),
        Ok(ClientOption::Go(wanted)) => {
            let is_known = offer.has(&wanted.name);
            offer.describe(&wanted, *structured, reply);
            if is_known {
                return Step::Ended(Agreed::Export { structured: *structured });
            }
        }
        Ok(_) => reply(refusal(OptionError::Unsupported, String::new())),
        // The client would take any reply for an export.
        Err((error, message)) if header.code == OptionHeader::EXPORT_NAME => {
            return Step::Refused(SessionError::Option { error, message });
        }
        Err((error, message)) => reply(refusal(error, message)),
    }
    Step::On
}

impl Offer<'_> {
    fn has(&self, name: &ExportName) -> bool {
        name.as_str().is_empty() || name == self.name
    }

    fn export(&self, structured: bool) -> Export {
        let mut flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO
            | TransmissionFlags::CAN_MULTI_CONN;
        flags.set(TransmissionFlags::READ_ONLY, self.options.read_only);
        flags.set(TransmissionFlags::ROTATIONAL, self.options.backing.rotational);
        flags.set(TransmissionFlags::SEND_DF, structured);
        Export { size: self.size, flags }
    }

    /// Answers `INFO` and `GO`.
    fn describe(&self, wanted: &InfoRequest, structured: bool, mut reply: impl FnMut(OptionReply)) {
        if !self.has(&wanted.name) {
            let message = format!("the only export is '{}'", self.name);
            return reply(OptionReply::Error { error: OptionError::UnknownExport, message });
        }
        reply(OptionReply::Info(Info::Export(self.export(structured))));
        let wants = |kind: InfoKind| wanted.wanted.contains(&(kind as u16));
        if wants(InfoKind::Name) {
            reply(OptionReply::Info(Info::Name(self.name.clone())));
        }
        if wants(InfoKind::BlockSize) {
            reply(OptionReply::Info(Info::BlockSize(BlockSizes {
                minimum: self.options.sector_size,
                preferred: PREFERRED_BYTES.max(self.options.sector_size),
                maximum: MAX_PAYLOAD_BYTES,
            })));
        }
        reply(OptionReply::Ack);
    }
}
