//! Publish, rollback, release, and the end of a session.

use super::sessions::Executor;
use super::state::{Session, SessionKey};
use super::steps::{self, Step};
use crate::access::Caller;
use crate::error::{Error, Result};

impl Executor {
    /// Makes a transaction final. Returns the number of its writes.
    ///
    /// # Errors
    /// `Stale` for an unknown transaction where writes are expected; as [`steps::settle`], and the transaction stays open
    /// then.
    pub(crate) fn publish(&self, caller: &Caller, session: &str, id: &str, expects_writes: bool) -> Result<u64> {
        let key = self.key(caller, session);
        let mut state = self.lock();
        let session = state.session(&key)?;
        if let Some(writes) = session.published(id) {
            return Ok(writes);
        }
        let Some(transaction) = session.transaction.take_if(|open| open.id == id) else {
            return match expects_writes {
                true => Err(Error::Stale(format!("transaction {id} is not open in this session"))),
                false => Ok(0),
            };
        };
        let settled = steps::settle(&mut state, &key, transaction.steps.iter().map(|(_, step)| step));
        let session = state.session(&key)?;
        if let Err(error) = settled {
            session.transaction = Some(transaction);
            return Err(error);
        }
        let writes = transaction.steps.len() as u64;
        session.remember(id.to_owned(), writes);
        Ok(writes)
    }

    /// Undoes a transaction, or what `subtransaction` and those within it did. Returns the number of writes.
    ///
    /// # Errors
    /// `SessionEnded`.
    pub(crate) fn roll_back(&self, caller: &Caller, session: &str, id: &str, subtransaction: u32) -> Result<u64> {
        let key = self.key(caller, session);
        let mut state = self.lock();
        let open = &mut state.session(&key)?.transaction;
        let undone: Vec<Step> = match subtransaction {
            0 | 1 => {
                let transaction = open.take_if(|open| open.id == id);
                transaction.map(|transaction| transaction.steps).unwrap_or_default()
            }
            level => match open.as_mut().filter(|open| open.id == id) {
                None => Vec::new(),
                Some(transaction) => {
                    transaction.rolled_back.push(level);
                    transaction.steps.extract_if(.., |(of, _)| *of >= level).collect()
                }
            },
        }
        .into_iter()
        .map(|(_, step)| step)
        .collect();
        let count = undone.len() as u64;
        steps::undo(&mut state, &key, undone);
        drop(state);
        self.wake();
        Ok(count)
    }

    /// Gives what `subtransaction` did to `parent`.
    ///
    /// # Errors
    /// `SessionEnded`, `InvalidArgument` for a parent that does not come before it.
    pub(crate) fn release(
        &self,
        caller: &Caller,
        session: &str,
        id: &str,
        subtransaction: u32,
        parent: u32,
    ) -> Result<()> {
        if parent >= subtransaction {
            return Err(Error::invalid(format!(
                "parent_subtransaction_id is {parent}; it must be less than subtransaction_id, which is {subtransaction}"
            )));
        }
        let key = self.key(caller, session);
        let mut state = self.lock();
        let open = state.session(&key)?.transaction.as_mut().filter(|open| open.id == id);
        let steps = open
            .map(|transaction| transaction.steps.iter_mut())
            .into_iter()
            .flatten();
        steps
            .filter(|(level, _)| *level == subtransaction)
            .for_each(|(level, _)| *level = parent.max(1));
        Ok(())
    }

    /// Ends a session: its transaction is undone, its tensors go. Operations that nobody else waits for are stopped.
    pub(super) fn end_session(&self, key: &SessionKey) {
        let mut state = self.lock();
        let Ok(session) = state.session(key) else { return };
        let open = session.transaction.take();
        let undone = open.map(|transaction| transaction.steps).unwrap_or_default();
        steps::undo(&mut state, key, undone.into_iter().map(|(_, step)| step).collect());
        let Some(Session { operations, .. }) = state.sessions.remove(key) else {
            return;
        };
        // What a persistent tensor is made of may come from any operation before its own.
        let persistent = state.persistent.get(&key.tenant);
        let published = |name: &str, id| {
            persistent
                .and_then(|all| all.get(name))
                .is_some_and(|found| found.id == id)
        };
        let wanted = operations.iter().rposition(|operation| {
            let output = operation.output();
            output.is_some_and(|output| published(&output.name, output.id))
        });
        for operation in operations.iter().skip(wanted.map_or(0, |last| last + 1)) {
            operation.cancel();
        }
        drop(state);
        self.wake();
    }
}
