//! Connections of HTTP clients: accepted, wrapped in TLS where it is on, served, and let go in order at the end.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::connections::ConnectionInfo;
use crate::transactions::Connection;

/// Connections served at once; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 4096;
/// How long a client may take for the head of a request, or leave a connection idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the handshake of TLS may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of the head of a request.
const MAX_HEAD: usize = 64 << 10;
/// Pause after a connection could not be accepted, as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Number of the first connection: gRPC's count from 1.
const FIRST_NUMBER: Connection = 1 << 63;

/// The routes, as one connection reaches them: its requests take turns with those of others.
#[derive(Clone)]
struct Numbered {
    id: Connection,
    router: TowerToHyperService<Router>,
}

impl Service<Request<Incoming>> for Numbered {
    type Response = Response;
    type Error = Infallible;
    type Future = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(ConnectionInfo { id: self.id });
        self.router.call(request)
    }
}

/// Serves the connections of `listener` until `stopped` is true and every response that had begun has been sent.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    mut stopped: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for id in FIRST_NUMBER.. {
        let accepted = tokio::select! {
            () = wait(&mut stopped) => break,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, place)) => {
                let (tls, stopped) = (tls.clone(), stopped.clone());
                let service = Numbered {
                    id,
                    router: TowerToHyperService::new(router.clone()),
                };
                tokio::spawn(async move {
                    handle(stream, tls, service, stopped).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    // All places are free when the last connection has ended.
    let _ = places
        .acquire_many(u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX))
        .await;
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // Events are small and should leave at once.
    let _ = stream.set_nodelay(true);
    Ok((stream, place))
}

async fn handle(stream: TcpStream, tls: Option<TlsAcceptor>, service: Numbered, stopped: watch::Receiver<bool>) {
    let Some(tls) = tls else {
        return converse(stream, service, stopped).await;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => converse(stream, service, stopped).await,
        Ok(Err(error)) => tracing::debug!(%error, "TLS failed"),
        Err(_) => tracing::debug!("TLS took too long"),
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: Numbered,
    mut stopped: watch::Receiver<bool>,
) {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = wait(&mut stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

/// Waits for the end of the server.
async fn wait(stopped: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, which is an end as well.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}
