//! What writes did: undone by a rollback, settled by a commit.

use std::collections::HashSet;
use std::sync::Arc;

use super::operation::StoredOperation;
use super::state::{SessionKey, State};
use super::tensor::StoredTensor;
use crate::error::{Error, Result};

/// One thing that a write did.
pub(super) enum Step {
    /// A tensor was made.
    Made(Arc<StoredTensor>),
    /// A chunk of a tensor arrived.
    Filled(Arc<StoredTensor>, usize),
    /// A tensor was deleted.
    Deleted(Arc<StoredTensor>),
    /// An operation was queued.
    Submitted(Arc<StoredOperation>),
}

/// Undoes steps, the last one first.
pub(super) fn undo(state: &mut State, key: &SessionKey, steps: Vec<Step>) {
    let Ok(session) = state.session(key) else { return };
    let made: HashSet<u64> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Made(tensor) => Some(tensor.id),
            _ => None,
        })
        .collect();
    for step in steps.into_iter().rev() {
        match step {
            Step::Made(tensor) => {
                if session
                    .tensors
                    .get(&tensor.name)
                    .is_some_and(|present| present.id == tensor.id)
                {
                    session.tensors.remove(&tensor.name);
                }
            }
            // Of a tensor that goes itself nothing has to be taken back.
            Step::Filled(tensor, _) if made.contains(&tensor.id) => {}
            Step::Filled(tensor, chunk) => {
                if let Err(error) = tensor.take_back(chunk) {
                    tracing::warn!(%error, "a chunk could not be taken back");
                }
            }
            Step::Deleted(tensor) => {
                // A persistent tensor that others see was only hidden.
                if !session.hidden.remove(&tensor.id) {
                    session.tensors.insert(tensor.name.clone(), tensor);
                }
            }
            Step::Submitted(operation) => {
                operation.cancel();
                session.operations.retain(|other| !Arc::ptr_eq(other, &operation));
            }
        }
    }
}

/// Makes steps final: others see persistent tensors that were made, and none that were deleted. All or nothing.
///
/// # Errors
/// `NameTaken` when a persistent tensor's name has been taken meanwhile, `Precondition` when it is incomplete, `Stale` when
/// one that was deleted has changed meanwhile.
pub(super) fn settle<'a>(state: &mut State, key: &SessionKey, steps: impl Iterator<Item = &'a Step>) -> Result<()> {
    let (mut removed, mut shown) = (Vec::new(), Vec::new());
    for step in steps {
        match step {
            Step::Deleted(tensor) if state.session(key)?.hidden.contains(&tensor.id) => removed.push(tensor),
            Step::Made(tensor) if tensor.persistent => {
                let present = state.session(key)?.tensors.get(&tensor.name);
                if present.is_some_and(|present| present.id == tensor.id) {
                    shown.push(tensor);
                }
            }
            _ => {}
        }
    }
    let published = state.persistent.entry(Arc::clone(&key.tenant)).or_default();
    let now = |name: &str| published.get(name).map(|tensor| tensor.id);
    if let Some(changed) = removed.iter().find(|tensor| now(&tensor.name) != Some(tensor.id)) {
        let name = &changed.name;
        return Err(Error::Stale(format!(
            "the persistent tensor \"{name}\" was deleted by another session since this transaction deleted it"
        )));
    }
    for tensor in &shown {
        tensor.check_complete()?;
        let taken = now(&tensor.name).filter(|id| !removed.iter().any(|removed| removed.id == *id));
        if taken.is_some() {
            return Err(Error::NameTaken {
                kind: "persistent tensor",
                name: tensor.name.clone(),
            });
        }
    }
    for tensor in &removed {
        published.remove(&tensor.name);
    }
    for tensor in &shown {
        published.insert(tensor.name.clone(), Arc::clone(tensor));
    }
    let session = state.session(key)?;
    for tensor in removed {
        session.hidden.remove(&tensor.id);
    }
    for tensor in shown {
        session.tensors.remove(&tensor.name);
    }
    Ok(())
}
