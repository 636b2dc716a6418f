//! Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with a status.
//!
//! | cause | status | `code` |
//! | --- | --- | --- |
//! | a bad value, an unknown or unsupported parameter | 400 | |
//! | more tokens than the context or a request may have | 400 | `context_length_exceeded` |
//! | no token, or a wrong one | 401 | `invalid_api_key` |
//! | not allowed to this token | 403 | |
//! | no such model | 404 | `model_not_found` |
//! | no such path | 404 | `unknown_url` |
//! | a body past the limit | 413 | |
//! | a full queue, a quota | 429, Retry-After | `rate_limit_exceeded` |
//! | cancelled | 499 | `cancelled` |
//! | no memory left, starting, shutting down | 503, Retry-After | |
//! | anything else | 500 | |

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tonic::Code;

use crate::error::Error;

/// Seconds after which a client may try again where the server has no better guess.
const RETRY_AFTER: u64 = 1;
/// Longest message in characters.
const MAX_MESSAGE: usize = 2000;

/// An error object with its status.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        let message: String = message.into();
        let message = match message.char_indices().nth(MAX_MESSAGE) {
            None => message,
            Some((end, _)) => format!("{}…", &message[..end]),
        };
        Self {
            status,
            kind,
            message,
            param: None,
            code,
            retry_after: None,
        }
    }

    /// A request that cannot be right: 400.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::with_status(StatusCode::BAD_REQUEST, message)
    }

    /// The same with another status.
    pub(super) fn with_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", None, message)
    }

    /// Names the parameter that is meant, unless one is named already.
    pub(super) fn of(mut self, param: impl Into<String>) -> Self {
        self.param.get_or_insert_with(|| param.into());
        self
    }

    /// Says that the parameter named, if any, is one of `outer`.
    pub(super) fn within(mut self, outer: &str) -> Self {
        self.param = Some(match self.param {
            Some(param) => format!("{outer}.{param}"),
            None => outer.to_owned(),
        });
        self
    }

    /// The generation was cancelled on the server.
    pub(super) fn cancelled() -> Self {
        Error::Cancelled.into()
    }

    /// Its status.
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// The error object.
    pub(super) fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let (code, sqlstate, hint) = error.classify();
        if code == Code::Internal {
            tracing::error!(%error, "a request failed");
        }
        let message = match hint {
            Some(hint) if code != Code::Unauthenticated => format!("{error}. {hint}"),
            _ => error.to_string(),
        };
        let (bad, busy) = ("invalid_request_error", "server_error");
        let (status, kind, name) = match (code, &error) {
            (_, Error::Limit { flag, .. }) if *flag == "max-message-bytes" => (413, bad, None),
            (_, Error::ContextLength { .. }) => (400, bad, Some("context_length_exceeded")),
            (_, Error::Limit { flag, .. }) if *flag == "max-request-tokens" => {
                (400, bad, Some("context_length_exceeded"))
            }
            (Code::Unauthenticated, _) => (401, bad, Some("invalid_api_key")),
            (Code::PermissionDenied, _) => (403, "permission_error", None),
            (Code::NotFound, _) => (404, bad, Some("model_not_found")),
            (Code::Aborted, _) => (409, "conflict_error", None),
            // Memory or disk space: not something that this client did too often.
            (Code::ResourceExhausted, _) if sqlstate == "HV001" || sqlstate == "53100" => (503, busy, None),
            (Code::ResourceExhausted, _) => (429, "rate_limit_error", Some("rate_limit_exceeded")),
            (Code::Cancelled, _) => (499, "cancelled", Some("cancelled")),
            (Code::Unavailable, _) => (503, busy, None),
            (Code::DeadlineExceeded, _) => (504, busy, None),
            (Code::Internal | Code::Unknown | Code::DataLoss, _) => (500, busy, None),
            _ => (400, bad, None),
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut api_error = Self::new(status, kind, name, message);
        if matches!(status.as_u16(), 429 | 503) {
            api_error.retry_after = Some(error.retry_after_seconds().unwrap_or(RETRY_AFTER));
        }
        if code == Code::NotFound {
            api_error.param = Some("model".to_owned());
        }
        api_error
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Answers a path that there is not.
pub(super) async fn unknown_path(request: Request) -> ApiError {
    let message = format!("there is no {} {}", request.method(), request.uri().path());
    ApiError::new(
        StatusCode::NOT_FOUND,
        "invalid_request_error",
        Some("unknown_url"),
        message,
    )
}

/// Answers a method that a path does not know.
pub(super) async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} is not possible at {}", request.method(), request.uri().path());
    ApiError::with_status(StatusCode::METHOD_NOT_ALLOWED, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_status_code_and_time_to_wait() {
        let limit = |flag| Error::Limit {
            what: "it".into(),
            limit: 1,
            flag,
        };
        let cases = [
            (Error::invalid("x"), 400, None, false),
            (limit("max-request-tokens"), 400, Some("context_length_exceeded"), false),
            (
                Error::ContextLength { prompt: 9, context: 8 },
                400,
                Some("context_length_exceeded"),
                false,
            ),
            (limit("max-message-bytes"), 413, None, false),
            (limit("max-queue"), 429, Some("rate_limit_exceeded"), true),
            (Error::Unauthenticated("no"), 401, Some("invalid_api_key"), false),
            (Error::Draining, 503, None, true),
            (Error::Cancelled, 499, Some("cancelled"), false),
            (Error::Internal("x".into()), 500, None, false),
        ];
        for (error, status, code, waits) in cases {
            let error = ApiError::from(error);
            assert_eq!((error.status.as_u16(), error.code), (status, code), "{}", error.message);
            assert_eq!(error.retry_after.is_some(), waits, "{}", error.message);
        }
        let missing = ApiError::from(Error::NotFound {
            kind: "model",
            name: "m".into(),
        });
        assert_eq!(missing.to_json()["error"]["param"], "model");
        assert_eq!(missing.to_json()["error"]["code"], "model_not_found");
    }

    #[test]
    fn messages_are_cut_at_a_character() {
        let error = ApiError::invalid("é".repeat(5000));
        assert_eq!(error.message.chars().count(), MAX_MESSAGE + 1);
    }
}
