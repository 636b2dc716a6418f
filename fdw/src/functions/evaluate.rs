//! `candle.evaluate` and `candle.evaluate_rows`.
#![allow(unsafe_code)]

use candle_compute_proto::v1::{EvaluatedRow, Evaluation};
use pgrx::datum::TimestampWithTimeZone;
use pgrx::heap_tuple::PgHeapTuple;
use pgrx::prelude::*;
use pgrx::{AllocatedByRust, IntoDatum, JsonB};

use super::refuse_read_only;
use crate::datasets::given;
use crate::error::{Error, OrReport, Result};
use crate::evaluation::{self, Settings};
use crate::procedure::Procedure;
use crate::values::Value;

extension_sql_file!("../../sql/evaluation.sql", name = "evaluation");

/// Generations that are timed unless the caller says how many.
const GENERATIONS: i32 = 8;

/// Evaluates a model on the rows of a query and keeps what was found; see `docs/evaluation.md`.
#[allow(clippy::too_many_arguments)] // SQL's named arguments
#[pg_extern(
    volatile,
    parallel_unsafe,
    requires = ["evaluation"],
    sql = r#"
CREATE FUNCTION candle.evaluate(
    model text,
    query text,
    adapter text DEFAULT NULL,
    tag text DEFAULT NULL,
    context_length integer DEFAULT NULL,
    stride integer DEFAULT NULL,
    start_token boolean DEFAULT false,
    delimiter text DEFAULT NULL,
    generations integer DEFAULT 8,
    max_tokens integer DEFAULT 16
) RETURNS candle.evaluation
VOLATILE PARALLEL UNSAFE
LANGUAGE c AS 'MODULE_PATHNAME', 'evaluate_wrapper';
COMMENT ON FUNCTION candle.evaluate IS
    'Evaluates a model on the texts or questions of a query, and keeps what was found in the table evaluations';
"#
)]
fn evaluate(
    model: Option<String>,
    query: Option<String>,
    adapter: Option<String>,
    tag: Option<String>,
    context_length: Option<i32>,
    stride: Option<i32>,
    start_token: Option<bool>,
    delimiter: Option<String>,
    generations: Option<i32>,
    max_tokens: Option<i32>,
    call: pg_sys::FunctionCallInfo,
) -> pgrx::composite_type!('static, "candle.evaluation") {
    refuse_read_only(c"candle.evaluate()");
    let evaluate = || -> Result<_> {
        let settings = Settings {
            model: given("model", model)?,
            query: given("query", query)?,
            adapter: adapter.unwrap_or_default(),
            tag: tag.unwrap_or_default(),
            context_length,
            stride,
            start_token: start_token.unwrap_or(false),
            delimiter,
            generations: generations.unwrap_or(GENERATIONS),
            max_tokens,
        };
        let found = {
            // SAFETY: what PostgreSQL called the function with.
            let procedure = unsafe { Procedure::enter(call)? };
            evaluation::evaluate(&procedure, &settings, None)?
        };
        row(found).map_err(|error| {
            let code = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
            Error::new(code, "cannot make a row of an evaluation").detail(error.to_string())
        })
    };
    evaluate().or_report()
}

type Tuple = PgHeapTuple<'static, AllocatedByRust>;

fn row(found: Evaluation) -> std::result::Result<Tuple, Box<dyn std::error::Error>> {
    let mut tuple = PgHeapTuple::new_composite_type("candle.evaluation")?;
    let mut set = Setter(&mut tuple);
    set.count("id", found.id)?;
    set.value("model", Some(found.model))?;
    set.value("adapter", some_text(found.adapter))?;
    set.count("step", found.step)?;
    set.value("kind", Some(found.kind))?;
    set.value("tag", some_text(found.tag))?;
    set.value("dataset_digest", Some(found.dataset_digest))?;
    set.count("rows", found.rows)?;
    set.count("tokens", found.tokens)?;
    set.count("bytes", found.bytes)?;
    set.value("loss", found.loss)?;
    set.value("perplexity", found.perplexity)?;
    set.value("bits_per_byte", found.bits_per_byte)?;
    set.value("next_token_accuracy", found.next_token_accuracy)?;
    set.value("accuracy", found.accuracy)?;
    set.value("accuracy_norm", found.accuracy_norm)?;
    set.value("tokens_per_second", Some(found.tokens_per_second))?;
    set.count("generations", found.generations)?;
    set.value("time_to_first_token_ms", found.time_to_first_token_ms)?;
    set.value("latency_p50_ms", found.latency_p50_ms)?;
    set.value("latency_p90_ms", found.latency_p90_ms)?;
    set.value("latency_p99_ms", found.latency_p99_ms)?;
    set.value("generation_tokens_per_second", found.generation_tokens_per_second)?;
    set.value("duration_ms", Some(found.duration_ms))?;
    set.value("settings", Some(JsonB(serde_json::from_str(&found.settings_json)?)))?;
    if let Value::Timestamp(time) = Value::time(found.created_at) {
        set.value("created_at", TimestampWithTimeZone::try_from(time).ok())?;
    }
    Ok(tuple)
}

struct Setter<'a>(&'a mut Tuple);

impl Setter<'_> {
    fn value<T: IntoDatum>(
        &mut self,
        name: &str,
        value: Option<T>,
    ) -> std::result::Result<(), Box<dyn std::error::Error>> {
        match value {
            Some(value) => Ok(self.0.set_by_name(name, value)?),
            None => Ok(()),
        }
    }

    fn count(&mut self, name: &str, count: u64) -> std::result::Result<(), Box<dyn std::error::Error>> {
        self.value(name, Some(self::count(count)))
    }
}

/// What [`evaluate`] finds for each row of the query, in its order; nothing is kept. See `docs/evaluation.md`.
#[allow(clippy::too_many_arguments)] // SQL's named arguments
// The columns are read off the type.
#[allow(clippy::type_complexity)]
#[pg_extern(
    volatile,
    parallel_unsafe,
    sql = r#"
CREATE FUNCTION candle.evaluate_rows(
    model text,
    query text,
    adapter text DEFAULT NULL,
    context_length integer DEFAULT NULL,
    stride integer DEFAULT NULL,
    start_token boolean DEFAULT false,
    delimiter text DEFAULT NULL
) RETURNS TABLE (
    row_number bigint,
    tokens bigint,
    bytes bigint,
    loss double precision,
    correct_tokens bigint,
    log_likelihoods double precision[],
    choice integer,
    choice_norm integer
)
VOLATILE PARALLEL UNSAFE ROWS 1000 COST 100000
LANGUAGE c AS 'MODULE_PATHNAME', 'evaluate_rows_wrapper';
COMMENT ON FUNCTION candle.evaluate_rows IS
    'What candle.evaluate finds for each row of the query, in its order; nothing is kept';
"#
)]
fn evaluate_rows(
    model: Option<String>,
    query: Option<String>,
    adapter: Option<String>,
    context_length: Option<i32>,
    stride: Option<i32>,
    start_token: Option<bool>,
    delimiter: Option<String>,
    call: pg_sys::FunctionCallInfo,
) -> TableIterator<
    'static,
    (
        name!(row_number, i64),
        name!(tokens, i64),
        name!(bytes, i64),
        name!(loss, Option<f64>),
        name!(correct_tokens, Option<i64>),
        name!(log_likelihoods, Option<Vec<f64>>),
        name!(choice, Option<i32>),
        name!(choice_norm, Option<i32>),
    ),
> {
    let evaluate = || -> Result<Vec<EvaluatedRow>> {
        let settings = Settings {
            model: given("model", model)?,
            query: given("query", query)?,
            adapter: adapter.unwrap_or_default(),
            tag: String::new(),
            context_length,
            stride,
            start_token: start_token.unwrap_or(false),
            delimiter,
            generations: 0,
            max_tokens: None,
        };
        // SAFETY: what PostgreSQL called the function with.
        let procedure = unsafe { Procedure::enter(call)? };
        let mut found = Vec::new();
        evaluation::evaluate(&procedure, &settings, Some(&mut |row| found.push(row)))?;
        Ok(found)
    };
    let rows = (1..).zip(evaluate().or_report());
    TableIterator::new(rows.map(|(number, row)| {
        let is_question = row.choice.is_some();
        (
            number,
            count(row.tokens),
            count(row.bytes),
            row.loss,
            (!is_question).then(|| count(row.correct_tokens)),
            is_question.then_some(row.log_likelihoods),
            row.choice.map(|choice| choice as i32),
            row.choice_norm.map(|choice| choice as i32),
        )
    }))
}

fn some_text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
