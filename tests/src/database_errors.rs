//! What a statement failed with.

use postgres::Error;

/// The SQLSTATE of a failure; `connection lost` when the server sent none.
#[must_use]
pub fn sqlstate(error: &Error) -> &str {
    error.code().map_or("connection lost", |code| code.code())
}

/// Message, DETAIL and HINT of a failure as one text.
#[must_use]
pub fn report(error: &Error) -> String {
    error.as_db_error().map_or_else(
        || error.to_string(),
        |reported| {
            let parts = [Some(reported.message()), reported.detail(), reported.hint()];
            parts.into_iter().flatten().collect::<Vec<_>>().join(" | ")
        },
    )
}

/// Asserts that a statement failed with this SQLSTATE and gives the whole report.
///
/// # Panics
/// When it succeeded, or failed with another SQLSTATE.
#[track_caller]
pub fn expect_failure<T>(result: Result<T, Error>, expected: &str) -> String {
    match result {
        Ok(_) => panic!("expected SQLSTATE {expected}, but the statement succeeded"),
        Err(error) => {
            let report = report(&error);
            assert_eq!(sqlstate(&error), expected, "{report}");
            report
        }
    }
}
