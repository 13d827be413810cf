//! Connections to a server at an address, over sockets and TLS.

use super::connector::{BoxStream, Connector};
use crate::nbd::{Address, Tls, Uri};
use crate::reactor::{self, Handle, Socket, resolve};
use crate::runtime::Runtime;
use futures_lite::future::or;
use futures_rustls::TlsConnector;
use futures_rustls::rustls::client::WebPkiServerVerifier;
use futures_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use futures_rustls::rustls::crypto::CryptoProvider;
use futures_rustls::rustls::crypto::ring::default_provider;
use futures_rustls::rustls::pki_types::pem::{self, PemObject};
use futures_rustls::rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, InvalidDnsNameError, PrivateKeyDer, ServerName,
    UnixTime,
};
use futures_rustls::rustls::server::VerifierBuilderError;
use futures_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use futures_util::future::BoxFuture;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Where certificates and keys are if the user names no folder.
const CERTIFICATES: &str = "/etc/pki/libnbd";
/// The name in the certificate of a server on this machine.
const THIS_MACHINE: &str = "localhost";
/// How long an address may take to answer if the host has others.
const TO_ANSWER: Duration = Duration::from_secs(4);

/// Why TLS cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file with certificates or a key cannot be read.
    #[error("{path}: {cause}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: pem::Error,
    },
    /// A file has no certificate.
    #[error("{0}: there is no certificate in it")]
    NoCertificate(PathBuf),
    /// What the files hold is of no use.
    #[error("{folder}: {cause}")]
    Certificates {
        /// The folder that they are in.
        folder: PathBuf,
        /// What is wrong.
        cause: rustls::Error,
    },
    /// Nothing can verify the server.
    #[error("{path}: {cause}")]
    Verifier {
        /// The file with the certificates of authorities.
        path: PathBuf,
        /// What is wrong.
        cause: VerifierBuilderError,
    },
    /// No certificate can have this name.
    #[error("'{0}' is no name that a certificate can have: set tls-hostname")]
    Name(String, #[source] InvalidDnsNameError),
}

/// Connects to the server of a URI.
pub struct Dial {
    handle: Handle,
    address: Address,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl Dial {
    /// Reads the certificates that the URI asks for.
    ///
    /// # Errors
    /// Names the file, and says what is wrong with it.
    pub fn new(handle: &Handle, uri: &Uri) -> Result<Dial, TlsError> {
        let encrypted = |tls: &Tls| Ok((configure(tls)?.into(), server_name(tls, &uri.address)?));
        let tls = uri.tls.as_ref().map(encrypted).transpose()?;
        Ok(Dial { handle: handle.clone(), address: uri.address.clone(), tls })
    }
}

fn server_name(tls: &Tls, address: &Address) -> Result<ServerName<'static>, TlsError> {
    let name = match (&tls.hostname, address) {
        (Some(name), _) => name.clone(),
        (None, Address::Tcp { host, .. }) => host.clone(),
        (None, Address::Unix(_)) => THIS_MACHINE.into(),
    };
    ServerName::try_from(name.clone()).map_err(|cause| TlsError::Name(name, cause))
}

/// The files of libnbd and QEMU: `ca-cert.pem`; `ca-crl.pem`, if it exists; and, for servers that
/// want to know their clients, `client-cert.pem` and `client-key.pem`.
fn configure(tls: &Tls) -> Result<Arc<ClientConfig>, TlsError> {
    let folder = tls.certificates.as_deref().unwrap_or(Path::new(CERTIFICATES));
    let wrong = |cause| TlsError::Certificates { folder: folder.into(), cause };
    let provider = Arc::new(default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = match tls.verify_peer {
        true => verifier(&folder.join("ca-cert.pem"), &provider)?,
        false => Arc::new(Unverified(provider.clone())),
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(wrong)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let (certificate, key) = (folder.join("client-cert.pem"), folder.join("client-key.pem"));
    let config = if certificate.exists() || key.exists() {
        let certificates = certificates(&certificate)?;
        let key = PrivateKeyDer::from_pem_file(&key)
            .map_err(|cause| TlsError::File { path: key.clone(), cause })?;
        builder.with_client_auth_cert(certificates, key).map_err(wrong)?
    } else {
        builder.with_no_client_auth()
    };
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |cause| TlsError::File { path: path.into(), cause };
    let found = CertificateDer::pem_file_iter(path).map_err(wrong)?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(wrong)?;
    if found.is_empty() { Err(TlsError::NoCertificate(path.into())) } else { Ok(found) }
}

fn revocations(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let wrong = |cause| TlsError::File { path: path.into(), cause };
    let found = CertificateRevocationListDer::pem_file_iter(path).map_err(wrong)?;
    found.collect::<Result<_, _>>().map_err(wrong)
}

fn verifier(
    path: &Path,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        let wrong = |cause| TlsError::Certificates { folder: path.into(), cause };
        roots.add(certificate).map_err(wrong)?;
    }
    let crls = path.with_file_name("ca-crl.pem");
    let revoked = if crls.exists() { revocations(&crls)? } else { Vec::new() };
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .with_crls(revoked)
        .build()
        .map_err(|cause| TlsError::Verifier { path: path.into(), cause })
}

/// Takes any certificate, for the user has said so.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects to the first address that takes the connection.
async fn connect(handle: Handle, address: Address) -> io::Result<BoxStream> {
    let addresses = match address {
        Address::Unix(path) => vec![reactor::Address::Unix(path)],
        Address::Tcp { host, port } => {
            resolve(&host, port).await?.into_iter().map(reactor::Address::Tcp).collect()
        }
    };
    let mut failed = io::Error::other("the host has no address");
    let last = addresses.len().saturating_sub(1);
    for (nth, address) in addresses.into_iter().enumerate() {
        let too_slow = async {
            // One that does not answer must not hide the next one.
            match nth == last {
                true => std::future::pending().await,
                false => handle.sleep(TO_ANSWER).await,
            }
            Err(io::ErrorKind::TimedOut.into())
        };
        match or(Socket::connect(&handle, &address), too_slow).await {
            Ok(socket) => return Ok(Box::new(socket)),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

impl Connector for Dial {
    fn connect(&self) -> BoxFuture<'static, io::Result<BoxStream>> {
        Box::pin(connect(self.handle.clone(), self.address.clone()))
    }

    fn needs_tls(&self) -> bool {
        self.tls.is_some()
    }

    fn encrypt(&self, stream: BoxStream) -> BoxFuture<'static, io::Result<BoxStream>> {
        let Some((connector, name)) = self.tls.clone() else {
            return Box::pin(std::future::ready(Err(io::ErrorKind::Unsupported.into())));
        };
        Box::pin(async move {
            let encrypted: BoxStream = Box::new(connector.connect(name, stream).await?);
            Ok(encrypted)
        })
    }
}
