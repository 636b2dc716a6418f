//! Sessions, and persistent tensors, by name.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use tokio::sync::watch;

use super::operation::StoredOperation;
use super::steps::Step;
use super::tensor::StoredTensor;
use crate::error::{Error, Result};

/// Operations that have ended and are still listed.
const REMEMBERED_OPERATIONS: usize = 1024;

/// Published transactions that a session remembers, so that a repeated publish is answered as the first one was.
const REMEMBERED_TRANSACTIONS: usize = 64;

/// A session: its tenant's name, and its id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct SessionKey {
    pub(super) tenant: Arc<str>,
    pub(super) id: Arc<str>,
}

/// Everything that has a name.
#[derive(Default)]
pub(super) struct State {
    pub(super) sessions: HashMap<SessionKey, Session>,
    /// Persistent tensors by tenant and name.
    pub(super) persistent: HashMap<Arc<str>, BTreeMap<String, Arc<StoredTensor>>>,
}

/// One session.
pub(super) struct Session {
    /// Its tensors; and of persistent ones those that nobody else sees yet.
    pub(super) tensors: BTreeMap<String, Arc<StoredTensor>>,
    /// Ids of persistent tensors that its transaction has deleted.
    pub(super) hidden: HashSet<u64>,
    pub(super) operations: VecDeque<Arc<StoredOperation>>,
    pub(super) last_operation: u64,
    pub(super) transaction: Option<Transaction>,
    published: VecDeque<(String, u64)>,
    /// Told when the server ends the session.
    pub(super) ended: watch::Sender<bool>,
}

/// What an open transaction did.
pub(super) struct Transaction {
    pub(super) id: String,
    /// In order, with the subtransaction that did it.
    pub(super) steps: Vec<(u32, Step)>,
    /// Subtransactions that were rolled back, in order.
    pub(super) rolled_back: Vec<u32>,
}

impl Transaction {
    pub(super) fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            steps: Vec::new(),
            rolled_back: Vec::new(),
        }
    }
}

impl Session {
    pub(super) fn new() -> Self {
        Self {
            tensors: BTreeMap::new(),
            hidden: HashSet::new(),
            operations: VecDeque::new(),
            last_operation: 0,
            transaction: None,
            published: VecDeque::new(),
            ended: watch::Sender::new(false),
        }
    }

    /// Writes of a transaction that was published.
    pub(super) fn published(&self, id: &str) -> Option<u64> {
        let found = self.published.iter().find(|(published, _)| published == id);
        found.map(|(_, writes)| *writes)
    }

    pub(super) fn remember(&mut self, id: String, writes: u64) {
        if self.published.len() >= REMEMBERED_TRANSACTIONS {
            self.published.pop_front();
        }
        self.published.push_back((id, writes));
    }

    /// Operations that have not ended.
    pub(super) fn waiting(&self) -> usize {
        let waiting = self.operations.iter().filter(|operation| !operation.facts.has_ended());
        waiting.count()
    }

    /// Lists an operation; the oldest one that has ended makes room.
    pub(super) fn list(&mut self, operation: Arc<StoredOperation>) {
        if self.operations.len() >= REMEMBERED_OPERATIONS
            && let Some(oldest) = self.operations.iter().position(|other| other.facts.has_ended())
        {
            self.operations.remove(oldest);
        }
        self.operations.push_back(operation);
    }
}

impl State {
    /// The session.
    ///
    /// # Errors
    /// `SessionEnded`.
    pub(super) fn session(&mut self, key: &SessionKey) -> Result<&mut Session> {
        self.sessions
            .get_mut(key)
            .ok_or_else(|| Error::SessionEnded(key.id.chars().take(60).collect()))
    }

    /// The persistent tensor that the session sees under `name`.
    pub(super) fn persistent(&self, key: &SessionKey, name: &str) -> Option<&Arc<StoredTensor>> {
        let found = self.persistent.get(&key.tenant)?.get(name)?;
        let hidden = self
            .sessions
            .get(key)
            .is_some_and(|session| session.hidden.contains(&found.id));
        (!hidden).then_some(found)
    }

    /// The tensor that the session means by `name`: its own before a persistent one.
    pub(super) fn find(&self, key: &SessionKey, name: &str) -> Option<&Arc<StoredTensor>> {
        let own = self.sessions.get(key).and_then(|session| session.tensors.get(name));
        own.or_else(|| self.persistent(key, name))
    }

    /// As [`find`](Self::find).
    ///
    /// # Errors
    /// `NotFound`.
    pub(super) fn require(&self, key: &SessionKey, name: &str) -> Result<Arc<StoredTensor>> {
        self.find(key, name).cloned().ok_or_else(|| Error::NotFound {
            kind: "tensor",
            name: name.to_owned(),
        })
    }

    /// All tensors that the session sees, by name.
    pub(super) fn all(&self, key: &SessionKey) -> Vec<Arc<StoredTensor>> {
        let own = self.sessions.get(key).map(|session| &session.tensors);
        let persistent = self.persistent.get(&key.tenant).into_iter().flat_map(BTreeMap::keys);
        let mut names: Vec<&String> = own.into_iter().flat_map(BTreeMap::keys).chain(persistent).collect();
        names.sort_unstable();
        names.dedup();
        names
            .into_iter()
            .filter_map(|name| self.find(key, name).cloned())
            .collect()
    }

    /// Refuses a name that is taken. A session's tensor may have the name of a persistent one, which it hides.
    ///
    /// # Errors
    /// `NameTaken`.
    pub(super) fn check_free(&self, key: &SessionKey, name: &str, persistent: bool) -> Result<()> {
        let own = self
            .sessions
            .get(key)
            .is_some_and(|session| session.tensors.contains_key(name));
        match own || persistent && self.persistent(key, name).is_some() {
            false => Ok(()),
            true => Err(Error::NameTaken {
                kind: "tensor",
                name: name.to_owned(),
            }),
        }
    }
}
