//! Tokenized documents in the table `candle.dataset`: made from texts, and from the tokens of another model.

mod conversion;
mod mask;
mod retokenize;
mod tokenize;

pub(crate) use retokenize::retokenize;
pub(crate) use tokenize::tokenize;

use pgrx::PgSqlErrorCode;

use crate::error::{Error, Result};

/// Rows that are converted, stored and committed at a time.
const ROWS_PER_BATCH: i64 = 64;

/// The value of an argument that has to be given.
///
/// # Errors
/// 22004 for NULL, 22023 for an empty text.
pub(crate) fn given(argument: &str, value: Option<String>) -> Result<String> {
    match value {
        None => {
            let code = PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED;
            Err(Error::new(code, format!("{argument} must not be NULL")))
        }
        Some(text) if text.trim().is_empty() => Err(Error::bad_value(format!("{argument} must not be empty"))),
        Some(text) => Ok(text),
    }
}
