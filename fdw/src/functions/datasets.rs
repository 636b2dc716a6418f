//! `candle.tokenize_dataset` and `candle.retokenize_dataset`.

use pgrx::prelude::*;

use super::refuse_read_only;
use crate::datasets::{self, given};
use crate::error::{OrReport, Result};
use crate::procedure::Procedure;

/// Tokenizes the texts of a query into `candle.dataset`; see `docs/sql-reference.md`.
#[pg_extern(
    volatile,
    parallel_unsafe,
    requires = ["training_tables"],
    sql = r#"
CREATE PROCEDURE candle.tokenize_dataset(name text, model text, query text)
LANGUAGE c AS 'MODULE_PATHNAME', 'tokenize_dataset_wrapper';
COMMENT ON PROCEDURE candle.tokenize_dataset IS 'Tokenizes the texts of a query into candle.dataset';
"#
)]
fn tokenize_dataset(
    name: Option<String>,
    model: Option<String>,
    query: Option<String>,
    call: pg_sys::FunctionCallInfo,
) {
    refuse_read_only(c"candle.tokenize_dataset()");
    let tokenize = || -> Result<()> {
        let (name, model) = (given("name", name)?, given("model", model)?);
        let query = given("query", query)?;
        // SAFETY: what PostgreSQL called the procedure with.
        let procedure = unsafe { Procedure::enter(call)? };
        datasets::tokenize(&procedure, &name, &model, &query)
    };
    tokenize().or_report();
}

/// Tokenizes a dataset of one model for another; see `docs/sql-reference.md`.
#[pg_extern(
    volatile,
    parallel_unsafe,
    requires = ["training_tables"],
    sql = r#"
CREATE PROCEDURE candle.retokenize_dataset(name text, from_model text, to_model text)
LANGUAGE c AS 'MODULE_PATHNAME', 'retokenize_dataset_wrapper';
COMMENT ON PROCEDURE candle.retokenize_dataset IS
    'Tokenizes a dataset that was tokenized for one model for another, and reports what changed';
"#
)]
fn retokenize_dataset(
    name: Option<String>,
    from_model: Option<String>,
    to_model: Option<String>,
    call: pg_sys::FunctionCallInfo,
) {
    refuse_read_only(c"candle.retokenize_dataset()");
    let retokenize = || -> Result<()> {
        let name = given("name", name)?;
        let (from, to) = (given("from_model", from_model)?, given("to_model", to_model)?);
        // SAFETY: what PostgreSQL called the procedure with.
        let procedure = unsafe { Procedure::enter(call)? };
        datasets::retokenize(&procedure, &name, &from, &to)
    };
    retokenize().or_report();
}
