//! What every request but a probe passes first: the same guard as gRPC's calls.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::error::ApiError;
use crate::access::Caller;
use crate::error::Error;
use crate::guard::Guard;

/// Lets a request pass or answers it with an error.
pub(super) async fn admit(State(guard): State<Arc<Guard>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = match guard.admit(&request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => ApiError::from(error).into_response(),
    };
    let (status, milliseconds) = (response.status().as_u16(), start.elapsed().as_secs_f64() * 1e3);
    guard
        .app
        .metrics
        .answered_http(route.as_ref().map(MatchedPath::as_str), status);
    tracing::debug!(%path, status, milliseconds, "answered");
    response
}

/// Whose request it is.
///
/// # Errors
/// `Internal` when the request did not pass the guard.
pub(super) fn caller(request: &Request) -> Result<Caller, ApiError> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Error::Internal("a request without a caller".to_owned()).into())
}
