//! Which connections are let in. One that has not shown a valid token yet is on probation: it ends after a while, and
//! earlier when others need its place, so that half-open connections keep nobody out.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;

use crate::transactions::Connection;

/// The open connections of the server.
#[derive(Debug)]
pub(crate) struct Connections {
    limit: usize,
    patience: Duration,
    state: Mutex<State>,
    closed: mpsc::UnboundedSender<Connection>,
}

#[derive(Debug, Default)]
struct State {
    last: Connection,
    open: usize,
    /// Those on probation, the oldest first. Sending ends the connection, dropping ends the probation.
    waiting: BTreeMap<Connection, oneshot::Sender<()>>,
    /// Whether it was told that connections are refused.
    told: bool,
}

/// A connection's place among those that may be open.
#[derive(Debug)]
pub(crate) struct Link {
    /// The connection's number.
    pub(crate) id: Connection,
    connections: Arc<Connections>,
    established: AtomicBool,
}

/// What ends a connection that asks for nothing.
pub(crate) struct Probation {
    ended: oneshot::Receiver<()>,
    deadline: Pin<Box<Sleep>>,
}

/// How a probation goes on.
pub(super) enum Verdict {
    /// It is not over.
    Pending,
    /// The connection may stay.
    Established,
    /// The connection took too long, or others need its place.
    Refused,
}

impl Connections {
    /// At most `limit` connections; those that show no token within `patience` are closed. The numbers of those that end
    /// go to `closed`.
    pub(crate) fn new(limit: usize, patience: Duration, closed: mpsc::UnboundedSender<Connection>) -> Arc<Self> {
        Arc::new(Self {
            limit,
            patience,
            state: Mutex::default(),
            closed,
        })
    }

    /// Lets a connection in, at the cost of the one that has been on probation the longest where there are too many; none
    /// when every place is taken by a connection that asked for something.
    pub(crate) fn admit(self: &Arc<Self>) -> Option<(Arc<Link>, Probation)> {
        let mut state = self.lock();
        if state.open >= self.limit && !state.close_oldest() {
            if !std::mem::replace(&mut state.told, true) {
                tracing::warn!(
                    limit = self.limit,
                    "connections are refused: there are as many as --max-connections allows"
                );
            }
            return None;
        }
        state.last += 1;
        state.open += 1;
        let (sender, ended) = oneshot::channel();
        let id = state.last;
        state.waiting.insert(id, sender);
        let link = Link {
            id,
            connections: Arc::clone(self),
            established: AtomicBool::new(false),
        };
        let probation = Probation {
            ended,
            deadline: Box::pin(tokio::time::sleep(self.patience)),
        };
        Some((Arc::new(link), probation))
    }

    /// Ends the connection that has been on probation the longest; false when there is none.
    pub(super) fn close_oldest(&self) -> bool {
        self.lock().close_oldest()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn close_oldest(&mut self) -> bool {
        // One that has just ended by itself has given its place up as well.
        self.waiting
            .pop_first()
            .map(|(_, connection)| connection.send(()))
            .is_some()
    }
}

impl Link {
    /// The connection showed a valid token, or needs none: it may stay.
    pub(crate) fn establish(&self) {
        if !self.established.swap(true, Ordering::Relaxed) {
            self.connections.lock().waiting.remove(&self.id);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut state = self.connections.lock();
        state.waiting.remove(&self.id);
        state.open -= 1;
        state.told = false;
        drop(state);
        // At the end of the server nobody listens any more.
        let _ = self.connections.closed.send(self.id);
    }
}

impl Probation {
    /// Looks how it goes on.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Verdict {
        match Pin::new(&mut self.ended).poll(context) {
            Poll::Ready(Ok(())) => return Verdict::Refused,
            Poll::Ready(Err(_)) => return Verdict::Established,
            Poll::Pending => {}
        }
        match self.deadline.as_mut().poll(context) {
            Poll::Ready(()) => Verdict::Refused,
            Poll::Pending => Verdict::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    async fn verdict(probation: &mut Probation) -> bool {
        std::future::poll_fn(|context| match probation.poll(context) {
            Verdict::Pending => Poll::Pending,
            Verdict::Established => Poll::Ready(true),
            Verdict::Refused => Poll::Ready(false),
        })
        .await
    }

    #[tokio::test]
    async fn the_oldest_on_probation_gives_way_and_the_established_stay() {
        let (closed, mut closings) = mpsc::unbounded_channel();
        let connections = Connections::new(2, LONG, closed);
        let (first, mut of_first) = connections.admit().unwrap();
        let (second, mut of_second) = connections.admit().unwrap();
        first.establish();
        assert!(verdict(&mut of_first).await);
        let (third, mut of_third) = connections.admit().unwrap();
        assert!(!verdict(&mut of_second).await);
        drop((second, of_second));
        assert_eq!(closings.recv().await, Some(2));
        third.establish();
        assert!(verdict(&mut of_third).await);
        assert!(connections.admit().is_none());
        drop(first);
        assert!(connections.admit().is_some());
    }

    #[tokio::test]
    async fn a_probation_ends_by_itself() {
        let (closed, _closings) = mpsc::unbounded_channel();
        let connections = Connections::new(2, Duration::from_millis(1), closed);
        let (_link, mut probation) = connections.admit().unwrap();
        assert!(!verdict(&mut probation).await);
    }
}
