//! What every request but a probe passes first: the same guard as gRPC's calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::error::ApiError;
use crate::access::{Caller, Need, need};
use crate::error::Error;
use crate::guard::Guard;
use crate::response_end::{End, Ending};

/// Status of a request whose client did not wait for the end, as nginx has it.
const CLIENT_GONE: u16 = 499;

/// In the extensions of a response: the status that its events ended with; 0 until they have.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome(Arc<AtomicU16>);

impl Outcome {
    /// The events have ended, as a response of that status would have.
    pub(super) fn set(&self, status: u16) {
        self.0.store(status, Ordering::Relaxed);
    }

    fn get(&self) -> Option<u16> {
        Some(self.0.load(Ordering::Relaxed)).filter(|status| *status != 0)
    }
}

/// Lets a request pass or answers it with an error.
pub(super) async fn admit(State(guard): State<Arc<Guard>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().cloned();
    // That there is no such path may be told to everybody who has a token.
    let need = route.as_ref().map_or(Need::Known, |_| need(&path));
    let app = Arc::clone(&guard.app);
    let ending = Ending::new(move |begun: Option<(u16, Option<Outcome>)>, end| {
        let (begun, outcome) = begun.unwrap_or((CLIENT_GONE, None));
        let status = match (outcome.and_then(|outcome| outcome.get()), end) {
            (Some(status), _) => status,
            (None, End::Whole(_)) => begun,
            (None, End::Broken) => CLIENT_GONE,
        };
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        app.metrics
            .answered_http(route.as_ref().map(MatchedPath::as_str), status);
        tracing::debug!(%path, status, milliseconds, "answered");
    });
    let response = match guard.admit(&request, need) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => ApiError::from(error).into_response(),
    };
    let outcome = response.extensions().get::<Outcome>().cloned();
    let begun = (response.status().as_u16(), outcome);
    ending.follow(response, begun)
}

/// Whose request it is.
///
/// # Errors
/// `Internal` when the request did not pass the guard.
pub(super) fn caller(request: &Request) -> Result<Caller, ApiError> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Error::Internal("a request without a caller".to_owned()).into())
}
