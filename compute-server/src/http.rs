//! HTTP for probes: `/healthz` while the process lives, `/readyz` while it takes work.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;

use crate::app::App;

/// The routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(app)
}

async fn ready(State(app): State<Arc<App>>) -> (StatusCode, &'static str) {
    match (app.is_recovering(), app.is_draining()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "recovering\n"),
        (_, true) => (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n"),
        (false, false) => (StatusCode::OK, "ready\n"),
    }
}
