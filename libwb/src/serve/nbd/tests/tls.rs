use super::client::{Client, go, request};
use super::{NAME, Server, TestRuntime, TestTime};
use crate::nbd::{ClientFlags, ClientOption, Command, OptionError, OptionReply};
use crate::serve::nbd::tests::link::link;
use crate::serve::nbd::{ServerTls, Session, SessionError};
use futures_lite::future::{block_on, yield_now, zip};
use futures_rustls::TlsConnector;
use futures_rustls::rustls::crypto::ring;
use futures_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use futures_rustls::rustls::{ClientConfig, RootCertStore};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use std::path::Path;
use std::sync::Arc;

/// Who signs certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        Authority(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::new([name.to_string()]).unwrap();
        params.serial_number = Some(SerialNumber::from(name.len() as u64));
        params
    }

    fn sign(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let params = Authority::params(name);
        (params.signed_by(&key, &self.0).unwrap(), key)
    }

    /// The folder of a server whose clients this authority signs for.
    fn write_to(&self, folder: &Path) {
        let (certificate, key) = self.sign("server");
        let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
        write("ca-cert.pem", self.0.pem());
        write("server-cert.pem", certificate.pem());
        write("server-key.pem", key.serialize_pem());
    }

    /// Revokes a certificate, in the folder of a server.
    fn revoke(&self, certificate: &CertificateParams, folder: &Path) {
        let date = |year| rcgen::date_time_ymd(year, 1, 1);
        let revoked = RevokedCertParams {
            serial_number: certificate.serial_number.clone().unwrap(),
            revocation_time: date(2020),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date(2020),
            next_update: date(2999),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.0).unwrap().pem().unwrap();
        std::fs::write(folder.join("ca-crl.pem"), list).unwrap();
    }

    fn connector(&self, client: Option<&Authority>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match client.map(|authority| authority.sign("client")) {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
                config.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
            }
        };
        TlsConnector::from(Arc::new(config))
    }
}

/// Serves one client over TLS.
fn serve<T>(
    authority: &Authority,
    client: impl AsyncFnOnce(Client) -> T,
) -> (Result<(), SessionError>, T) {
    let folder = tempfile::tempdir().unwrap();
    authority.write_to(folder.path());
    serve_from(folder.path(), async |it, _| client(it).await)
}

/// Serves one client over TLS, with the certificates of a folder. The client may let time pass.
fn serve_from<T>(
    folder: &Path,
    client: impl AsyncFnOnce(Client, &TestTime) -> T,
) -> (Result<(), SessionError>, T) {
    let tls = ServerTls::load(folder).unwrap();
    let server = Server::new();
    let runtime = Arc::new(TestRuntime(server.time.clone()));
    let session =
        Session::new(server.volume.clone(), NAME, server.options, Some(tls), runtime).unwrap();
    let (server_end, client_end) = link(64 << 10);
    let client = client(Client::new(client_end), &server.time);
    block_on(zip(session.run(server_end, &server.stop), client))
}

fn server_name() -> ServerName<'static> {
    ServerName::try_from("server").unwrap()
}

#[test]
fn a_client_with_a_certificate_is_served() {
    let authority = Authority::new();
    let (ended, ()) = serve(&authority, async |mut client| {
        client.greet(ClientFlags::FIXED_NEWSTYLE).await;
        for option in [ClientOption::List, ClientOption::StructuredReply, go(NAME, &[])] {
            let replies = client.ask(&option).await;
            assert!(
                matches!(replies[..], [OptionReply::Error { error: OptionError::TlsRequired, .. }]),
                "{replies:?}"
            );
        }
        assert_eq!(client.ask(&ClientOption::StartTls).await, [OptionReply::Ack]);
        let connector = authority.connector(Some(&authority));
        let stream = connector.connect(server_name(), client.into_stream()).await.unwrap();
        let mut client = Client::new(stream);
        let again = client.ask(&ClientOption::StartTls).await;
        assert!(matches!(again[..], [OptionReply::Error { error: OptionError::Invalid, .. }]));
        // What was agreed on before TLS counts no more.
        let replies = client.ask(&go(NAME, &[])).await;
        assert_eq!(replies.last(), Some(&OptionReply::Ack));
        let data = vec![3; 1 << 20];
        let write = request(Command::Write, 1, 0, data.len());
        assert_eq!(client.call(write, &data).await, Ok(()));
        client.send_request(request(Command::Read, 2, 0, data.len()), &[]).await;
        client.reply().await.unwrap();
        assert_eq!(client.take(data.len()).await, data);
        client.send_request(request(Command::Disconnect, 3, 0, 0), &[]).await;
        assert!(client.is_at_end().await);
    });
    ended.unwrap();
}

#[test]
fn a_client_without_a_certificate_of_the_authority_is_not_served() {
    let (authority, other) = (Authority::new(), Authority::new());
    for client_authority in [None, Some(&other)] {
        let (ended, ()) = serve(&authority, async |mut client| {
            client.greet(ClientFlags::FIXED_NEWSTYLE).await;
            client.ask(&ClientOption::StartTls).await;
            let connector = authority.connector(client_authority);
            let connected = connector.connect(server_name(), client.into_stream()).await;
            // The client may learn of it only when it reads.
            if let Ok(stream) = connected {
                assert!(Client::new(stream).option_reply().await.is_none());
            }
        });
        assert!(matches!(ended, Err(SessionError::Tls(_))), "{ended:?}");
    }
}

#[test]
fn what_follows_the_option_in_the_clear_is_not_taken_for_what_came_over_tls() {
    let (ended, ()) = serve(&Authority::new(), async |mut client| {
        client.greet(ClientFlags::FIXED_NEWSTYLE).await;
        let mut bytes = Vec::new();
        ClientOption::StartTls.encode(&mut bytes);
        go(NAME, &[]).encode(&mut bytes);
        client.send(&bytes).await.unwrap();
        let reply = client.option_reply().await;
        assert_eq!(reply, Some((ClientOption::StartTls.code(), OptionReply::Ack)));
    });
    assert!(matches!(ended, Err(SessionError::Tls(_))), "{ended:?}");
}

#[test]
fn the_oldest_way_to_choose_an_export_is_no_way_around_tls() {
    let (ended, ()) = serve(&Authority::new(), async |mut client| {
        client.greet(ClientFlags::FIXED_NEWSTYLE).await;
        let mut bytes = Vec::new();
        ClientOption::ExportName(super::client::name(NAME)).encode(&mut bytes);
        client.send(&bytes).await.unwrap();
        assert!(client.is_at_end().await);
    });
    assert!(matches!(ended, Err(SessionError::NoTls)), "{ended:?}");
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = || ServerTls::load(folder.path()).err().unwrap().to_string();
    Authority::new().write_to(folder.path());
    assert!(ServerTls::load(folder.path()).is_ok());
    for name in ["server-key.pem", "server-cert.pem", "ca-cert.pem"] {
        let path = folder.path().join(name);
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, "nothing").unwrap();
        assert!(error().contains(&format!("cannot use {}", path.display())), "{}", error());
        std::fs::remove_file(&path).unwrap();
        assert!(error().contains(name), "{}", error());
        std::fs::write(&path, text).unwrap();
    }
    std::fs::write(
        folder.path().join("ca-crl.pem"),
        "-----BEGIN X509 CRL-----\nAA==\n-----END X509 CRL-----\n",
    )
    .unwrap();
    assert!(error().contains("cannot use"), "{}", error());
}

#[test]
fn a_client_whose_certificate_is_revoked_is_not_served() {
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    authority.write_to(folder.path());
    let connect = async |mut client: Client, _: &TestTime| {
        client.greet(ClientFlags::FIXED_NEWSTYLE).await;
        client.ask(&ClientOption::StartTls).await;
        let connector = authority.connector(Some(&authority));
        // The client may learn of it only when it reads.
        match connector.connect(server_name(), client.into_stream()).await {
            Ok(stream) => {
                let mut client = Client::new(stream);
                let mut bytes = Vec::new();
                ClientOption::Abort.encode(&mut bytes);
                client.send(&bytes).await.is_ok() && client.option_reply().await.is_some()
            }
            Err(_) => false,
        }
    };
    authority.revoke(&Authority::params("another"), folder.path());
    let (ended, is_served) = serve_from(folder.path(), connect);
    assert!(ended.is_ok() && is_served, "{ended:?}");
    authority.revoke(&Authority::params("client"), folder.path());
    let (ended, is_served) = serve_from(folder.path(), connect);
    assert!(matches!(ended, Err(SessionError::Tls(_))) && !is_served, "{ended:?}");
}

#[test]
fn a_client_that_never_ends_the_handshake_is_not_waited_for_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    Authority::new().write_to(folder.path());
    let (ended, ()) = serve_from(folder.path(), async |mut client, time| {
        client.greet(ClientFlags::FIXED_NEWSTYLE).await;
        assert_eq!(client.ask(&ClientOption::StartTls).await, [OptionReply::Ack]);
        // The head of a long record, which never comes.
        client.send(&[22, 3, 1, 1, 0, 1]).await.unwrap();
        for _ in 0..100 {
            yield_now().await;
        }
        time.pass();
        assert!(client.is_at_end().await);
    });
    assert!(matches!(ended, Err(SessionError::TooSlow)), "{ended:?}");
}
