//! The generations behind one request: several prompts, several completions of each.

use std::sync::Arc;
use std::task::{Context, Poll};

use candle_compute_proto::v1;
use tokio::task::JoinSet;

use super::error::ApiError;
use crate::access::Caller;
use crate::app::App;
use crate::error::Error;
use crate::services::generate::{self, GenerateStream};

/// A message of a choice, by the choice's index.
pub(super) type Message = (usize, Result<v1::GenerateResponse, Error>);

/// Running generations, one for each prompt. Dropping them ends them at the next token.
pub(super) struct Choices {
    streams: Vec<Option<GenerateStream>>,
    /// Completions of each prompt. Choices are numbered prompt by prompt.
    n: usize,
    /// The prompt to look at first, so that none waits for the others.
    next: usize,
}

impl Choices {
    /// Queues all generations at once, so that they run in one batch.
    ///
    /// # Errors
    /// That of any of them; none goes on then.
    pub(super) async fn start(
        app: &Arc<App>,
        caller: &Caller,
        requests: Vec<v1::GenerateRequest>,
        n: usize,
    ) -> Result<Self, ApiError> {
        let mut streams: Vec<Option<GenerateStream>> = requests.iter().map(|_| None).collect();
        let mut starting = JoinSet::new();
        for (index, request) in requests.into_iter().enumerate() {
            let (app, caller) = (Arc::clone(app), caller.clone());
            starting.spawn(async move { (index, generate::start(&app, caller, request).await) });
        }
        while let Some(started) = starting.join_next().await {
            let (index, stream) = started.map_err(|error| Error::Internal(error.to_string()))?;
            streams[index] = Some(stream?);
        }
        Ok(Self { streams, n, next: 0 })
    }

    /// How many choices there are.
    pub(super) fn len(&self) -> usize {
        self.streams.len() * self.n
    }

    /// Ends all that still run.
    pub(super) fn stop(&mut self) {
        self.streams.iter_mut().for_each(|stream| *stream = None);
    }

    /// The next message of any of them; none when all have ended.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Message>> {
        let count = self.streams.len();
        let mut running = false;
        for prompt in (self.next..count).chain(0..self.next) {
            let Some(stream) = &mut self.streams[prompt] else {
                continue;
            };
            match stream.poll_message(context) {
                Poll::Ready(Some(message)) => {
                    self.next = (prompt + 1) % count;
                    let choice = message.as_ref().map_or(0, choice_of).min(self.n - 1);
                    return Poll::Ready(Some((prompt * self.n + choice, message)));
                }
                Poll::Ready(None) => self.streams[prompt] = None,
                Poll::Pending => running = true,
            }
        }
        if running { Poll::Pending } else { Poll::Ready(None) }
    }

    /// As [`poll_next`](Self::poll_next).
    pub(super) async fn next(&mut self) -> Option<Message> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }
}

/// Which completion of its prompt a message belongs to.
fn choice_of(message: &v1::GenerateResponse) -> usize {
    let of_token = message.token.as_ref().map(|token| token.choice);
    let of_summary = message.summary.as_ref().map(|summary| summary.choice);
    of_token.or(of_summary).unwrap_or(0) as usize
}
