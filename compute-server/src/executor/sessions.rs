//! What the service calls: sessions, and what they see.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::IntCounterVec;
use tokio::sync::{Notify, watch};

use super::operation::StoredOperation;
use super::queue::Queues;
use super::state::{Session, SessionKey, State};
use super::tensor::StoredTensor;
use crate::access::Caller;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::names;
use crate::requests::Requests;

/// The executor.
pub(crate) struct Executor {
    state: Mutex<State>,
    pub(super) queues: Arc<Queues>,
    pub(super) requests: Arc<Requests>,
    /// Woken when the request of an operation is cancelled.
    pub(super) cancelled: Arc<Notify>,
    /// Operations that have ended, by kind and outcome.
    pub(super) counter: IntCounterVec,
    /// Where tensors are that do not say.
    pub(super) default_device: String,
    /// Operations of a session that may wait.
    pub(crate) queue_limit: usize,
    session_limit: usize,
}

/// Ends its session when it is dropped.
pub(crate) struct HeldSession {
    executor: Arc<Executor>,
    key: SessionKey,
    /// Becomes true when the server ends the session.
    pub(crate) ended: watch::Receiver<bool>,
}

impl Drop for HeldSession {
    fn drop(&mut self) {
        self.executor.end_session(&self.key);
    }
}

impl Executor {
    /// An executor without sessions, which lists its work among `requests` and counts it in `counter`.
    pub(crate) fn new(config: &Config, requests: Arc<Requests>, counter: IntCounterVec) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            queues: Arc::default(),
            requests,
            cancelled: Arc::default(),
            counter,
            default_device: config.device.clone(),
            queue_limit: config.limits.queue,
            session_limit: config.limits.connections,
        })
    }

    /// Ends operations whose requests are cancelled while they wait. Never returns.
    pub(crate) async fn watch_cancelled(self: Arc<Self>) {
        loop {
            self.cancelled.notified().await;
            self.queues.drop_cancelled();
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has workers look for what is due.
    pub(super) fn wake(&self) {
        self.queues.wake();
    }

    pub(super) fn key(&self, caller: &Caller, session: &str) -> SessionKey {
        SessionKey {
            tenant: Arc::clone(caller.name()),
            id: session.into(),
        }
    }

    /// Opens a session.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that cannot be one, `NameTaken`, `Limit`.
    pub(crate) fn open(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<HeldSession> {
        names::validate("session", id)?;
        let key = self.key(caller, id);
        let mut state = self.lock();
        if state.sessions.contains_key(&key) {
            return Err(Error::NameTaken {
                kind: "session",
                name: id.to_owned(),
            });
        }
        let open = state.sessions.len();
        if open >= self.session_limit {
            return Err(Error::Limit {
                what: format!("a further session beside {open}"),
                limit: self.session_limit as u64,
                flag: "max-connections",
            });
        }
        let session = Session::new();
        let ended = session.ended.subscribe();
        state.sessions.insert(key.clone(), session);
        Ok(HeldSession {
            executor: Arc::clone(self),
            key,
            ended,
        })
    }

    /// Ends all sessions.
    pub(crate) fn end_sessions(&self) {
        for session in self.lock().sessions.values() {
            session.ended.send_replace(true);
        }
    }

    /// Whether a session has a transaction open.
    pub(crate) fn has_transactions(&self) -> bool {
        self.lock()
            .sessions
            .values()
            .any(|session| session.transaction.is_some())
    }

    /// Sessions, and tensors of all of them with the persistent ones.
    pub(crate) fn counts(&self) -> [usize; 2] {
        let state = self.lock();
        let own: usize = state.sessions.values().map(|session| session.tensors.len()).sum();
        let persistent: usize = state.persistent.values().map(|tensors| tensors.len()).sum();
        [state.sessions.len(), own + persistent]
    }

    /// The tensors called `names` that the session sees, all where there are none, by name.
    ///
    /// # Errors
    /// `SessionEnded`.
    pub(crate) fn tensors(&self, caller: &Caller, session: &str, names: &[String]) -> Result<Vec<Arc<StoredTensor>>> {
        let key = self.key(caller, session);
        let mut state = self.lock();
        state.session(&key)?;
        if names.is_empty() {
            return Ok(state.all(&key));
        }
        let mut names: Vec<&String> = names.iter().collect();
        names.sort_unstable();
        names.dedup();
        Ok(names
            .into_iter()
            .filter_map(|name| state.find(&key, name).cloned())
            .collect())
    }

    /// The operations `ids` of the session, all where there are none, the oldest first.
    ///
    /// # Errors
    /// `SessionEnded`.
    pub(crate) fn operations(&self, caller: &Caller, session: &str, ids: &[u64]) -> Result<Vec<Arc<StoredOperation>>> {
        let key = self.key(caller, session);
        let mut state = self.lock();
        let operations = state.session(&key)?.operations.iter();
        let wanted = |operation: &&Arc<StoredOperation>| ids.is_empty() || ids.contains(&operation.facts.id);
        Ok(operations.filter(wanted).cloned().collect())
    }

    /// Stops operations and forgets them.
    ///
    /// # Errors
    /// `NotFound`, `SessionEnded`; none is stopped then.
    pub(crate) fn cancel(&self, caller: &Caller, session: &str, ids: &[u64]) -> Result<()> {
        let key = self.key(caller, session);
        let mut state = self.lock();
        let operations = &mut state.session(&key)?.operations;
        let known = |id: u64| operations.iter().any(|operation| operation.facts.id == id);
        if let Some(unknown) = ids.iter().find(|id| !known(**id)) {
            return Err(unknown_operation(*unknown));
        }
        operations.retain(|operation| {
            let stopped = ids.contains(&operation.facts.id);
            if stopped {
                operation.cancel();
            }
            !stopped
        });
        drop(state);
        self.wake();
        Ok(())
    }
}

/// Nothing has this number.
pub(crate) fn unknown_operation(id: u64) -> Error {
    Error::NotFound {
        kind: "operation",
        name: id.to_string(),
    }
}
