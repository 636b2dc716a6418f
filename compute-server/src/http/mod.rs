//! HTTP: the endpoint that OpenAI's clients speak to, probes, and metrics.
//!
//! ```text
//! connection (TLS, timeouts) ─▶ admission (token, drain) ─▶ one file per endpoint ─▶ services::generate, as gRPC
//! ```

mod admission;
mod answer;
mod body;
mod chat_completions;
mod choices;
mod completions;
mod connections;
mod embeddings;
mod error;
mod fields;
mod health;
mod inputs;
mod metrics;
mod model_names;
mod models;
mod parameters;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};

pub(crate) use connections::serve;

use crate::guard::Guard;

/// The routes.
pub(crate) fn router(guard: Arc<Guard>) -> Router {
    let app = Arc::clone(&guard.app);
    let metrics = Router::new().route("/metrics", get(metrics::show));
    let (guarded, open) = match app.config.metrics_public {
        true => (Router::new(), metrics),
        false => (metrics, Router::new()),
    };
    let guarded = guarded
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat_completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .fallback(error::unknown_path)
        .method_not_allowed_fallback(error::wrong_method)
        .layer(axum::middleware::from_fn_with_state(guard, admission::admit));
    open.route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .merge(guarded)
        .with_state(app)
}
