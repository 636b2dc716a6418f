//! `candle.train` and `candle.train_tokenizer`, and the steps that they are made of.
#![allow(unsafe_code)]

use candle_compute_proto::v1::{
    AccumulateBatchesRequest, AdamWOptions, ListModelsRequest, Sequence, StepRequest, TrainTokenizerRequest,
    TrainTokenizerResponse,
};
use pgrx::prelude::*;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::server::client;
use crate::client::{dropped_work, read, spawn, wait, write};
use crate::error::{Error, OrReport, Result};
use crate::transaction;

/// Texts of one message to the server.
const TEXTS_PER_MESSAGE: i64 = 500;

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
#[pg_extern(
    volatile,
    parallel_unsafe,
    sql = r#"
CREATE PROCEDURE candle.train_tokenizer(name text, query text, vocabulary_size integer)
LANGUAGE c AS 'MODULE_PATHNAME', 'train_tokenizer_wrapper';
COMMENT ON PROCEDURE candle.train_tokenizer IS 'Trains a BPE tokenizer on the first column of a query';
"#
)]
fn train_tokenizer(name: Option<&str>, query: Option<&str>, vocabulary_size: Option<i32>) {
    refuse_read_only(c"candle.train_tokenizer()");
    let train = || -> Result<TrainTokenizerResponse> {
        let (Some(name), Some(query), Some(size)) = (name, query, vocabulary_size) else {
            return Err(Error::bad_value("name, query and vocabulary_size must not be NULL"));
        };
        let vocabulary_size = u32::try_from(size)
            .map_err(|_| Error::bad_value(format!("vocabulary_size must be at least 257, not {size}")))?;
        let mut upload = Upload::start()?;
        // The first message carries the name, so that a query without texts fails on the server with its own error.
        let first = TrainTokenizerRequest {
            name: name.to_string(),
            vocabulary_size,
            texts: Vec::new(),
        };
        let mut open = upload.send(first)?;
        Spi::connect(|spi| {
            let query = format!(
                "SELECT t.body::text FROM ({}\n) AS t(body)",
                query.trim().trim_end_matches(';')
            );
            let mut cursor = spi.open_cursor(query.as_str(), &[]);
            while open {
                let rows = cursor.fetch(TEXTS_PER_MESSAGE).map_err(|error| failed(&error))?;
                if rows.is_empty() {
                    break;
                }
                let mut texts = Vec::with_capacity(rows.len());
                for row in rows {
                    texts.extend(row.get::<String>(1).map_err(|error| failed(&error))?);
                }
                open = upload.send(TrainTokenizerRequest {
                    texts,
                    ..TrainTokenizerRequest::default()
                })?;
            }
            Ok::<(), Error>(())
        })?;
        upload.finish()
    };
    let made = train().or_report();
    notice!(
        "trained a tokenizer of {} tokens on {} texts",
        made.vocabulary_size,
        made.texts
    );
}

fn failed(error: &pgrx::spi::Error) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, "cannot read the texts").detail(error.to_string())
}

/// A TrainTokenizer call under way.
struct Upload {
    sender: Option<mpsc::Sender<TrainTokenizerRequest>>,
    task: JoinHandle<Result<TrainTokenizerResponse>>,
}

impl Upload {
    fn start() -> Result<Self> {
        let client = client()?;
        let (sender, receiver) = mpsc::channel(4);
        let task = spawn(async move { write!(client, models.train_tokenizer(ReceiverStream::new(receiver))).await })?;
        Ok(Self {
            sender: Some(sender),
            task,
        })
    }

    /// Sends a message. False when the call has ended already.
    fn send(&mut self, message: TrainTokenizerRequest) -> Result<bool> {
        let Some(sender) = &self.sender else { return Ok(false) };
        wait(async { Ok(sender.send(message).await.is_ok()) })
    }

    fn finish(mut self) -> Result<TrainTokenizerResponse> {
        self.sender = None;
        let outcome = wait(async { Ok((&mut self.task).await) })?;
        outcome.unwrap_or_else(|_| Err(Error::protocol("answer")))
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.task.is_finished() {
            self.task.abort();
            dropped_work();
            // Were the stream to end, the server would take what it has for the whole and train on it.
            std::mem::forget(self.sender.take());
        }
    }
}

extension_sql_file!(
    "../../sql/train.sql",
    name = "train",
    requires = [train_step, context_length, can_commit]
);
