//! TLS for servers: certificates as libnbd and QEMU keep them.

use crate::serve::{ServeError, failed};
use futures_lite::io::{AsyncRead, AsyncWrite};
use futures_rustls::TlsAcceptor;
use futures_rustls::rustls::crypto::ring;
use futures_rustls::rustls::pki_types::pem::PemObject;
use futures_rustls::rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
};
use futures_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use futures_rustls::rustls::{RootCertStore, ServerConfig};
use futures_rustls::server::TlsStream;
use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Who signs the certificates of clients.
const AUTHORITY: &str = "ca-cert.pem";
/// Which of these certificates are revoked. The file may be missing.
const REVOKED: &str = "ca-crl.pem";
const CERTIFICATE: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";

/// The certificate and key of a server, and who its clients must be.
#[derive(Clone)]
pub struct ServerTls(TlsAcceptor);

fn unusable<E: Into<Box<dyn Error + Send + Sync>>>(path: &Path) -> impl FnOnce(E) -> ServeError {
    let what = format!("cannot use {}", path.display());
    move |cause| failed(what)(io::Error::other(cause))
}

impl ServerTls {
    /// Reads `ca-cert.pem`, `server-cert.pem`, `server-key.pem` and, if it exists, `ca-crl.pem` in
    /// a folder. Clients must show a certificate that `ca-cert.pem` has signed.
    ///
    /// # Errors
    /// Names the file that cannot be used.
    pub fn load(folder: &Path) -> Result<ServerTls, ServeError> {
        let [authority, revoked, certificate, key] =
            [AUTHORITY, REVOKED, CERTIFICATE, KEY].map(|name| folder.join(name));
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for root in certificates(&authority)? {
            roots.add(root).map_err(unusable(&authority))?;
        }
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .with_crls(revocations(&revoked)?)
                .build()
                .map_err(|error| match error {
                    VerifierBuilderError::InvalidCrl(_) => unusable(&revoked)(error),
                    _ => unusable(&authority)(error),
                })?;
        let chain = certificates(&certificate)?;
        let private = PrivateKeyDer::from_pem_file(&key).map_err(unusable(&key))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable(folder))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, private)
            .map_err(unusable(&certificate))?;
        Ok(ServerTls(Arc::new(config).into()))
    }

    /// Does the server's part of the TLS handshake.
    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> io::Result<TlsStream<S>> {
        self.0.accept(stream).await
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ServeError> {
    let found = CertificateDer::pem_file_iter(path).map_err(unusable(path))?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(unusable(path))?;
    if found.is_empty() { Err(unusable(path)("it holds no certificate")) } else { Ok(found) }
}

fn revocations(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, ServeError> {
    if !path.try_exists().map_err(unusable(path))? {
        return Ok(Vec::new());
    }
    let found = CertificateRevocationListDer::pem_file_iter(path).map_err(unusable(path))?;
    found.collect::<Result<_, _>>().map_err(unusable(path))
}
