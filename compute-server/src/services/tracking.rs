//! Work that a client drives by calls of its own: listed, and cancelled, like the server's own.

use std::sync::Arc;

use candle_compute_proto::v1;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::access::Caller;
use crate::error::{Error, Result};
use crate::names;
use crate::requests::{Phase, RequestGuard, Requests};

/// Kinds of work that clients drive.
const KINDS: [&str; 2] = ["train", "tokenize"];

/// Phases that they may tell.
const PHASES: [Phase; 4] = [Phase::Queued, Phase::Running, Phase::Evaluating, Phase::Saving];

/// Client-driven work, listed until it is dropped.
pub(super) struct Tracked {
    request: RequestGuard,
    cancelled: Arc<Notify>,
}

impl Tracked {
    /// Lists the work that the first message of a stream tells of.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown kind or phase.
    pub(super) fn begin(requests: &Arc<Requests>, caller: &Caller, first: &v1::TrackRequestRequest) -> Result<Self> {
        let kind = KINDS.iter().find(|kind| **kind == first.kind).ok_or_else(|| {
            let shown: String = first.kind.chars().take(40).collect();
            Error::invalid(format!("kind is {shown:?}; it must be one of {}", KINDS.join(", ")))
        })?;
        names::validate("model", &first.model)?;
        let tracked = Self {
            request: requests.begin_tracking(caller, kind, &first.model),
            cancelled: Arc::default(),
        };
        tracked.request.wake_on_cancel(Arc::clone(&tracked.cancelled));
        tracked.note(first)?;
        Ok(tracked)
    }

    fn note(&self, message: &v1::TrackRequestRequest) -> Result<()> {
        let phase = PHASES.iter().find(|phase| phase.as_str() == message.phase);
        let phase = phase.ok_or_else(|| {
            let shown: String = message.phase.chars().take(40).collect();
            let names = PHASES.map(Phase::as_str).join(", ");
            Error::invalid(format!("phase is {shown:?}; it must be one of {names}"))
        })?;
        self.request.set_phase(*phase);
        self.request.set_progress(message.done, message.total);
        Ok(())
    }

    /// Takes what the client tells until it ends the stream or goes away, and tells it when the work is cancelled.
    pub(super) fn follow(
        self,
        mut messages: Streaming<v1::TrackRequestRequest>,
    ) -> ReceiverStream<Result<v1::TrackRequestResponse, Status>> {
        // Two messages are all that is ever sent.
        let (sender, receiver) = mpsc::channel(2);
        tokio::spawn(async move {
            let tell = |cancelled| {
                let id = self.request.id();
                let _ = sender.try_send(Ok(v1::TrackRequestResponse { id, cancelled }));
            };
            tell(false);
            let mut told = false;
            loop {
                tokio::select! {
                    () = self.cancelled.notified(), if !told => {
                        told = true;
                        tell(true);
                    }
                    message = messages.message() => match message {
                        Ok(Some(message)) => if let Err(error) = self.note(&message) {
                            let _ = sender.send(Err(error.into())).await;
                            return;
                        },
                        Ok(None) | Err(_) => return,
                    },
                    () = sender.closed() => return,
                }
            }
        });
        ReceiverStream::new(receiver)
    }
}
