//! HTTP: the endpoint that OpenAI's clients speak to, probes, and metrics.
//!
//! ```text
//! connection (TLS, timeouts) ─▶ admission (token, drain) ─▶ one file per endpoint ─▶ services::generate, as gRPC
//! ```

mod admission;
mod connections;
mod error;
mod health;
mod model_names;
mod models;

use std::sync::Arc;

use axum::Router;
use axum::routing::get;

pub(crate) use connections::serve;

use crate::guard::Guard;

/// The routes.
pub(crate) fn router(guard: Arc<Guard>) -> Router {
    let app = Arc::clone(&guard.app);
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .fallback(error::unknown_path)
        .method_not_allowed_fallback(error::wrong_method)
        .layer(axum::middleware::from_fn_with_state(guard, admission::admit))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .with_state(app)
}
