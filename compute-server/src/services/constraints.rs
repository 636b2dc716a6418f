//! Compiling response formats: away from the threads that serve calls, a few at a time, and not for ever.

use std::sync::Arc;
use std::time::Duration;

use candle_models::{Constraint, ResponseFormat, Tokenizer};
use tokio::sync::Semaphore;

use crate::error::{Error, Result};

/// Formats that are compiled at a time.
static COMPILING: Semaphore = Semaphore::const_new(2);

/// Longest time that a request waits for its format. What is still compiled then keeps its place until it is done, so that
/// formats which take long cannot pile up.
const PATIENCE: Duration = Duration::from_secs(10);

/// The constraint of a request's `response_format_json`; none for any text.
///
/// # Errors
/// `InvalidArgument` for a format that is malformed, too large, or takes too long.
pub(super) async fn compile(tokenizer: &Arc<Tokenizer>, json: &str) -> Result<Option<Constraint>> {
    if json.is_empty() {
        return Ok(None);
    }
    let Some(format) = ResponseFormat::parse(json)? else {
        return Ok(None);
    };
    let tokenizer = Arc::clone(tokenizer);
    let work = async move {
        let place = COMPILING.acquire().await;
        let compiled = tokio::task::spawn_blocking(move || {
            let _place = place;
            tokenizer.constraint_vocabulary()?.compile(format)
        });
        compiled.await.map_err(|error| Error::Internal(error.to_string()))
    };
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(compiled) => Ok(Some(compiled??)),
        Err(_) => Err(Error::invalid(format!(
            "response_format takes longer than {} s to compile; simplify it",
            PATIENCE.as_secs()
        ))),
    }
}
