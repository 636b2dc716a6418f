//! TLS by rustls, for gRPC and HTTP.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::config::Tls;
use crate::error::{Error, Result};

/// An acceptor with the server's certificate, for these application protocols. Where authorities for clients are
/// configured, clients must show a valid certificate of one of them.
///
/// # Errors
/// `InvalidArgument` that names the file.
pub(crate) fn acceptor(tls: &Tls, protocols: &[&str]) -> Result<TlsAcceptor> {
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| unusable("--tls-key", &tls.key, &error))?;
    let chain = certificates("--tls-cert", &tls.certificate)?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::Internal(format!("TLS: {error}")))?;
    let builder = match &tls.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let refuse = |error: &dyn std::error::Error| unusable("--tls-client-ca", path, error);
            let mut roots = RootCertStore::empty();
            for authority in certificates("--tls-client-ca", path)? {
                roots.add(authority).map_err(|error| refuse(&error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| refuse(&error))?)
        }
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| unusable("--tls-cert", &tls.certificate, &error))?;
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Checks that a text holds certificates in PEM.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_certificates(pem: &str) -> std::result::Result<(), String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    match roots.is_empty() {
        true => Err("it holds no certificate in PEM".to_owned()),
        false => Ok(()),
    }
}

fn certificates(option: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
    let found = found.map_err(|error| unusable(option, path, &error))?;
    match found.is_empty() {
        true => Err(Error::invalid(format!(
            "{option}: {} holds no certificate in PEM",
            path.display()
        ))),
        false => Ok(found),
    }
}

fn unusable(option: &str, path: &Path, error: &dyn std::error::Error) -> Error {
    Error::invalid(format!("{option}: {} cannot be used: {error}", path.display()))
}
