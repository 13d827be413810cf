//! One client: negotiation, then transmission.

use super::negotiation::{Agreed, Offer, greet, negotiate};
use super::tls::ServerTls;
use super::transmission::Transmission;
use crate::nbd::{ExportName, NameError, OptionError, WireError};
use crate::runtime::Runtime;
use crate::serve::{Options, Volume};
use event_listener::Event;
use futures_lite::future::or;
use futures_lite::io::{AsyncRead, AsyncWrite};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long a client may take until it says which export it wants.
const TO_NEGOTIATE: Duration = Duration::from_secs(30);

/// Why a client is no longer served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// It sent something that is not NBD.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// It set unknown flags.
    #[error("the client wants unknown flags: {0:#x}")]
    ClientFlags(u32),
    /// It asked for an export that there is not.
    #[error("the client wants the unknown export '{0}'")]
    UnknownExport(ExportName),
    /// It sent an option that makes no sense, and cannot be told so.
    #[error("an option of the client is not in order ({error:?}): {message}")]
    Option {
        /// What it would have been told.
        error: OptionError,
        /// Text for people.
        message: String,
    },
    /// It does not start TLS.
    #[error("the client does not start TLS")]
    NoTls,
    /// TLS cannot be started.
    #[error("cannot start TLS: {0}")]
    Tls(io::Error),
    /// It never chooses an export.
    #[error("the client has sent {0} options and chosen no export")]
    TooManyOptions(usize),
    /// It never chooses an export.
    #[error("the client has chosen no export within {} seconds", TO_NEGOTIATE.as_secs())]
    TooSlow,
    /// The server ends, and the client has not chosen an export yet.
    #[error("the server ends")]
    Stopped,
    /// It does not take its last replies.
    #[error("the client does not take its last replies")]
    NotTaken,
}

/// Tells sessions to end. Cloning it gives another handle of the same.
#[derive(Clone, Default)]
pub struct Stop(Arc<(AtomicBool, Event)>);

impl Stop {
    /// Tells all sessions to take no more requests, to answer those that were taken, and to end.
    pub fn stop(&self) {
        self.0.0.store(true, Ordering::SeqCst);
        self.0.1.notify(usize::MAX);
    }

    /// Completes once [`Stop::stop`] was called.
    pub async fn stopped(&self) {
        while !self.0.0.load(Ordering::SeqCst) {
            let news = self.0.1.listen();
            if !self.0.0.load(Ordering::SeqCst) {
                news.await;
            }
        }
    }
}

/// A volume as clients see it. Cloning it is cheap.
#[derive(Clone)]
pub struct Session<V> {
    volume: V,
    name: ExportName,
    options: Options,
    tls: Option<ServerTls>,
    runtime: Arc<dyn Runtime>,
}

impl<V: Volume> Session<V> {
    /// The volume is the export `name`, and the default one. With `tls`, clients must use it.
    ///
    /// # Errors
    /// When no export can have this name.
    pub fn new(
        volume: V,
        name: &str,
        options: Options,
        tls: Option<ServerTls>,
        runtime: Arc<dyn Runtime>,
    ) -> Result<Session<V>, NameError> {
        Ok(Session { volume, name: ExportName::new(name)?, options, tls, runtime })
    }

    /// Serves a client until it goes or `stop` says so. All requests that were taken have ended
    /// when this returns.
    ///
    /// # Errors
    /// Says why the client is no longer served, if it did not go by itself.
    pub async fn run<S: AsyncRead + AsyncWrite + Unpin + Send>(
        &self,
        mut stream: S,
        stop: &Stop,
    ) -> Result<(), SessionError> {
        let mut limit = pin!(or(
            async {
                self.runtime.sleep(TO_NEGOTIATE).await;
                SessionError::TooSlow
            },
            async {
                stop.stopped().await;
                SessionError::Stopped
            },
        ));
        let plain = async {
            let client = greet(&mut stream).await?;
            let agreed = negotiate(&mut stream, client, &self.offer(false)).await?;
            Ok((client, agreed))
        };
        let (client, agreed) = within(limit.as_mut(), plain).await?;
        let (Agreed::Tls, Some(tls)) = (agreed, &self.tls) else {
            return self.serve(stream, agreed, stop).await;
        };
        let secure = async {
            let mut stream = tls.accept(stream).await.map_err(SessionError::Tls)?;
            let agreed = negotiate(&mut stream, client, &self.offer(true)).await?;
            Ok((stream, agreed))
        };
        let (stream, agreed) = within(limit.as_mut(), secure).await?;
        self.serve(stream, agreed, stop).await
    }

    fn offer(&self, is_tls: bool) -> Offer<'_> {
        let size = usable(&self.volume, &self.options);
        let has_tls = self.tls.is_some();
        Offer { name: &self.name, size, options: self.options, has_tls, is_tls }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send>(
        &self,
        stream: S,
        agreed: Agreed,
        stop: &Stop,
    ) -> Result<(), SessionError> {
        let Agreed::Export { structured } = agreed else { return Ok(()) };
        let size = usable(&self.volume, &self.options);
        let transmission =
            Transmission::new(self.volume.clone(), size, self.options, structured, stream);
        transmission.run(&*self.runtime, stop).await
    }
}

/// The size of a volume in bytes, in whole sectors of the size that clients are told.
fn usable(volume: &impl Volume, options: &Options) -> u64 {
    volume.size() - volume.size() % u64::from(options.sector_size)
}

/// Does some work unless a limit ends first.
async fn within<T>(
    limit: impl Future<Output = SessionError>,
    work: impl Future<Output = Result<T, SessionError>>,
) -> Result<T, SessionError> {
    or(work, async { Err(limit.await) }).await
}
