//! The caller of a request: requests of one take turns with those of others, and end at the caller's deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use tonic::Request;

use super::{Role, Roles, Tenant};
use crate::error::{Error, Result};
use crate::transactions::Connection;

/// Who asks. The guard puts it into the extensions of every request that it lets pass.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// The holder of the token.
    pub(crate) tenant: Arc<Tenant>,
    /// What the token allows.
    pub(crate) roles: Roles,
    /// The session: the gRPC connection that the request came on.
    pub(crate) connection: Option<Connection>,
    /// When the caller stops waiting.
    pub(crate) deadline: Option<Instant>,
}

impl Caller {
    /// The caller of a request.
    ///
    /// # Errors
    /// `Internal` when the request did not pass the guard.
    pub(crate) fn of<T>(request: &Request<T>) -> Result<Self> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Error::Internal("a request without a caller".to_owned()))
    }

    /// The tenant's name.
    pub(crate) fn name(&self) -> &Arc<str> {
        self.tenant.name()
    }

    /// Its session: calls of one tenant take turns by it. 0 where there is no connection.
    pub(crate) fn session(&self) -> Connection {
        self.connection.unwrap_or(0)
    }

    /// A caller with all roles, for tests.
    #[cfg(test)]
    pub(crate) fn named(name: &str, connection: Option<Connection>) -> Self {
        let cache = crate::cache_memory::CacheMemory::new(0, 0);
        let memory = crate::memory::MemoryBudget::new(0, cache);
        Self {
            tenant: Arc::new(Tenant::new(name, &memory)),
            roles: Roles::ALL,
            connection,
            deadline: None,
        }
    }

    /// Whether the caller may see and stop the work of the tenant called `owner`.
    pub(crate) fn may_manage(&self, owner: &str) -> bool {
        self.roles.contains(Role::Admin) || **self.name() == *owner
    }

    /// Refuses a caller without `role`.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub(crate) fn require(&self, role: Role) -> Result<()> {
        match self.roles.contains(role) {
            true => Ok(()),
            false => Err(Error::PermissionDenied {
                tenant: self.name().to_string(),
                role: role.as_str(),
            }),
        }
    }
}

/// When the caller of a request with these headers, which arrives now, stops waiting.
pub(super) fn deadline(headers: &HeaderMap) -> Option<Instant> {
    let timeout = parse_timeout(headers.get("grpc-timeout")?.to_str().ok()?)?;
    Instant::now().checked_add(timeout)
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
