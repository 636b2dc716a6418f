//! What every request but a probe passes first: the same guard as gRPC's calls.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::error::ApiError;
use crate::guard::Guard;

/// Lets a request pass or answers it with an error.
pub(super) async fn admit(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let holder = match guard.admit(&path, request.headers()) {
        Ok(holder) => holder,
        Err(error) => return ApiError::from(error).into_response(),
    };
    let start = Instant::now();
    let response = next.run(request).await;
    let (status, milliseconds) = (response.status().as_u16(), start.elapsed().as_secs_f64() * 1e3);
    tracing::debug!(%path, holder, status, milliseconds, "answered");
    response
}
