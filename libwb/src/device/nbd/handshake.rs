//! Negotiation with a server, until requests may be sent.

use super::connector::{BoxStream, Connector};
use crate::format::{SECTOR_BYTES, to_u64};
use crate::nbd::{
    BlockSizes, ClientFlags, ClientOption, Decoded, Export, ExportName, Greeting, HandshakeFlags,
    Info, InfoKind, InfoRequest, OptionError, OptionReply, TransmissionFlags, WireError,
    decode_export, encode_client_flags,
};
use futures_util::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use serde::{Deserialize, Serialize};
use std::io;

/// How many answers to one option are heard.
const MOST_REPLIES: usize = 64;
/// The largest unit of I/O that a device may have, in bytes.
const MOST_MINIMUM: u32 = 4096;
/// The largest request that is sent, in bytes. Larger ones are split.
const MOST_LENGTH: u32 = 8 << 20;

/// What both sides have agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Agreed {
    /// Size in bytes.
    pub(super) size: u64,
    #[serde(with = "bits")]
    pub(super) flags: TransmissionFlags,
    /// The unit of I/O in bytes.
    pub(super) block_size: u32,
    /// The largest request in bytes.
    pub(super) most: u32,
    /// Whether replies are structured.
    pub(super) structured: bool,
}

/// Flags as their number.
mod bits {
    use super::TransmissionFlags;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        flags: &TransmissionFlags,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        flags.bits().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<TransmissionFlags, D::Error> {
        u16::deserialize(from).map(TransmissionFlags::from_bits_retain)
    }
}

impl Agreed {
    /// Whether a device can work with it. What comes from another process may be anything.
    pub(super) fn makes_sense(&self) -> bool {
        [512, 1024, 2048, MOST_MINIMUM].contains(&self.block_size)
            && (self.block_size..=MOST_LENGTH).contains(&self.most)
            && self.most.is_multiple_of(self.block_size)
    }
}

/// Why there is no connection to an export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The connection cannot be made, or has ended.
    #[error("{}", io_text(.0))]
    Io(#[from] io::Error),
    /// The server does not answer in time.
    #[error("the server has not answered in time")]
    Timeout,
    /// The server does not speak the protocol.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// The server is too old.
    #[error("the server does not speak the fixed newstyle protocol")]
    NotFixed,
    /// The server answers an option that the client has not sent.
    #[error("the server answers option {0}, which the client has not sent")]
    Unasked(u32),
    /// The server answers without end.
    #[error("the server gives more than {MOST_REPLIES} answers to one option")]
    Endless,
    /// The server gives an answer that makes no sense.
    #[error("the server's answer makes no sense: {0}")]
    Nonsense(&'static str),
    /// The server wants TLS.
    #[error("the server demands TLS: use nbds:// or nbds+unix://")]
    TlsRequired,
    /// The server has no TLS.
    #[error("the server does not offer TLS{0}")]
    NoTls(String),
    /// There is no such export.
    #[error("the server has no export '{name}'{message}")]
    UnknownExport {
        /// Its name.
        name: ExportName,
        /// What the server says about that.
        message: String,
    },
    /// The server refuses.
    #[error("the server refuses: {0}")]
    Refused(String),
    /// Its size is not whole sectors.
    #[error("the export has {0} bytes, not a multiple of 512")]
    Unaligned(u64),
    /// Its unit of I/O is not supported.
    #[error("the server takes only requests of whole {0} bytes; wb supports up to {MOST_MINIMUM}")]
    BlockSize(u32),
    /// The export cannot be made durable.
    #[error("the server offers no flushes, so what is written to it is never known to be safe")]
    NoFlush,
    /// The export is read-only.
    #[error("the export is read-only")]
    ReadOnly,
    /// After a reconnect, the export is not what it was.
    #[error("the export has changed: {0}")]
    Changed(String),
}

impl LinkError {
    /// Whether it may pass by itself: the server, or the network, may not be there yet.
    pub fn may_pass(&self) -> bool {
        match self {
            LinkError::Io(error) => !matches!(
                error.kind(),
                // What TLS says of certificates and the like.
                io::ErrorKind::InvalidData
                    | io::ErrorKind::InvalidInput
                    | io::ErrorKind::PermissionDenied
            ),
            LinkError::Timeout | LinkError::UnknownExport { .. } => true,
            _ => false,
        }
    }
}

/// An error of the system without the number that Rust adds.
fn io_text(error: &io::Error) -> String {
    let text = |number| nix::errno::Errno::from_raw(number).desc().to_string();
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server has closed the connection".into(),
        _ => error.raw_os_error().map_or_else(|| error.to_string(), text),
    }
}

/// What a server says, to be appended to a message.
fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

/// Reads a message that `decode` understands, and not a byte more.
///
/// # Errors
/// When the connection ends, or the message makes no sense.
pub(in crate::device) async fn read_message<T>(
    stream: &mut (impl AsyncRead + Unpin),
    decode: impl Fn(&[u8]) -> Result<Decoded<T>, WireError>,
) -> Result<T, LinkError> {
    let mut bytes = Vec::new();
    loop {
        match decode(&bytes)? {
            Decoded::Value(value, _) => return Ok(value),
            Decoded::More(more) => {
                let have = bytes.len();
                bytes.resize(have + more, 0);
                stream.read_exact(&mut bytes[have..]).await?;
            }
        }
    }
}

/// Sends and receives during negotiation.
struct Handshake<'a> {
    stream: BoxStream,
    connector: &'a dyn Connector,
    name: &'a ExportName,
}

/// Negotiates on a new connection.
///
/// # Errors
/// Says why requests cannot be sent.
pub(super) async fn negotiate(
    stream: BoxStream,
    connector: &dyn Connector,
    name: &ExportName,
) -> Result<(BoxStream, Agreed), LinkError> {
    let mut handshake = Handshake { stream, connector, name };
    let no_zeroes = handshake.greet().await?;
    if connector.needs_tls() {
        handshake = handshake.encrypt().await?;
    }
    let structured = handshake.ask_for_structured_replies().await?;
    let (export, sizes) = match handshake.go().await? {
        Some(found) => found,
        None => (handshake.choose_the_old_way(no_zeroes).await?, None),
    };
    Ok((handshake.stream, agreed(export, sizes, structured)?))
}

fn agreed(
    export: Export,
    sizes: Option<BlockSizes>,
    structured: bool,
) -> Result<Agreed, LinkError> {
    let sector = to_u64(SECTOR_BYTES);
    if !export.size.is_multiple_of(sector) {
        return Err(LinkError::Unaligned(export.size));
    }
    if i64::try_from(export.size).is_err() {
        return Err(LinkError::Nonsense("the export has 2^63 bytes or more"));
    }
    let BlockSizes { minimum, maximum, .. } =
        sizes.unwrap_or(BlockSizes { minimum: 1, preferred: 4096, maximum: MOST_LENGTH });
    if !minimum.is_power_of_two() {
        return Err(LinkError::Nonsense("the smallest size of a request is no power of two"));
    }
    if minimum > MOST_MINIMUM {
        return Err(LinkError::BlockSize(minimum));
    }
    let block_size = minimum.max(u32::try_from(SECTOR_BYTES).unwrap_or(MOST_MINIMUM));
    let most = maximum.min(MOST_LENGTH) / block_size * block_size;
    if most == 0 {
        return Err(LinkError::Nonsense("the largest size of a request is below a sector"));
    }
    Ok(Agreed { size: export.size, flags: export.flags, block_size, most, structured })
}

impl Handshake<'_> {
    async fn send(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.stream.write_all(bytes).await?;
        Ok(self.stream.flush().await?)
    }

    async fn ask(&mut self, option: &ClientOption) -> Result<(), LinkError> {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        self.send(&bytes).await
    }

    async fn answer(&mut self, to: &ClientOption) -> Result<OptionReply, LinkError> {
        let (option, reply) = read_message(&mut self.stream, OptionReply::decode).await?;
        match option == to.code() {
            true => Ok(reply),
            false => Err(LinkError::Unasked(option)),
        }
    }

    /// Exchanges greetings. Returns whether both sides can do without padding.
    async fn greet(&mut self) -> Result<bool, LinkError> {
        let greeting = read_message(&mut self.stream, Greeting::decode).await?;
        if !greeting.flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(LinkError::NotFixed);
        }
        let no_zeroes = greeting.flags.contains(HandshakeFlags::NO_ZEROES);
        let mut flags = ClientFlags::FIXED_NEWSTYLE;
        flags.set(ClientFlags::NO_ZEROES, no_zeroes);
        let mut bytes = Vec::new();
        encode_client_flags(flags, &mut bytes);
        self.send(&bytes).await?;
        Ok(no_zeroes)
    }

    async fn encrypt(mut self) -> Result<Self, LinkError> {
        self.ask(&ClientOption::StartTls).await?;
        match self.answer(&ClientOption::StartTls).await? {
            OptionReply::Ack => {}
            OptionReply::Error { message, .. } => return Err(LinkError::NoTls(said(&message))),
            _ => return Err(LinkError::Nonsense("it neither accepts nor refuses TLS")),
        }
        let stream = self.connector.encrypt(self.stream).await?;
        Ok(Handshake { stream, ..self })
    }

    async fn ask_for_structured_replies(&mut self) -> Result<bool, LinkError> {
        let option = ClientOption::StructuredReply;
        self.ask(&option).await?;
        match self.answer(&option).await? {
            OptionReply::Ack => Ok(true),
            OptionReply::Error { error: OptionError::TlsRequired, .. } => {
                Err(LinkError::TlsRequired)
            }
            OptionReply::Error { .. } => Ok(false),
            _ => Err(LinkError::Nonsense("it neither accepts nor refuses structured replies")),
        }
    }

    /// Chooses the export. `None` if the server does not know how.
    async fn go(&mut self) -> Result<Option<(Export, Option<BlockSizes>)>, LinkError> {
        let wanted = vec![InfoKind::BlockSize as u16];
        let option = ClientOption::Go(InfoRequest { name: self.name.clone(), wanted });
        self.ask(&option).await?;
        let (mut export, mut sizes) = (None, None);
        for _ in 0..MOST_REPLIES {
            match self.answer(&option).await? {
                OptionReply::Info(Info::Export(found)) => export = Some(found),
                OptionReply::Info(Info::BlockSize(found)) => sizes = Some(found),
                OptionReply::Ack => {
                    let missing = LinkError::Nonsense("it does not say how large the export is");
                    return Ok(Some((export.ok_or(missing)?, sizes)));
                }
                OptionReply::Error { error, message } => return self.refused(error, &message),
                _ => {}
            }
        }
        Err(LinkError::Endless)
    }

    fn refused<T>(&self, error: OptionError, message: &str) -> Result<Option<T>, LinkError> {
        match error {
            OptionError::Unsupported => Ok(None),
            OptionError::TlsRequired => Err(LinkError::TlsRequired),
            OptionError::UnknownExport => {
                let (name, message) = (self.name.clone(), said(message));
                Err(LinkError::UnknownExport { name, message })
            }
            OptionError::Shutdown => Err(LinkError::Refused("it is about to end".into())),
            error if message.is_empty() => Err(LinkError::Refused(format!("{error:?}"))),
            _ => Err(LinkError::Refused(message.into())),
        }
    }

    /// Chooses the export without hearing of errors. A server that refuses closes the connection.
    async fn choose_the_old_way(&mut self, no_zeroes: bool) -> Result<Export, LinkError> {
        self.ask(&ClientOption::ExportName(self.name.clone())).await?;
        read_message(&mut self.stream, |bytes| Ok(decode_export(bytes, no_zeroes))).await
    }
}
