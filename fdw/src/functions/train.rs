//! `candle.train`, and the tables that it and the datasets keep.
#![allow(unsafe_code)]

use pgrx::prelude::*;

use super::refuse_read_only;
use crate::error::{OrReport, Result};
use crate::procedure::Procedure;
use crate::training::{self, Arguments};

extension_sql_file!("../../sql/training_tables.sql", name = "training_tables");

<<<<<<< HEAD
/// Longest sequence of a model, in tokens.
#[pg_extern(volatile, parallel_unsafe)]
fn context_length(model: &str) -> i32 {
    let look_up = || -> Result<i32> {
        let client = client()?;
        let request = ListModelsRequest {
            transaction: transaction::reading(client.session)?,
            names: vec![model.to_string()],
        };
        let models = wait(read!(client, models.list_models(request)))?.models;
        let found = models.into_iter().find(|found| found.name == model).ok_or_else(|| {
            Error::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                format!("there is no model \"{model}\""),
            )
        })?;
        Ok(i32::try_from(found.context_length).unwrap_or(i32::MAX))
    };
    look_up().or_report()
}

/// Whether the procedure that calls this may COMMIT: not inside BEGIN … COMMIT, and not beneath a function.
#[pg_extern(volatile, parallel_unsafe)]
fn can_commit() -> bool {
    // SAFETY: reads a variable of the backend.
    unsafe { pg_sys::SPI_inside_nonatomic_context() }
}

/// Cuts `tokens` into sequences of `sequence_length`, accumulates them and takes one optimizer step: one row with the
/// step's number and its loss.
#[pg_extern(volatile, parallel_unsafe)]
fn train_step(
    model: Option<&str>,
    tokens: Option<Vec<Option<i32>>>,
    sequence_length: Option<i32>,
    learning_rate: default!(Option<f64>, "NULL"),
) -> TableIterator<'static, (name!(step, i64), name!(loss, f64))> {
    refuse_read_only(c"candle.train_step()");
    let step = || -> Result<(i64, f64)> {
        let (Some(model), Some(tokens), Some(length)) = (model, tokens, sequence_length) else {
            return Err(Error::bad_value("model, tokens and sequence_length must not be NULL"));
        };
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length > 0)
            .ok_or_else(|| Error::bad_value(format!("sequence_length must be at least 1, not {length}")))?;
        let tokens: Option<Vec<i64>> = tokens.into_iter().map(|token| token.map(i64::from)).collect();
        let tokens = tokens.ok_or_else(|| Error::bad_value("tokens must not contain NULL"))?;
        let client = client()?;
        let context = transaction::writing(&client)?;
        let batch = AccumulateBatchesRequest {
            transaction: Some(context.clone()),
            model: model.to_string(),
            sequences: tokens.chunks(length).map(sequence).collect(),
            adapter: String::new(),
        };
        wait(write!(client, training.accumulate_batches(batch)))?;
        let request = StepRequest {
            transaction: Some(context),
            model: model.to_string(),
            options: Some(AdamWOptions {
                learning_rate,
                ..AdamWOptions::default()
            }),
            adapter: String::new(),
        };
        let taken = wait(write!(client, training.step(request)))?
            .step
            .ok_or_else(|| Error::protocol("step"))?;
        transaction::wrote(client.session);
        Ok((i64::try_from(taken.step).unwrap_or(i64::MAX), taken.loss))
    };
    TableIterator::once(step().or_report())
}

/// Raises an error in a read-only transaction.
fn refuse_read_only(command: &std::ffi::CStr) {
    // SAFETY: reads a variable of the backend and the NUL-terminated name.
    unsafe { pg_sys::PreventCommandIfReadOnly(command.as_ptr()) };
}

fn sequence(tokens: &[i64]) -> Sequence {
    Sequence {
        token_ids: tokens.to_vec(),
        ..Sequence::default()
    }
}

/// Streams the first column of a query to the server, which learns a byte-level BPE tokenizer from it.
=======
/// Trains a model on the documents of a query; see `docs/sql-reference.md`.
#[allow(clippy::too_many_arguments)] // SQL's named arguments
>>>>>>> 5da65f1 (Train from SQL in runs that go on where they stopped, over several servers, on packed documents and tokenized datasets)
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
    restart boolean DEFAULT false
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
    };
    let train = || -> Result<()> {
        // SAFETY: what PostgreSQL called the procedure with.
        let procedure = unsafe { Procedure::enter(call)? };
        training::train(&procedure, arguments)
    };
    train().or_report();
}
