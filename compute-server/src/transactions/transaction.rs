//! One open transaction.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::access::Caller;
use crate::checkpoints::{Key, StagedCheckpoint};
use crate::error::{Error, Result};
use crate::evaluations::StagedEvaluation;
use crate::names::ModelKey;
use crate::owner::{ModelHandle, TransactionId};
use crate::tokenizers::StagedTokenizer;

/// Number of a client's connection.
pub(crate) type Connection = u64;

/// An open transaction. All of its state is behind one lock that is never held while waiting.
pub(crate) struct Transaction {
    /// The client's identifier.
    pub(crate) id: TransactionId,
    /// The connection that began it; the transaction ends with it.
    pub(crate) connection: Option<Connection>,
    /// The tenant that began it; no other can write to it or end it.
    tenant: Arc<str>,
    state: Mutex<State>,
}

/// The changing part of a transaction.
pub(crate) struct State {
    /// Writes in order.
    pub(crate) writes: Vec<Write>,
    phase: Phase,
    last_used: Instant,
    /// Calls that use it right now.
    users: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Ending,
}

/// One staged write.
pub(crate) struct Write {
    /// The subtransaction it belongs to.
    pub(crate) subtransaction: u32,
    /// What is written.
    pub(crate) kind: WriteKind,
}

impl Write {
    /// Whether nobody sees `model` any more once this is published.
    pub(super) fn removes(&self, model: &ModelHandle) -> bool {
        match &self.kind {
            WriteKind::DropModel(removed) | WriteKind::ReplaceModel { old: removed, .. } => removed.is(model),
            _ => false,
        }
    }
}

/// The kinds of writes.
pub(crate) enum WriteKind {
    /// A model was loaded or created.
    CreateModel(ModelHandle),
    /// A model was dropped.
    DropModel(ModelHandle),
    /// A model takes the place of another one, under its name.
    ReplaceModel {
        /// The other one.
        old: ModelHandle,
        /// The model.
        new: ModelHandle,
    },
    /// A model or adapter that could not be made again was dropped.
    DropUnavailable(ModelKey),
    /// Something was staged in the model's owner.
    Change(ModelHandle),
    /// A checkpoint was written.
    CreateCheckpoint(StagedCheckpoint),
    /// A checkpoint was deleted.
    DeleteCheckpoint(Key),
    /// An evaluation was made.
    CreateEvaluation(StagedEvaluation),
    /// The evaluation of this id was deleted.
    DeleteEvaluation(u64),
    /// A tokenizer was trained.
    CreateTokenizer(StagedTokenizer),
}

impl Transaction {
    pub(super) fn new(id: TransactionId, caller: &Caller, connection: Option<Connection>) -> Self {
        let state = State {
            writes: Vec::new(),
            phase: Phase::Open,
            last_used: Instant::now(),
            users: 0,
        };
        Self {
            id,
            connection,
            tenant: Arc::clone(caller.name()),
            state: Mutex::new(state),
        }
    }

    /// Refuses the callers of other tenants.
    ///
    /// # Errors
    /// `NotFound`, as if there were none.
    pub(super) fn check_tenant(&self, caller: &Caller) -> Result<()> {
        match self.tenant == *caller.name() {
            true => Ok(()),
            false => Err(Error::NotFound {
                kind: "transaction",
                name: self.id.to_string(),
            }),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks it as in use.
    ///
    /// # Errors
    /// `Stale` when it is being published or rolled back.
    pub(super) fn enter(&self) -> Result<()> {
        let mut state = self.lock();
        if state.phase == Phase::Ending {
            return Err(ended(&self.id));
        }
        state.users += 1;
        Ok(())
    }

    /// Ends a use.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        state.users -= 1;
        state.last_used = Instant::now();
    }

    /// Adds a write.
    ///
    /// # Errors
    /// `Stale` when the transaction has ended meanwhile.
    pub(crate) fn push(&self, subtransaction: u32, kind: WriteKind) -> Result<()> {
        let mut state = self.lock();
        if state.phase == Phase::Ending {
            return Err(ended(&self.id));
        }
        state.writes.push(Write { subtransaction, kind });
        Ok(())
    }

    /// Takes back the last write to `model`, which did not happen after all.
    pub(crate) fn retract_change(&self, model: &ModelHandle) {
        let mut state = self.lock();
        let last = state
            .writes
            .iter()
            .rposition(|write| matches!(&write.kind, WriteKind::Change(of) if of.is(model)));
        if let Some(index) = last {
            state.writes.remove(index);
        }
    }

    /// Begins its end: nothing more can be added. False when another call has done so.
    pub(super) fn begin_end(&self) -> bool {
        let mut state = self.lock();
        let first = state.phase == Phase::Open;
        state.phase = Phase::Ending;
        first
    }

    /// Fails once its end has begun: nothing may be staged for it any more.
    ///
    /// # Errors
    /// `Stale`.
    pub(super) fn check_open(&self) -> Result<()> {
        match self.lock().phase {
            Phase::Open => Ok(()),
            Phase::Ending => Err(ended(&self.id)),
        }
    }

    /// Whether nobody has used it for `timeout`.
    pub(super) fn is_expired(&self, timeout: Duration) -> bool {
        let state = self.lock();
        state.phase == Phase::Open && state.users == 0 && state.last_used.elapsed() > timeout
    }

    /// What the transaction makes of the name `key`, which `published` has outside of it.
    pub(super) fn model(&self, key: &ModelKey, published: Option<ModelHandle>) -> Option<ModelHandle> {
        self.lock()
            .writes
            .iter()
            .fold(published, |found, write| match &write.kind {
                WriteKind::CreateModel(model) | WriteKind::ReplaceModel { new: model, .. } if model.key() == *key => {
                    Some(model.clone())
                }
                WriteKind::DropModel(model) if model.key() == *key => None,
                _ => found,
            })
    }
}

fn ended(id: &str) -> Error {
    Error::Stale(format!("transaction {id} has ended"))
}
