//! `candle.train_tokenizer`.
#![allow(unsafe_code)]

use candle_compute_proto::v1::{TrainTokenizerRequest, TrainTokenizerResponse};
use pgrx::prelude::*;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::refuse_read_only;
use super::server::client;
use crate::client::{Client, dropped_work, spawn, wait, write};
use crate::error::{Error, OrReport, Result};
use crate::transaction;

/// Texts of one message to the server.
const TEXTS_PER_MESSAGE: i64 = 500;

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
        let client = client()?;
        let transaction = transaction::writing(&client)?;
        let mut upload = Upload::start(client.clone())?;
        // The first message carries the name, so that a query without texts fails on the server with its own error.
        let first = TrainTokenizerRequest {
            transaction: Some(transaction),
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
        let made = upload.finish()?;
        transaction::wrote(client.session);
        Ok(made)
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
    fn start(client: Client) -> Result<Self> {
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
