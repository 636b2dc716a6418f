//! Who asks: requests of one caller take turns with those of others, and end at the caller's deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{Extensions, HeaderMap};
use tonic::Request;

use crate::connections::ConnectionInfo;
use crate::transactions::Connection;

/// The holder of a request's token: an extension that the guard gives to the request.
#[derive(Debug, Clone)]
pub(crate) struct Tenant(pub(crate) Arc<str>);

/// Whose request it is. Callers of one tenant and session queue up, others take turns with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The tenant; empty where nobody is asked for a token.
    pub(crate) tenant: Arc<str>,
    /// The session: the connection that the request came on; 0 where there is none.
    pub(crate) session: Connection,
    /// When the caller stops waiting.
    pub(crate) deadline: Option<Instant>,
}

impl Caller {
    /// The caller of a gRPC request.
    pub(crate) fn of<T>(request: &Request<T>) -> Self {
        Self::new(request.extensions(), request.metadata().clone().into_headers())
    }

    /// The caller with these extensions and headers.
    fn new(extensions: &Extensions, headers: HeaderMap) -> Self {
        Self {
            tenant: extensions
                .get::<Tenant>()
                .map_or_else(|| Arc::from(""), |tenant| Arc::clone(&tenant.0)),
            session: extensions.get::<ConnectionInfo>().map_or(0, |info| info.id),
            deadline: headers
                .get("grpc-timeout")
                .and_then(|value| parse_timeout(value.to_str().ok()?))
                .and_then(|timeout| Instant::now().checked_add(timeout)),
        }
    }
}

/// The value of a `grpc-timeout` header: up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(parse_timeout("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse_timeout("99999999n"), Some(Duration::from_nanos(99_999_999)));
        assert_eq!(parse_timeout("15m"), Some(Duration::from_millis(15)));
        for wrong in ["", "S", "5", "5x", "-5S", "123456789S", "1é"] {
            assert_eq!(parse_timeout(wrong), None, "{wrong}");
        }
    }
}
