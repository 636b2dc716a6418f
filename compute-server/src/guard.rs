//! What every gRPC call passes first: its token, roles and quotas are checked, and a server that shuts down takes no new
//! work. HTTP asks the same guard.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::Extensions;
use axum::middleware::Next;
use axum::response::Response;
use tonic::{Code, Status};

use crate::access::{Caller, Need, Roles, need};
use crate::app::App;
use crate::connections::{ConnectionInfo, Link};
use crate::error::{Error, Result};
use crate::response_end::{End, Ending};

/// What the guard needs.
pub(crate) struct Guard {
    /// The state of the server.
    pub(crate) app: Arc<App>,
}

/// Services that run while the server drains: transactions can still be ended, and progress be seen.
const SERVED_WHILE_DRAINING: [&str; 10] = [
    "/candle.compute.v1.TransactionsService/",
    "/candle.compute.v1.TelemetryService/",
    "/candle.compute.v1.TensorsService/Publish",
    "/candle.compute.v1.TensorsService/Rollback",
    "/candle.compute.v1.TensorsService/Release",
    "/candle.compute.v1.TensorsService/Read",
    "/candle.compute.v1.TensorsService/List",
    "/candle.compute.v1.TensorsService/Wait",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.",
];

impl Guard {
    /// The caller of a request, if it may be answered now. Its connection may stay then.
    ///
    /// # Errors
    /// `Unauthenticated`, `PermissionDenied`, `Quota`; `Recovering` and `Draining`.
    pub(crate) fn admit(&self, request: &Request, need: Need) -> Result<Caller> {
        let path = request.uri().path();
        let link = link(request.extensions());
        if let Some(link) = link.filter(|_| !self.app.tenants.asks_for_tokens()) {
            link.establish();
        }
        if need == Need::Open {
            return Ok(Caller {
                tenant: self.app.tenants.tenant(""),
                roles: Roles::NONE,
                connection: None,
                deadline: None,
            });
        }
        let mut caller = self.app.tenants.caller(request.headers())?;
        if let Some(link) = link {
            link.establish();
            caller.connection = Some(link.id);
        }
        if let Need::Role(role) = need {
            caller.require(role)?;
        }
        if need != Need::Token {
            caller.tenant.admit_call()?;
        }
        if self.app.is_recovering() {
            return Err(Error::Recovering);
        }
        if self.app.is_draining() && !SERVED_WHILE_DRAINING.iter().any(|served| path.starts_with(served)) {
            return Err(Error::Draining);
        }
        Ok(caller)
    }
}

/// The connection that a request with these extensions came on.
fn link(extensions: &Extensions) -> Option<&Link> {
    extensions.get::<ConnectionInfo>().map(|info| &*info.link)
}

/// The code that a call ended with whose answer did not begin with one.
fn code_of(end: &End) -> Code {
    match end {
        End::Whole(trailers) => trailers
            .as_ref()
            .and_then(Status::from_header_map)
            .map_or(Code::Ok, |status| status.code()),
        End::Broken => Code::Cancelled,
    }
}

/// Lets a call pass or answers it with a status.
pub(crate) async fn guard(State(guard): State<Arc<Guard>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let caller = match guard.admit(&request, need(&path)) {
        Ok(caller) => caller,
        Err(error) => return Status::from(error).into_http(),
    };
    let tenant = Arc::clone(caller.name());
    request.extensions_mut().insert(caller);
    let (start, app) = (Instant::now(), Arc::clone(&guard.app));
    let ending = Ending::new(move |begun: Option<Option<Code>>, end| {
        let code = begun.flatten().unwrap_or_else(|| code_of(&end));
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        app.metrics.answered_grpc(&path, code);
        tracing::debug!(%path, %tenant, ?code, milliseconds, "answered");
    });
    let response = next.run(request).await;
    let status = Status::from_header_map(response.headers());
    let response = ending.follow(response, status.as_ref().map(Status::code));
    match status {
        Some(status) if status.code() == Code::OutOfRange && status.message().contains("message length too large") => {
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
