//! The call that evaluates: rows go out, each message when the one before it was answered.

use candle_compute_proto::v1::evaluate_request::Message;
use candle_compute_proto::v1::{
    EvaluateRequest, EvaluateResponse, EvaluatedRow, Evaluation, EvaluationFinish, EvaluationRows, EvaluationStart,
};
use pgrx::PgSqlErrorCode;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::rows::{Rows, Shape};
use crate::client::{Client, dropped_work, wait, write};
use crate::error::{Error, Result};
use crate::functions::default_client;
use crate::procedure::Procedure;
use crate::transaction;

/// What the caller of the SQL function gave; None where nothing or NULL.
pub(crate) struct Settings {
    pub(crate) model: String,
    pub(crate) query: String,
    pub(crate) adapter: String,
    pub(crate) tag: String,
    pub(crate) context_length: Option<i32>,
    pub(crate) stride: Option<i32>,
    pub(crate) start_token: bool,
    pub(crate) delimiter: Option<String>,
    pub(crate) generations: i32,
    pub(crate) max_tokens: Option<i32>,
}

/// Evaluates a model on the rows of a query. With `take` nothing is kept on the server, and `take` gets what was found for
/// every row.
///
/// # Errors
/// P0002 for a query without rows; those of the server.
pub(crate) fn evaluate(
    procedure: &Procedure,
    settings: &Settings,
    take: Option<&mut dyn FnMut(EvaluatedRow)>,
) -> Result<Evaluation> {
    let (client, _) = default_client()?;
    let mut rows = Rows::open(procedure, &settings.query)?;
    let start = EvaluationStart {
        transaction: match take {
            Some(_) => transaction::reading(client.session)?,
            None => Some(transaction::writing(&client)?),
        },
        model: settings.model.clone(),
        adapter: settings.adapter.clone(),
        choices: rows.shape == Shape::Question,
        tag: settings.tag.clone(),
        context_length: positive("context_length", settings.context_length)?,
        stride: positive("stride", settings.stride)?,
        start_token: settings.start_token,
        delimiter: settings.delimiter.clone(),
        generations: u32::try_from(settings.generations).map_err(|_| {
            Error::bad_value(format!(
                "generations must not be negative, but is {}",
                settings.generations
            ))
        })?,
        max_tokens: positive("max_tokens", settings.max_tokens)?,
        with_rows: take.is_some(),
        discard: take.is_some(),
    };
    let kept = !start.discard;
    let mut call = Call::start(client.clone(), start)?;
    let mut take = take;
    let mut count = 0;
    loop {
        let messages = procedure.round(|| rows.next())?;
        if messages.is_empty() {
            break;
        }
        for rows in messages {
            count += rows.len();
            let answer = call.ask(Message::Rows(EvaluationRows { rows }))?;
            if let Some(take) = take.as_mut() {
                answer.rows.into_iter().for_each(&mut **take);
            }
        }
    }
    if count == 0 {
        let code = PgSqlErrorCode::ERRCODE_NO_DATA_FOUND;
        return Err(Error::new(code, "the query gives no rows to evaluate on"));
    }
    let answer = call.ask(Message::Finish(EvaluationFinish {}))?;
    call.ended = true;
    if kept {
        transaction::wrote(client.session);
    }
    answer.evaluation.ok_or_else(|| Error::protocol("evaluation"))
}

fn positive(name: &str, value: Option<i32>) -> Result<Option<u32>> {
    let check = |value: i32| match u32::try_from(value) {
        Ok(value) if value > 0 => Ok(value),
        _ => Err(Error::bad_value(format!("{name} must be at least 1, but is {value}"))),
    };
    value.map(check).transpose()
}

/// An Evaluate call under way. Dropped before its end, it leaves nothing on the server.
struct Call {
    client: Client,
    sender: mpsc::Sender<EvaluateRequest>,
    answers: Streaming<EvaluateResponse>,
    ended: bool,
}

impl Call {
    fn start(client: Client, start: EvaluationStart) -> Result<Self> {
        let (sender, receiver) = mpsc::channel(1);
        // Never full: nothing was sent yet.
        let _ = sender.try_send(EvaluateRequest {
            message: Some(Message::Start(start)),
        });
        let answers = wait(write!(client, evaluations.evaluate(ReceiverStream::new(receiver))))?;
        Ok(Self {
            client,
            sender,
            answers,
            ended: false,
        })
    }

    /// Sends a message and waits for its answer.
    fn ask(&mut self, message: Message) -> Result<EvaluateResponse> {
        let message = EvaluateRequest { message: Some(message) };
        let answer = wait(async {
            // Where the call has ended, its status says why.
            let _ = self.sender.send(message).await;
            self.client.next(&mut self.answers).await
        })?;
        answer.ok_or_else(|| Error::protocol("answer"))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.ended {
            dropped_work();
        }
    }
}
