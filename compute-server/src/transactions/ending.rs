//! Rollback, release, expiry, and the end of a connection.

use std::sync::Arc;

use super::transaction::{Connection, Transaction, Write, WriteKind};
use crate::app::App;
use crate::error::Result;
use crate::owner::{ModelHandle, Owner};

impl App {
    /// Discards a transaction, or what `subtransaction` and those within it staged. Returns the number of writes.
    ///
    /// # Errors
    /// None at present; an id that is unknown is none.
    pub(crate) async fn roll_back(&self, id: &str, subtransaction: u32) -> Result<u64> {
        let Some(transaction) = self.transactions.find(id) else {
            return Ok(0);
        };
        if subtransaction <= 1 {
            return Ok(self.discard(&transaction).await);
        }
        let writes = {
            let mut state = transaction.lock();
            let (discarded, kept): (Vec<Write>, Vec<Write>) = state
                .writes
                .drain(..)
                .partition(|write| write.subtransaction >= subtransaction);
            state.writes = kept;
            discarded
        };
        Ok(drop_writes(&transaction, writes, subtransaction).await)
    }

    /// Discards a whole transaction. Returns the number of writes; 0 when it is ending already.
    pub(crate) async fn discard(&self, transaction: &Arc<Transaction>) -> u64 {
        if !transaction.begin_end() {
            return 0;
        }
        let writes = std::mem::take(&mut transaction.lock().writes);
        let count = drop_writes(transaction, writes, 0).await;
        self.transactions.remove(&transaction.id);
        count
    }

    /// Gives what `subtransaction` staged to `parent`.
    ///
    /// # Errors
    /// Those of merging gradients.
    pub(crate) async fn release(&self, id: &str, subtransaction: u32, parent: u32) -> Result<()> {
        let Some(transaction) = self.transactions.find(id) else {
            return Ok(());
        };
        let parent = parent.max(1);
        let models = {
            let mut state = transaction.lock();
            let mut released: Vec<ModelHandle> = Vec::new();
            for write in state
                .writes
                .iter_mut()
                .filter(|write| write.subtransaction == subtransaction)
            {
                write.subtransaction = parent;
                if let WriteKind::Change(model) = &write.kind
                    && !released.iter().any(|known| known.is(model))
                {
                    released.push(model.clone());
                }
            }
            released
        };
        for model in models {
            let id = Arc::clone(&transaction.id);
            model
                .call(move |owner| owner.release(&id, subtransaction, parent))
                .await?;
        }
        Ok(())
    }

    /// Discards what was begun on a connection that has closed.
    pub(crate) async fn connection_closed(&self, connection: Connection) {
        for transaction in self.transactions.of_connection(connection) {
            let writes = self.discard(&transaction).await;
            if writes > 0 {
                tracing::info!(transaction = %transaction.id, writes, "discarded: its connection closed");
            }
        }
    }

    /// Discards transactions that nobody has used for long.
    pub(crate) async fn expire_transactions(&self) {
        for transaction in self.transactions.expired() {
            let writes = self.discard(&transaction).await;
            tracing::info!(transaction = %transaction.id, writes, "discarded: it was not used for --transaction-timeout");
        }
    }
}

/// Undoes writes; returns how many.
pub(super) async fn drop_writes(transaction: &Transaction, writes: Vec<Write>, subtransaction: u32) -> u64 {
    let count = writes.len() as u64;
    let mut changed: Vec<ModelHandle> = Vec::new();
    let mut files = Vec::new();
    for write in writes {
        match write.kind {
            WriteKind::CreateModel(model) | WriteKind::ReplaceModel { new: model, .. } => model.unload(),
            WriteKind::Change(model) if !changed.iter().any(|known| known.is(&model)) => changed.push(model),
            WriteKind::CreateCheckpoint(staged) => files.push(staged),
            WriteKind::DropModel(_)
            | WriteKind::DropUnavailable(_)
            | WriteKind::Change(_)
            | WriteKind::DeleteCheckpoint(_)
            | WriteKind::DeleteEvaluation(_)
            // Small files, which go as they are dropped.
            | WriteKind::CreateEvaluation(_)
            | WriteKind::CreateTokenizer(_) => {}
        }
    }
    for model in changed {
        let id = Arc::clone(&transaction.id);
        // A model that is gone has nothing staged any more.
        let roll_back = move |owner: &mut Owner| {
            owner.roll_back(&id, subtransaction);
            Ok(())
        };
        let _ = model.call(roll_back).await;
    }
    if !files.is_empty() {
        // Deleting large files takes its time.
        let _ = tokio::task::spawn_blocking(move || drop(files)).await;
    }
    count
}
