//! `candle.train`, and the tables that it and the datasets keep.
#![allow(unsafe_code)]

use pgrx::prelude::*;

use super::refuse_read_only;
use crate::error::{OrReport, Result};
use crate::procedure::Procedure;
use crate::training::{self, Arguments};

extension_sql_file!("../../sql/training_tables.sql", name = "training_tables");

/// Trains a model on the documents of a query; see `docs/sql-reference.md`.
#[allow(clippy::too_many_arguments)] // SQL's named arguments
#[pg_extern(
    volatile,
    parallel_unsafe,
    sql = r#"
CREATE PROCEDURE candle.train(
    model text,
    query text,
    steps integer,
    batch_size integer DEFAULT 8,
    sequence_length integer DEFAULT NULL,
    learning_rate double precision DEFAULT NULL,
    schedule text DEFAULT NULL,
    warmup integer DEFAULT NULL,
    eval_query text DEFAULT NULL,
    eval_every integer DEFAULT NULL,
    checkpoint_every integer DEFAULT NULL,
    seed bigint DEFAULT 0,
    workers text[] DEFAULT NULL,
    packing text DEFAULT 'documents',
    min_learning_rate double precision DEFAULT NULL,
    restart boolean DEFAULT false,
    adapter text DEFAULT NULL
)
LANGUAGE c AS 'MODULE_PATHNAME', 'train_wrapper';
COMMENT ON PROCEDURE candle.train IS
    'Trains a model on the documents of a query, one optimizer step after the other; goes on where it stopped';
"#
)]
fn train(
    model: Option<String>,
    query: Option<String>,
    steps: Option<i32>,
    batch_size: Option<i32>,
    sequence_length: Option<i32>,
    learning_rate: Option<f64>,
    schedule: Option<String>,
    warmup: Option<i32>,
    eval_query: Option<String>,
    eval_every: Option<i32>,
    checkpoint_every: Option<i32>,
    seed: Option<i64>,
    workers: Option<Vec<Option<String>>>,
    packing: Option<String>,
    min_learning_rate: Option<f64>,
    restart: Option<bool>,
    adapter: Option<String>,
    call: pg_sys::FunctionCallInfo,
) {
    refuse_read_only(c"candle.train()");
    let arguments = Arguments {
        model,
        query,
        steps,
        batch_size,
        sequence_length,
        learning_rate,
        schedule,
        warmup,
        min_learning_rate,
        eval_query,
        eval_every,
        checkpoint_every,
        seed,
        workers,
        packing,
        restart,
        adapter,
    };
    let train = || -> Result<()> {
        // SAFETY: what PostgreSQL called the procedure with.
        let procedure = unsafe { Procedure::enter(call)? };
        training::train(&procedure, arguments)
    };
    train().or_report();
}
