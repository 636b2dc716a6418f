//! Bodies of requests: JSON of a bounded size that arrives in a bounded time.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};

use super::error::ApiError;
use super::fields::Fields;
use crate::app::App;
use crate::error::Error;

/// How long a client may take to send a body.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of a body, if --max-message-bytes allows as many: more than the text of as many tokens as a request may have.
const MAX_BODY: usize = 16 << 20;

/// Reads the body of `request`, a JSON object.
///
/// # Errors
/// 415 when it is said not to be JSON, 413 past the limit, 408 when it takes too long, 400 when it is no object.
pub(super) async fn read(app: &App, request: Request) -> Result<Fields, ApiError> {
    let (head, body) = request.into_parts();
    check_type(&head.headers)?;
    let limit = app.config.limits.message_bytes.min(MAX_BODY);
    let announced = head.headers.get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(too_large(limit));
    }
    let bytes = match tokio::time::timeout(READ_TIMEOUT, bytes(body, limit)).await {
        Ok(bytes) => bytes?,
        Err(_) => {
            let message = format!("the body did not arrive within {} seconds", READ_TIMEOUT.as_secs());
            return Err(ApiError::with_status(StatusCode::REQUEST_TIMEOUT, message));
        }
    };
    Fields::parse("the body", &bytes)
}

async fn bytes(body: Body, limit: usize) -> Result<axum::body::Bytes, ApiError> {
    // One byte more than allowed tells a body that is too large from a connection that broke.
    match to_bytes(body, limit.saturating_add(1)).await {
        Ok(bytes) if bytes.len() <= limit => Ok(bytes),
        Ok(_) => Err(too_large(limit)),
        Err(error) if is_past_limit(&error) => Err(too_large(limit)),
        Err(error) => Err(ApiError::invalid(format!("the body cannot be read: {error}"))),
    }
}

fn is_past_limit(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.to_string().contains("length limit exceeded"))
}

/// A page of another origin can send plain text without being asked, but not JSON: nothing else is read.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = given.map(|given| given.split(';').next().unwrap_or(given).trim());
    match essence {
        Some(essence) if essence.eq_ignore_ascii_case("application/json") => Ok(()),
        _ => Err(ApiError::with_status(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the content-type has to be application/json",
        )),
    }
}

fn too_large(limit: usize) -> ApiError {
    if limit == MAX_BODY {
        let message = format!("the body is larger than {MAX_BODY} bytes");
        return ApiError::with_status(StatusCode::PAYLOAD_TOO_LARGE, message);
    }
    ApiError::from(Error::Limit {
        what: "the size of the body".to_owned(),
        limit: limit as u64,
        flag: "max-message-bytes",
    })
}
