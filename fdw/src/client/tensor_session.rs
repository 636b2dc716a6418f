//! The session that holds this backend's tensors on a server: opened on first use, it lasts as long as the connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use candle_compute_proto::v1::HoldSessionRequest;
use pgrx::PgSqlErrorCode;
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use super::{Client, dropped_work, write};
use crate::error::{Error, Result};

/// The place of a session, shared by all clones of a client.
#[derive(Debug)]
pub(super) struct TensorSession {
    /// What the ids of the sessions begin with.
    prefix: String,
    opened: AtomicU64,
    held: Mutex<Option<Held>>,
}

#[derive(Debug)]
struct Held {
    id: String,
    /// Set when the stream that holds the session has ended.
    ended: Arc<AtomicBool>,
    /// Reads the stream; without it the session ends.
    reader: AbortHandle,
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.reader.is_finished() {
            self.reader.abort();
            dropped_work();
        }
    }
}

impl TensorSession {
    /// No session yet. `prefix` is unique over all clients.
    pub(super) fn new(prefix: String) -> Self {
        Self {
            prefix,
            opened: AtomicU64::new(0),
            held: Mutex::new(None),
        }
    }
}

impl Client {
    /// The id of the open session; opens it if need be.
    ///
    /// A session that has ended is told of once: its tensors are gone. Then a new one is opened.
    pub(crate) async fn tensor_session(&self) -> Result<String> {
        let mut held = self.tensor_session.held.lock().await;
        match held.take() {
            Some(present) if !present.ended.load(Ordering::Relaxed) => {
                return Ok(held.insert(present).id.clone());
            }
            Some(_) => {
                let code = PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_ESTABLISH_CONNECTION;
                let message = "the session on the compute server has ended, and with it its tensors and operations";
                return Err(Error::new(code, message)
                    .detail("The connection broke, or the server was restarted.")
                    .hint("Make the tensors again."));
            }
            None => {}
        }
        let number = self.tensor_session.opened.fetch_add(1, Ordering::Relaxed) + 1;
        let id = format!("{}-{number}", self.tensor_session.prefix);
        let request = HoldSessionRequest { session_id: id.clone() };
        let mut stream = write!(self, tensors.hold_session(request)).await?;
        if self.next(&mut stream).await?.is_none() {
            return Err(Error::protocol("session"));
        }
        let ended = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ended);
        // Dropping the stream would end the session.
        let reader = tokio::spawn(async move {
            while let Ok(Some(_)) = stream.message().await {}
            end.store(true, Ordering::Relaxed);
        });
        let reader = reader.abort_handle();
        Ok(held.insert(Held { id, ended, reader }).id.clone())
    }

    /// Hands on what a call that named the session answered. After an error with which the session ended, the next call
    /// opens another one.
    pub(crate) async fn in_tensor_session<T>(&self, answer: Result<T>) -> Result<T> {
        if answer.is_err() {
            // The stream's own task may not have run yet.
            tokio::task::yield_now().await;
            let mut held = self.tensor_session.held.lock().await;
            if held.as_ref().is_some_and(|held| held.ended.load(Ordering::Relaxed)) {
                *held = None;
            }
        }
        answer
    }
}
