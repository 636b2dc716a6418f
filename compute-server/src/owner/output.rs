//! The client's end of a stream from a model's thread.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::{Notify, mpsc};
use tokio_stream::Stream;
use tonic::Status;

use super::ModelHandle;
use crate::error::Error;
use crate::requests::ActiveRequest;

/// Messages that may lie ready for a client that is slow to read them.
const CAPACITY: usize = 32;

/// What a message of the thread is for the client.
pub(crate) enum Step<T> {
    /// A message; more follow.
    Next(T),
    /// The last message.
    Last(T),
    /// The end, without a message.
    End,
}

/// Passes messages on, and wakes the thread for each one that was read, since it may have stopped for want of room.
/// A thread that goes away before the end is an error of the stream.
pub(crate) struct OutputStream<M, T> {
    receiver: mpsc::Receiver<Result<M, Error>>,
    map: Box<dyn FnMut(M) -> Step<T> + Send>,
    handle: ModelHandle,
    wake: Arc<Notify>,
    ended: bool,
}

impl<M, T> OutputStream<M, T> {
    /// A channel from the thread of `handle`.
    pub(crate) fn channel(
        handle: &ModelHandle,
        map: impl FnMut(M) -> Step<T> + Send + 'static,
    ) -> (mpsc::Sender<Result<M, Error>>, Self) {
        let (sender, receiver) = mpsc::channel(CAPACITY + 1);
        let wake = Arc::clone(&handle.facts().wake);
        (
            sender,
            Self {
                receiver,
                map: Box::new(map),
                handle: handle.clone(),
                wake,
                ended: false,
            },
        )
    }

    /// The next message, with an error that has not been translated yet.
    pub(crate) fn poll_message(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<T, Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let Poll::Ready(message) = self.receiver.poll_recv(context) else {
            return Poll::Pending;
        };
        self.wake.notify_one();
        let step = match message {
            Some(Ok(message)) => (self.map)(message),
            Some(Err(error)) => {
                self.ended = true;
                return Poll::Ready(Some(Err(error)));
            }
            None => {
                self.ended = true;
                return Poll::Ready(Some(Err(self.handle.facts().gone())));
            }
        };
        match step {
            Step::Next(message) => Poll::Ready(Some(Ok(message))),
            Step::Last(message) => {
                self.ended = true;
                Poll::Ready(Some(Ok(message)))
            }
            Step::End => {
                self.ended = true;
                Poll::Ready(None)
            }
        }
    }
}

impl<M, T> Stream for OutputStream<M, T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_message(context).map_err(Status::from)
    }
}

impl<M, T> Drop for OutputStream<M, T> {
    fn drop(&mut self) {
        // The thread looks for closed channels when it is woken.
        self.receiver.close();
        self.wake.notify_one();
    }
}

/// Keeps a place behind everything that a slow client has not read yet, for the error that tells it that the work was
/// given up.
pub(crate) fn keep_place<M: Send + 'static>(request: &ActiveRequest, output: &mpsc::Sender<Result<M, Error>>) {
    // The channel is new and empty.
    if let Ok(place) = output.clone().try_reserve_owned() {
        request.on_give_up(move |error| drop(place.send(Err(error))));
    }
}
