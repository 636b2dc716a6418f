//! Work driven from here, listed among the server's requests, and stopped when somebody deletes it there.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_compute_proto::v1::TrackRequestRequest;
use pgrx::PgSqlErrorCode;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::client::{Client, dropped_work, spawn, wait};
use crate::error::{Error, Result};

/// Progress that may wait to be sent; what is told while that many wait is not sent, since it will soon be old.
const WAITING: usize = 8;

/// Work that is listed until this is dropped.
pub(crate) struct Progress {
    sender: mpsc::Sender<TrackRequestRequest>,
    cancelled: Arc<Cancelled>,
    task: JoinHandle<()>,
    total: u64,
}

#[derive(Default)]
struct Cancelled {
    yes: AtomicBool,
    wake: Notify,
}

impl Progress {
    /// Lists work of a kind that the protocol knows.
    pub(crate) fn begin(client: &Client, kind: &str, model: &str, done: u64, total: u64) -> Result<Self> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let first = TrackRequestRequest {
            kind: kind.to_string(),
            model: model.to_string(),
            phase: "running".to_string(),
            done,
            total,
        };
        // Never full: nothing was sent yet.
        let _ = sender.try_send(first);
        let cancelled = Arc::new(Cancelled::default());
        let task = spawn(follow(client.clone(), receiver, Arc::clone(&cancelled)))?;
        Ok(Self {
            sender,
            cancelled,
            task,
            total,
        })
    }

    /// Tells what is being done and how far it has come.
    pub(crate) fn tell(&self, phase: &str, done: u64) {
        let _ = self.sender.try_send(TrackRequestRequest {
            phase: phase.to_string(),
            done,
            total: self.total,
            ..TrackRequestRequest::default()
        });
    }

    /// As [`wait`]; ends with 57014 when the work is cancelled on the server.
    pub(crate) fn wait<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        wait(async {
            tokio::select! {
                biased;
                () = self.cancelled.told() => {
                    dropped_work();
                    let code = PgSqlErrorCode::ERRCODE_QUERY_CANCELED;
                    Err(Error::new(code, "cancelled by a DELETE from requests"))
                }
                output = future => output,
            }
        })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.task.abort();
        dropped_work();
    }
}

impl Cancelled {
    async fn told(&self) {
        while !self.yes.load(Ordering::Relaxed) {
            self.wake.notified().await;
        }
    }
}

/// Keeps the work listed. Where the server cannot list it, or the connection breaks, the work's own calls tell.
async fn follow(client: Client, receiver: mpsc::Receiver<TrackRequestRequest>, cancelled: Arc<Cancelled>) {
    let request = client.request(ReceiverStream::new(receiver));
    let Ok(answer) = client.telemetry().track_request(request).await else {
        return;
    };
    let mut messages = answer.into_inner();
    while let Ok(Some(message)) = messages.message().await {
        if message.cancelled {
            cancelled.yes.store(true, Ordering::Relaxed);
            cancelled.wake.notify_one();
        }
    }
}
