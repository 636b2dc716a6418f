//! From a configuration to a running server, and its orderly end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use candle_compute_proto::v1::FILE_DESCRIPTOR_SET;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::app::App;
use crate::config::Config;
use crate::connections::{self, Connections};
use crate::error::{Error, Result};
use crate::guard::{self, Guard};
use crate::services::{self, SERVICES};
use crate::{http, recovery, transactions};

/// How long calls may take to notice that they were cancelled, once the drain timeout is over.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
/// How long open connections may take to close.
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// Streams that one connection may have open: a scan may ask for many generations at once.
const MAX_STREAMS: u32 = 4096;
/// Bytes that a client may send ahead on one stream, and on one connection.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// Largest frame taken: a chunk of a tensor whole, with its message around it.
const FRAME: u32 = (1 << 20) + 4096;

/// Where the server listens.
#[derive(Debug, Clone, Copy)]
pub struct Listening {
    /// The gRPC services.
    pub grpc: SocketAddr,
    /// HTTP, unless it is off.
    pub http: Option<SocketAddr>,
}

/// Serves until SIGTERM or SIGINT, then drains. `ready` is called once connections are accepted.
///
/// # Errors
/// When an address, the data folder, the token file or the TLS files cannot be used.
pub async fn serve(config: Config, ready: impl FnOnce(&Listening)) -> Result<()> {
    candle_kernels_cpu::threads::set(config.threads);
    let mut server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME);
    let tls = |protocols: &[&str]| {
        let tls = config.tls.as_ref();
        tls.map(|tls| connections::acceptor(tls, protocols)).transpose()
    };
    let (grpc_tls, http_tls) = (tls(&["h2"])?, tls(&["http/1.1"])?);
    let (app, recovered) = App::open(config)?;
    let guard = Arc::new(Guard { app: Arc::clone(&app) });
    let grpc = bind("listen", app.config.listen).await?;
    let http = match app.config.http {
        Some(address) => Some(bind("http", address).await?),
        None => None,
    };
    let address = |listener: &TcpListener| listener.local_addr().map_err(|error| Error::io("listening", error));
    let listening = Listening {
        grpc: address(&grpc)?,
        http: http.as_ref().map(address).transpose()?,
    };
    // Signals that arrive from now on are kept for `drain`.
    let (terminate, interrupt) = (signals(SignalKind::terminate())?, signals(SignalKind::interrupt())?);
    let (reporter, routes) = routes(&guard).await?;
    let (closed, closings) = mpsc::unbounded_channel();
    let limits = &app.config.limits;
    let connections = Connections::new(limits.connections, app.config.handshake_timeout, closed);
    let (stop, stopped) = watch::channel(false);
    let incoming = connections::listen(grpc, Arc::clone(&connections), grpc_tls);
    let mut serving = tokio::spawn(
        server
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, wait(stopped.clone())),
    );
    let serving_http = http.map(|listener| {
        let incoming = connections::listen(listener, connections, http_tls);
        tokio::spawn(http::serve(incoming, http::router(guard), stopped))
    });
    tokio::spawn(watch_connections(Arc::clone(&app), closings));
    tokio::spawn(watch_transactions(Arc::clone(&app)));
    tokio::spawn(watch_readers(Arc::clone(&app)));
    tokio::spawn(Arc::clone(&app.executor).watch_cancelled());
    let serve = async {
        recovery::recover(&app, recovered).await;
        app.recovered();
        report(&reporter, ServingStatus::Serving).await;
        tracing::info!(grpc = %listening.grpc, tls = app.config.tls.is_some(), "listening");
        ready(&listening);
        std::future::pending().await
    };
    tokio::select! {
        () = terminated(terminate, interrupt) => {}
        ended = &mut serving => return ended_early(ended),
        () = serve => {}
    }
    drain(&app, &reporter).await;
    app.executor.end_sessions();
    let _ = stop.send(true);
    let closed = async {
        let _ = serving.await;
        if let Some(serving) = serving_http {
            let _ = serving.await;
        }
    };
    let _ = tokio::time::timeout(CLOSE_GRACE, closed).await;
    tracing::info!("stopped");
    Ok(())
}

/// All gRPC services, behind the guard.
pub(crate) async fn routes(guard: &Arc<Guard>) -> Result<(HealthReporter, Routes)> {
    let (reporter, health) = tonic_health::server::health_reporter();
    report(&reporter, ServingStatus::NotServing).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let failed = |error: tonic_reflection::server::Error| Error::Internal(format!("reflection: {error}"));
    let routes = services::routes(&guard.app)
        .add_service(health)
        .add_service(reflection().build_v1().map_err(failed)?)
        .add_service(reflection().build_v1alpha().map_err(failed)?);
    let router = routes
        .into_axum_router()
        .layer(axum::middleware::from_fn_with_state(Arc::clone(guard), guard::guard));
    Ok((reporter, Routes::from(router)))
}

/// Sets the health of all services.
async fn report(reporter: &HealthReporter, status: ServingStatus) {
    for service in SERVICES.into_iter().chain([""]) {
        reporter.set_service_status(service, status).await;
    }
}

async fn bind(option: &str, address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| Error::io(format!("--{option} {address}"), error))
}

fn signals(kind: SignalKind) -> Result<tokio::signal::unix::Signal> {
    signal(kind).map_err(|error| Error::io("waiting for signals", error))
}

async fn terminated(mut terminate: tokio::signal::unix::Signal, mut interrupt: tokio::signal::unix::Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

async fn wait(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is an end as well.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Takes no new work and waits for what runs, at most for the drain timeout; then cancels the rest.
async fn drain(app: &App, reporter: &HealthReporter) {
    tracing::info!("shutting down: no new work is taken");
    app.drain();
    report(reporter, ServingStatus::NotServing).await;
    if tokio::time::timeout(app.config.drain_timeout, idle(app)).await.is_err() {
        tracing::warn!("work that did not finish within --drain-timeout is cancelled");
        app.requests.cancel_all();
        let _ = tokio::time::timeout(CANCEL_GRACE, idle(app)).await;
    }
}

async fn idle(app: &App) {
    while !app.is_idle() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Discards the transactions of connections that have ended.
async fn watch_connections(app: Arc<App>, mut closings: mpsc::UnboundedReceiver<transactions::Connection>) {
    while let Some(connection) = closings.recv().await {
        app.connection_closed(connection).await;
    }
}

/// Discards transactions that nobody uses.
async fn watch_transactions(app: Arc<App>) {
    let mut interval = tokio::time::interval(app.transactions.sweep_interval());
    loop {
        interval.tick().await;
        app.expire_transactions().await;
    }
}

/// Gives up generations whose clients do not read.
async fn watch_readers(app: Arc<App>) {
    let timeout = app.config.stall_timeout;
    let mut interval = tokio::time::interval((timeout / 4).clamp(Duration::from_millis(250), Duration::from_secs(30)));
    loop {
        interval.tick().await;
        app.requests.give_up_stalled(timeout);
    }
}

fn ended_early(ended: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>) -> Result<()> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Error::Internal(chain(&error))),
        Err(error) => Err(Error::Internal(error.to_string())),
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
