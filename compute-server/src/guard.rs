//! What every gRPC call and HTTP request passes first: its token is checked, and a server that shuts down takes no new work.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use tonic::{Code, Status};

use crate::app::App;
use crate::auth::Tokens;
use crate::caller::Tenant;
use crate::error::{Error, Result};

/// What the guard needs.
pub(crate) struct Guard {
    /// The state of the server.
    pub(crate) app: Arc<App>,
    /// Accepted tokens; none when nobody is asked for one.
    pub(crate) tokens: Option<Tokens>,
}

/// Services that run while the server drains: transactions can still be ended, and progress be seen.
const SERVED_WHILE_DRAINING: [&str; 4] = [
    "/candle.compute.v1.TransactionsService/",
    "/candle.compute.v1.TelemetryService/",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.",
];

/// Probes ask for health without a token.
const OPEN: &str = "/grpc.health.v1.Health/";

impl Guard {
    /// The holder of the call's token.
    pub(crate) fn admit(&self, path: &str, headers: &HeaderMap) -> Result<&str> {
        let holder = match &self.tokens {
            Some(tokens) if !path.starts_with(OPEN) => {
                tokens.holder(headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()))?
            }
            _ => "",
        };
        if self.app.is_recovering() && !path.starts_with(OPEN) {
            return Err(Error::Recovering);
        }
        if self.app.is_draining() && !SERVED_WHILE_DRAINING.iter().any(|served| path.starts_with(served)) {
            return Err(Error::Draining);
        }
        Ok(holder)
    }
}

/// Lets a call pass or answers it with a status.
pub(crate) async fn guard(State(guard): State<Arc<Guard>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let holder = match guard.admit(&path, request.headers()) {
        Ok(holder) => holder,
        Err(error) => return Status::from(error).into_http(),
    };
    request.extensions_mut().insert(Tenant(Arc::from(holder)));
    let start = Instant::now();
    let response = next.run(request).await;
    let status = Status::from_header_map(response.headers());
    let code = status.as_ref().map_or(Code::Ok, Status::code);
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    guard.app.metrics.answered_grpc(&path, code);
    tracing::debug!(%path, holder, ?code, milliseconds, "answered");
    match status {
        Some(status) if code == Code::OutOfRange && status.message().contains("message length too large") => {
            let limit = guard.app.config.limits.message_bytes as u64;
            let error = Error::Limit {
                what: "the size of a message".to_owned(),
                limit,
                flag: "max-message-bytes",
            };
            Status::from(error).into_http()
        }
        _ => response,
    }
}
