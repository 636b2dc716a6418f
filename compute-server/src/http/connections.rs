//! Connections of HTTP clients: served, and let go in order at the end.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use axum::response::Response;
use hyper::body::Incoming as Body;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;

use crate::connections::{ConnectionInfo, Incoming, Stream};

/// How long a client may take for the head of a request, or leave a connection idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of the head of a request.
const MAX_HEAD: usize = 64 << 10;

/// The routes, as one connection reaches them: its requests take turns with those of others.
#[derive(Clone)]
struct Known {
    info: ConnectionInfo,
    router: TowerToHyperService<Router>,
}

impl Service<Request<Body>> for Known {
    type Response = Response;
    type Error = Infallible;
    type Future = <TowerToHyperService<Router> as Service<Request<Body>>>::Future;

    fn call(&self, mut request: Request<Body>) -> Self::Future {
        request.extensions_mut().insert(self.info.clone());
        self.router.call(request)
    }
}

/// Serves connections until `stopped` is true and every response that had begun has been sent.
pub(crate) async fn serve(mut incoming: Incoming, router: Router, mut stopped: watch::Receiver<bool>) {
    let mut conversations = JoinSet::new();
    loop {
        let stream = tokio::select! {
            () = wait(&mut stopped) => break,
            Some(_) = conversations.join_next() => continue,
            stream = incoming.next() => stream,
        };
        let Some(Ok(stream)) = stream else { break };
        let service = Known {
            info: stream.info(),
            router: TowerToHyperService::new(router.clone()),
        };
        conversations.spawn(converse(stream, service, stopped.clone()));
    }
    drop(incoming);
    while conversations.join_next().await.is_some() {}
}

async fn converse(stream: Stream, service: Known, mut stopped: watch::Receiver<bool>) {
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
