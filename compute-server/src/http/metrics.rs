//! `GET /metrics`: Prometheus's text format.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use prometheus::{TEXT_FORMAT, TextEncoder};

use super::error::ApiError;
use crate::app::App;
use crate::error::Error;
use crate::metrics;

/// What is measured, now.
pub(super) async fn show(State(app): State<Arc<App>>) -> Result<impl IntoResponse, ApiError> {
    let families = metrics::gather(&app)?;
    let text = TextEncoder::new()
        .encode_to_string(&families)
        .map_err(|error| Error::Internal(format!("metrics: {error}")))?;
    Ok(([(header::CONTENT_TYPE, TEXT_FORMAT)], text))
}
