//! One client: negotiation, then transmission.

use super::error::{SessionError, TO_NEGOTIATE};
use super::negotiation::{Agreed, Offer, greet, negotiate};
use super::stop::Stop;
use super::tls::ServerTls;
use super::transmission::Transmission;
use crate::nbd::{ExportName, NameError};
use crate::runtime::Runtime;
use crate::serve::{Options, Volume};
use futures_lite::future::or;
use futures_lite::io::{AsyncRead, AsyncWrite};
use std::pin::pin;
use std::sync::Arc;

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
        stream: S,
        stop: &Stop,
    ) -> Result<(), SessionError> {
        self.run_with(stream, stop, || ()).await
    }

    /// As [`Session::run`]. Calls `chosen` once the client has chosen its export.
    pub(super) async fn run_with<S: AsyncRead + AsyncWrite + Unpin + Send>(
        &self,
        mut stream: S,
        stop: &Stop,
        chosen: impl FnOnce(),
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
            return self.serve(stream, agreed, stop, chosen).await;
        };
        let secure = async {
            let mut stream = tls.accept(stream).await.map_err(SessionError::Tls)?;
            let agreed = negotiate(&mut stream, client, &self.offer(true)).await?;
            Ok((stream, agreed))
        };
        let (stream, agreed) = within(limit.as_mut(), secure).await?;
        self.serve(stream, agreed, stop, chosen).await
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
        chosen: impl FnOnce(),
    ) -> Result<(), SessionError> {
        let Agreed::Export { structured } = agreed else { return Ok(()) };
        chosen();
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
