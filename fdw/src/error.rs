//! The extension's one error type and its one translation to PostgreSQL's error report.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use tonic::{Code, Status};

/// What went wrong, with the SQLSTATE that tells clients what to do about it. Never holds a secret.
#[derive(Debug, Clone)]
pub(crate) struct Error {
    /// SQLSTATE.
    pub(crate) code: PgSqlErrorCode,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
}

/// Result with the extension's error.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(code: PgSqlErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    pub(crate) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The message.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Says whom the error is about.
    pub(crate) fn context(mut self, whom: &str) -> Self {
        self.message = format!("{whom}: {}", self.message);
        self
    }

    /// A value that its column or option does not admit.
    pub(crate) fn bad_value(message: impl Into<String>) -> Self {
        Self::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message)
    }

    /// The server answered in a way that the protocol does not allow.
    pub(crate) fn protocol(what: &str) -> Self {
        Self::new(
            PgSqlErrorCode::ERRCODE_FDW_ERROR,
            format!("the compute server sent no {what}"),
        )
        .hint("The server and the extension may be of different versions.")
    }

    /// Raises the error as PostgreSQL's; unwinds through Rust's frames first.
    pub(crate) fn report(self) -> ! {
        ErrorReport::from(self).report(PgLogLevel::ERROR);
        unreachable!("an ERROR does not return")
    }
}

impl From<Error> for ErrorReport {
    #[track_caller]
    fn from(error: Error) -> Self {
        let mut report = ErrorReport::new(error.code, error.message, "candle_fdw");
        if let Some(detail) = error.detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = error.hint {
            report = report.set_hint(hint);
        }
        report
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let text = |name: &str| {
            status
                .metadata()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(std::string::ToString::to_string)
        };
        if is_transport(&status) {
            return Self::new(
                PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_ESTABLISH_CONNECTION,
                "the connection to the compute server failed",
            )
            .detail(describe(&status))
            .hint("Check that the server is running and that the server option \"endpoint\" names its gRPC address.");
        }
        let code = text("candle-sqlstate")
            .and_then(|state| sqlstate(&state))
            .unwrap_or_else(|| default_code(status.code()));
        let message = match status.message() {
            "" => format!("the compute server refused the request ({})", status.code()),
            message => message.to_string(),
        };
        Self {
            code,
            message,
            detail: text("candle-detail"),
            hint: text("candle-hint"),
        }
    }
}

/// Takes the value or raises the error.
pub(crate) trait OrReport<T> {
    /// The value; an error is raised as PostgreSQL's.
    fn or_report(self) -> T;
}

impl<T> OrReport<T> for Result<T> {
    fn or_report(self) -> T {
        match self {
            Ok(value) => value,
            Err(error) => error.report(),
        }
    }
}

/// Whether the status was made on this side because the connection broke or could not be made.
pub(crate) fn is_transport(status: &Status) -> bool {
    use std::error::Error as _;
    // A status that the server sent has no source.
    status.source().is_some()
        && matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled
        )
}

/// The chain of causes in one line.
pub(crate) fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        // A status prints its metadata and source too; its message says it better.
        let text = error
            .downcast_ref::<Status>()
            .map_or_else(|| error.to_string(), |status| status.message().to_string());
        if !text.is_empty() && !parts.contains(&text) {
            parts.push(text);
        }
        next = error.source();
    }
    parts.join(": ")
}

/// Five characters to PostgreSQL's packed form (6 bits a character).
fn sqlstate(text: &str) -> Option<PgSqlErrorCode> {
    let bytes = text.as_bytes();
    if bytes.len() != 5
        || !bytes
            .iter()
            .all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase())
    {
        return None;
    }
    let packed = bytes
        .iter()
        .rev()
        .fold(0_i32, |packed, byte| (packed << 6) | (i32::from(byte - b'0') & 0x3F));
    Some(PgSqlErrorCode::from(packed))
}

/// SQLSTATE for a gRPC code that came without one.
fn default_code(code: Code) -> PgSqlErrorCode {
    match code {
        Code::InvalidArgument | Code::OutOfRange => PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
        Code::NotFound => PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
        Code::AlreadyExists => PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
        Code::PermissionDenied | Code::Unauthenticated => PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
        Code::ResourceExhausted => PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
        Code::FailedPrecondition => PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        Code::Aborted => PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
        Code::Unimplemented => PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
        Code::Cancelled => PgSqlErrorCode::ERRCODE_QUERY_CANCELED,
        Code::Unavailable => PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_ESTABLISH_CONNECTION,
        Code::Ok | Code::Unknown | Code::DeadlineExceeded | Code::Internal | Code::DataLoss => {
            PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_CREATE_EXECUTION
        }
    }
}
