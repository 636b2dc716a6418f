//! TLS, with certificates made for each test.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_compute_proto::v1::*;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use crate::support::{Client, TestServer, command, random};

/// An authority and the folder in which its certificates lie.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

/// A certificate and its key, as text and as files.
pub struct Issued {
    certificate: String,
    key: String,
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, folder }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A certificate for localhost; one that was good until 2001 where it is `expired`.
    pub fn issue(&self, name: &str, expired: bool) -> Issued {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        if expired {
            (params.not_before, params.not_after) = (date_time_ymd(2000, 1, 1), date_time_ymd(2001, 1, 1));
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        let file = |suffix: &str, text: &str| {
            let path = self.folder.path().join(format!("{name}.{suffix}"));
            std::fs::write(&path, text).unwrap();
            path
        };
        let key = key.serialize_pem();
        Issued {
            certificate_file: file("crt", &certificate),
            key_file: file("key", &key),
            certificate,
            key,
        }
    }

    fn start(&self, own: &Issued, clients: Option<&Path>) -> TestServer {
        let mut arguments = vec!["--tls-cert", own.certificate_file.to_str().unwrap()];
        arguments.extend(["--tls-key", own.key_file.to_str().unwrap()]);
        arguments.extend(
            clients
                .iter()
                .flat_map(|path| ["--tls-client-ca", path.to_str().unwrap()]),
        );
        TestServer::start(&arguments)
    }

    /// A channel that trusts this authority, with a certificate of its own if it has one.
    pub async fn channel(&self, server: &TestServer, own: Option<&Issued>) -> Result<Channel, String> {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.issuer.pem()))
            .domain_name("localhost");
        if let Some(own) = own {
            tls = tls.identity(Identity::from_pem(&own.certificate, &own.key));
        }
        let endpoint = Channel::from_shared(server.endpoint.replace("http:", "https:")).unwrap();
        let channel = endpoint.tls_config(tls).unwrap().connect().await;
        channel.map_err(|error| format!("{error:?}"))
    }

    /// A connection over a [`channel`](Self::channel) that is of use.
    async fn connect(&self, server: &TestServer, own: Option<&Issued>) -> Result<Client, String> {
        let client = Client::over(self.channel(server, own).await?, None);
        // A server's refusal of a certificate arrives after the client's half of the handshake of TLS 1.3.
        let request = ListModelsRequest::default();
        let listed = client.models.clone().list_models(request).await;
        listed.map(|_| client).map_err(|status| format!("{status:?}"))
    }
}

#[tokio::test]
async fn grpc_and_http_are_encrypted() {
    let authority = Authority::new();
    let server = authority.start(&authority.issue("server", false), None);
    let client = authority.connect(&server, None).await.unwrap();
    client.create("m").await;
    client.generate(random("m", "the", 1, 3)).await.unwrap();
    // A transaction ends with its connection over TLS as well.
    let batch = client.batch("m", crate::support::within("t"), &[&[1, 2, 3]]).await;
    batch.unwrap();
    drop(client);
    let other = authority.connect(&server, None).await.unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let request = ListBatchesRequest {
            transaction: crate::support::within("t"),
            models: vec!["m".into()],
            adapter: String::new(),
        };
        // While the transaction is ending it can be neither read nor said to be gone.
        if let Ok(listed) = other.training.clone().list_batches(request).await
            && listed.get_ref().sequences.is_empty()
        {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "the transaction is still there");
    }

    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(authority.issuer.pem().as_bytes()).unwrap();
    roots.add(ca).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(&server.http).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .unwrap();
    let request = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
}

#[tokio::test]
async fn clients_must_show_a_certificate_where_they_are_asked_for_one() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let server = authority.start(&authority.issue("server", false), Some(&authority.path()));
    let good = authority.issue("client", false);
    let client = authority.connect(&server, Some(&good)).await.unwrap();
    client.create("m").await;
    let expected = client.generate(random("m", "the", 1, 10)).await.unwrap().1.completion;
    let refused = [
        None,
        Some(authority.issue("expired", true)),
        Some(foreign.issue("foreign", false)),
    ];
    for own in refused {
        // Whether the client still reads the reason before it finds the connection closed is a matter of chance.
        assert!(authority.connect(&server, own.as_ref()).await.is_err());
        let answer = client.generate(random("m", "the", 1, 10)).await.unwrap().1.completion;
        assert_eq!(answer, expected);
    }
    // Without TLS nothing is answered.
    if let Ok(channel) = Channel::from_shared(server.endpoint.clone()).unwrap().connect().await {
        let plain = Client::over(channel, None);
        assert!(
            plain
                .models
                .clone()
                .list_models(ListModelsRequest::default())
                .await
                .is_err()
        );
    }
    authority.connect(&server, Some(&good)).await.unwrap();
}

#[tokio::test]
async fn an_expired_certificate_of_the_server_is_refused_by_the_client() {
    let authority = Authority::new();
    let server = authority.start(&authority.issue("server", true), None);
    let refused = authority.connect(&server, None).await.err().unwrap();
    assert!(refused.contains("Expired"), "{refused}");
}

#[test]
fn files_that_cannot_serve_are_named_at_the_start() {
    let authority = Authority::new();
    let own = authority.issue("server", false);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (certificate, key) = (text(&own.certificate_file), text(&own.key_file));
    let missing = text(&authority.folder.path().join("missing"));
    let empty = authority.folder.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let cases = [
        (vec!["--tls-cert", &missing, "--tls-key", &key], "--tls-cert"),
        (vec!["--tls-cert", &certificate, "--tls-key", &missing], "--tls-key"),
        (vec!["--tls-cert", &key, "--tls-key", &key], "--tls-cert"),
        (vec!["--tls-client-ca", &certificate], "--tls-client-ca"),
    ];
    for (arguments, named) in cases {
        let folder = tempfile::tempdir().unwrap();
        let output = command(folder.path()).args(&arguments).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && message.contains(named), "{message}");
        assert!(!message.contains("PRIVATE"), "{message}");
    }
    let empty = text(&empty);
    let arguments = ["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &empty];
    let folder = tempfile::tempdir().unwrap();
    let output = command(folder.path()).args(arguments).output().unwrap();
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("holds no certificate")
    );
}
