//! Probes, which need no token: `/healthz` while the process lives, `/readyz` while it takes work.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;

use crate::app::App;

/// `GET /healthz`.
pub(super) async fn alive() -> &'static str {
    "ok\n"
}

/// `GET /readyz`.
pub(super) async fn ready(State(app): State<Arc<App>>) -> (StatusCode, &'static str) {
    match (app.is_recovering(), app.is_draining()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "recovering\n"),
        (_, true) => (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n"),
        (false, false) => (StatusCode::OK, "ready\n"),
    }
}
