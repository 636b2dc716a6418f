//! Publishing: validate everything, then make everything visible.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::ending::drop_writes;
use super::files::FileChanged;
use super::transaction::{Transaction, Write, WriteKind};
use crate::app::App;
use crate::checkpoints::{self, Key};
use crate::error::{Error, Result};
use crate::evaluations;
use crate::names::ModelKey;
use crate::owner::{ModelHandle, Recorded};

/// Longest wait for the memory of unloaded models: they finish the token or micro-batch that they are at first.
const UNLOAD_PATIENCE: Duration = Duration::from_secs(2);

impl App {
    /// Publishes a transaction; returns the number of its writes. A transaction that cannot be published is discarded.
    /// Must run to its end once begun: callers spawn it.
    ///
    /// # Errors
    /// `Stale` when another transaction changed what this one relies on, or when it is unknown although `expected`;
    /// `NameTaken` when another one took a name.
    pub(crate) async fn publish(self: &Arc<Self>, id: &str, expected: bool) -> Result<u64> {
        // What a save keeps from being published does not hold up others.
        if let Some(transaction) = self.transactions.find(id) {
            let changed = changed_models(&transaction.lock().writes);
            for model in changed {
                // One that is gone is reported below.
                let _ = model.call_once_saved(|_| Ok(())).await;
            }
        }
        let (writes, unloaded) = self.publish_in_turn(id, expected).await?;
        // What the caller loads next is to find their memory free.
        let all_ended = async {
            for model in &unloaded {
                model.ended().await;
            }
        };
        let _ = tokio::time::timeout(UNLOAD_PATIENCE, all_ended).await;
        Ok(writes)
    }

    /// As [`publish`](Self::publish), once no other transaction is being published; returns what was unloaded, too.
    async fn publish_in_turn(self: &Arc<Self>, id: &str, expected: bool) -> Result<(u64, Vec<ModelHandle>)> {
        let _one_at_a_time = self.transactions.publishing.lock().await;
        if let Some(writes) = self.transactions.published(id) {
            return Ok((writes, Vec::new()));
        }
        let Some(transaction) = self.transactions.find(id).filter(|transaction| transaction.begin_end()) else {
            return match expected {
                true => Err(Error::Stale(format!(
                    "what transaction {id} staged is gone: the server was restarted, the connection broke, or it expired"
                ))),
                false => Ok((0, Vec::new())),
            };
        };
        let mut writes = std::mem::take(&mut transaction.lock().writes);
        let count = writes.len() as u64;
        self.prune(&transaction, &mut writes);
        let unloaded = writes.iter().filter_map(|write| match &write.kind {
            WriteKind::DropModel(model) => Some(model.clone()),
            _ => None,
        });
        let unloaded = unloaded.collect();
        let logged = match self.validate(&transaction, &writes).await {
            Ok(recorded) => self.log_commit(&transaction, count, &writes, recorded).await,
            Err(error) => Err(error),
        };
        let result = match logged {
            Ok(number) => self.apply(&transaction, writes, number).await,
            Err(error) => {
                drop_writes(&transaction, writes, 0).await;
                Err(error)
            }
        };
        self.transactions.remove(id);
        result?;
        self.transactions.remember(&transaction.id, count);
        Ok((count, unloaded))
    }

    /// Checks that every write can be made visible; returns what the commit log is to hold of the changes to models.
    async fn validate(&self, transaction: &Transaction, writes: &[Write]) -> Result<Vec<(u64, Recorded)>> {
        let mut models: HashMap<ModelKey, Option<ModelHandle>> = HashMap::new();
        let mut checkpoints: HashMap<Key, bool> = HashMap::new();
        let mut evaluations: HashMap<u64, bool> = HashMap::new();
        for write in writes {
            match &write.kind {
                WriteKind::CreateModel(model) => {
                    let key = model.key();
                    let mut present = |key: &ModelKey| {
                        let found = models.entry(key.clone());
                        found.or_insert_with(|| self.registry.find(key)).clone()
                    };
                    if present(&key).is_some() {
                        return Err(Error::NameTaken {
                            kind: key.kind(),
                            name: key.to_string(),
                        });
                    }
                    let base = present(&ModelKey::new(model.name(), ""));
                    if key.adapter.is_some() && !base.is_some_and(|base| model.is_adapter_of(&base)) {
                        return Err(dropped_by_another(model));
                    }
                    models.insert(key, Some(model.clone()));
                }
                WriteKind::DropModel(model) => {
                    let key = model.key();
                    let present = models.entry(key.clone()).or_insert_with(|| self.registry.find(&key));
                    if !present.as_ref().is_some_and(|present| present.is(model)) {
                        return Err(dropped_by_another(model));
                    }
                    *present = None;
                }
                WriteKind::ReplaceModel { old, new } => {
                    let key = old.key();
                    let present = models.entry(key.clone()).or_insert_with(|| self.registry.find(&key));
                    if !present.as_ref().is_some_and(|present| present.is(old)) {
                        return Err(dropped_by_another(old));
                    }
                    *present = Some(new.clone());
                    let id = Arc::clone(&transaction.id);
                    // Nothing of it is logged: its successor has a base of its own.
                    old.call_once_saved(move |owner| owner.prepare(&id, false)).await?;
                }
                WriteKind::CreateCheckpoint(staged) => {
                    let key = staged.key();
                    let present = checkpoints
                        .entry(key.clone())
                        .or_insert_with(|| self.checkpoints.contains(&key));
                    if std::mem::replace(present, true) {
                        return Err(checkpoints::taken(&key));
                    }
                }
                WriteKind::DeleteCheckpoint(key) => {
                    let present = checkpoints
                        .entry(key.clone())
                        .or_insert_with(|| self.checkpoints.contains(key));
                    if !std::mem::replace(present, false) {
                        return Err(checkpoints::not_found(key));
                    }
                }
                // Ids are never given twice.
                WriteKind::CreateEvaluation(staged) => drop(evaluations.insert(staged.id(), true)),
                WriteKind::DeleteEvaluation(id) => {
                    let present = evaluations.entry(*id).or_insert_with(|| self.evaluations.contains(*id));
                    if !std::mem::replace(present, false) {
                        return Err(evaluations::not_found(*id));
                    }
                }
                WriteKind::DropUnavailable(key) => {
                    if self.registry.unavailable(key).is_none() {
                        let kind = key.kind();
                        return Err(Error::Stale(format!(
                            "{kind} \"{key}\" was dropped by another transaction"
                        )));
                    }
                }
                WriteKind::Change(_) | WriteKind::CreateTokenizer(_) => {}
            }
        }
        let record = self.log.is_some();
        let mut recorded = Vec::new();
        for model in changed_models(writes) {
            let key = model.key();
            let present = models.entry(key.clone()).or_insert_with(|| self.registry.find(&key));
            if !present.as_ref().is_some_and(|present| present.is(&model)) {
                // Changed, and dropped or replaced later in the same transaction: nothing of the change remains.
                if !dropped_here(writes, &model) {
                    return Err(dropped_by_another(&model));
                }
                continue;
            }
            let id = Arc::clone(&transaction.id);
            let changes = model.call_once_saved(move |owner| owner.prepare(&id, record)).await?;
            recorded.extend(changes.map(|changes| (model.id(), changes)));
        }
        Ok(recorded)
    }

    /// Makes every write visible: files first, since they alone can still fail. `logged` is the number of the frame in the
    /// commit log, if there is one; nothing is taken back then, for the transaction is committed.
    async fn apply(self: &Arc<Self>, transaction: &Transaction, writes: Vec<Write>, logged: Option<u64>) -> Result<()> {
        let (mut failed, mut saved) = (None, Vec::new());
        let mut changed = changed_models(&writes);
        let mut done: Vec<FileChanged> = Vec::new();
        let mut models = Vec::new();
        for write in writes {
            match write.kind {
                kind @ (WriteKind::CreateCheckpoint(_)
                | WriteKind::DeleteCheckpoint(_)
                | WriteKind::CreateEvaluation(_)
                | WriteKind::DeleteEvaluation(_)
                | WriteKind::CreateTokenizer(_)) => match self.change_file(kind) {
                    Ok(change) => {
                        if let Some(FileChanged::CheckpointCreated(staged)) = &change {
                            saved.push(staged.row.model.clone());
                        }
                        done.extend(change);
                    }
                    Err(error) if logged.is_none() => {
                        return self.undo(transaction, done, models, changed, error).await;
                    }
                    Err(error) => failed = Some(error),
                },
                kind @ (WriteKind::CreateModel(_)
                | WriteKind::DropModel(_)
                | WriteKind::ReplaceModel { .. }
                | WriteKind::DropUnavailable(_)) => models.push(kind),
                WriteKind::Change(_) => {}
            }
        }
        // A model first: what is merged into its weights stops counting beside them at once, not a while before.
        changed.sort_by_key(|model| model.key().adapter.is_some());
        for model in &changed {
            let (id, number) = (Arc::clone(&transaction.id), logged.unwrap_or(0));
            if let Err(error) = model.call(move |owner| owner.apply(&id, number)).await
                && !matches!(error, Error::Unloaded(_))
            {
                // Validated, so this is a defect; the model's owner has logged it.
                tracing::error!(model = model.name(), %error, "a validated publish failed");
                return Err(error);
            }
        }
        for kind in models {
            match kind {
                WriteKind::CreateModel(model) => {
                    self.registry.forget_unavailable(&model.key());
                    self.registry.insert(model);
                }
                WriteKind::DropModel(model) => {
                    self.registry.remove(&model);
                    model.unload();
                    // Adapters that others have made since this transaction looked.
                    for adapter in self.registry.list() {
                        if adapter.is_adapter_of(&model) {
                            self.registry.remove(&adapter);
                            adapter.unload();
                        }
                    }
                }
                // What runs on the old one ends on it; its thread ends when nobody has its handle any more.
                WriteKind::ReplaceModel { new, .. } => self.registry.insert(new),
                WriteKind::DropUnavailable(key) => self.registry.forget_unavailable(&key),
                _ => {}
            }
        }
        let _ = tokio::task::spawn_blocking(move || drop(done)).await;
        self.save_bases(&changed, &saved);
        failed.map_or(Ok(()), Err)
    }

    /// Takes back what was made visible before `error`.
    async fn undo(
        &self,
        transaction: &Transaction,
        done: Vec<FileChanged>,
        models: Vec<WriteKind>,
        changed: Vec<ModelHandle>,
        error: Error,
    ) -> Result<()> {
        for change in done.into_iter().rev() {
            if let Err(error) = self.change_file_back(change) {
                tracing::error!(%error, "a failed publish could not be taken back wholly");
            }
        }
        let writes = models.into_iter().chain(changed.into_iter().map(WriteKind::Change));
        let writes = writes
            .map(|kind| Write {
                subtransaction: 1,
                kind,
            })
            .collect();
        drop_writes(transaction, writes, 0).await;
        Err(error)
    }
}

/// The models that writes changed, each once.
pub(super) fn changed_models(writes: &[Write]) -> Vec<ModelHandle> {
    let mut models: Vec<ModelHandle> = Vec::new();
    for write in writes {
        if let WriteKind::Change(model) = &write.kind
            && !models.iter().any(|known| known.is(model))
        {
            models.push(model.clone());
        }
    }
    models
}

fn dropped_here(writes: &[Write], model: &ModelHandle) -> bool {
    writes.iter().any(|write| write.removes(model))
}

fn dropped_by_another(model: &ModelHandle) -> Error {
    Error::Stale(format!(
        "model \"{}\" was unloaded or replaced by another transaction",
        model.name()
    ))
}
