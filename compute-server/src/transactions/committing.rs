//! The commit log's part of a publish: once its frame is on the disk, the transaction is committed.

use std::collections::HashMap;
use std::sync::Arc;

use super::transaction::{Transaction, Write, WriteKind};
use crate::app::App;
use crate::commit_log::{CommitLog, FileChange, Item, Origin, origin};
use crate::data_folder;
use crate::error::{Error, Result};
use crate::owner::{ModelHandle, Recorded};

/// What transactions that the server begins by itself are called; no client asks for them again.
pub(super) const AUTOMATIC: &str = "automatic ";

impl App {
    /// Writes what a validated transaction does to the commit log, if there is one; returns the frame's number. `count` is
    /// what its publish is answered with.
    ///
    /// # Errors
    /// `Io`; nothing is committed then.
    pub(super) async fn log_commit(
        &self,
        transaction: &Transaction,
        count: u64,
        writes: &[Write],
        recorded: Vec<(u64, Recorded)>,
    ) -> Result<Option<u64>> {
        let Some(log) = &self.log else { return Ok(None) };
        let mut recorded: HashMap<u64, Recorded> = recorded.into_iter().collect();
        let mut items: Vec<Item> = Vec::new();
        let mut files: Vec<FileChange> = Vec::new();
        let mut bases = Bases { log, names: Vec::new() };
        // Models that the transaction itself drops again leave nothing but, for earlier ones, their end.
        let dropped = |model: &ModelHandle| writes.iter().any(|write| write.removes(model));
        for write in writes {
            match &write.kind {
                WriteKind::CreateModel(model) => {
                    let replaced = self.registry.unavailable(&model.key()).into_iter();
                    items.extend(replaced.flat_map(|one| one.ids).map(|model| Item::Drop { model }));
                    if !dropped(model) {
                        items.extend(bases.of_new(model)?);
                    }
                }
                WriteKind::DropModel(model) => {
                    // Those of its adapters that others have made since this transaction looked go with it.
                    let mut adapters = self.registry.list();
                    adapters.retain(|adapter| adapter.is_adapter_of(model));
                    let ids = adapters.iter().chain([model]).map(ModelHandle::id);
                    items.extend(ids.filter(|id| log.knows(*id)).map(|model| Item::Drop { model }));
                }
                WriteKind::ReplaceModel { old, new } => {
                    items.extend(log.knows(old.id()).then(|| Item::Drop { model: old.id() }));
                    if !dropped(new) {
                        items.extend(bases.of_new(new)?);
                    }
                }
                WriteKind::DropUnavailable(key) => {
                    let dropped = self.registry.unavailable(key).into_iter();
                    items.extend(dropped.flat_map(|one| one.ids).map(|model| Item::Drop { model }));
                }
                WriteKind::Change(model) if !dropped(model) => {
                    items.extend(recorded.remove(&model.id()).map(|changes| Item::Changes {
                        model: model.id(),
                        tokens: changes.tokens,
                        data: changes.data,
                    }));
                }
                WriteKind::CreateCheckpoint(staged) => {
                    self.checkpoints.prepare(staged)?;
                    files.push(self.checkpoints.creation(staged));
                }
                WriteKind::DeleteCheckpoint(key) => files.push(self.checkpoints.deletion(key)),
                WriteKind::CreateEvaluation(staged) => files.push(self.evaluations.creation(staged)),
                WriteKind::DeleteEvaluation(id) => files.push(self.evaluations.deletion(*id)),
                WriteKind::CreateTokenizer(staged) => files.push(self.tokenizers.creation(staged)),
                WriteKind::Change(_) => {}
            }
        }
        if items.is_empty() && files.is_empty() {
            return Ok(None);
        }
        // The base of a model stands before its changes, whatever the order of the writes.
        items.sort_by_key(|item| !matches!(item, Item::Base { .. }));
        let id = match transaction.id.starts_with(AUTOMATIC) {
            true => String::new(),
            false => transaction.id.to_string(),
        };
        let to = Arc::clone(log);
        let appended = tokio::task::spawn_blocking(move || to.append(&id, count, items, files)).await;
        let number = appended.map_err(|error| Error::Internal(format!("writing the commit log failed: {error}")))??;
        bases.names.clear();
        Ok(Some(number))
    }
}

/// Folders of bases that are removed again unless the frame that names them is written.
struct Bases<'a> {
    log: &'a CommitLog,
    names: Vec<String>,
}

impl Bases<'_> {
    /// The base of a model that is about to be published.
    fn of_new(&mut self, model: &ModelHandle) -> Result<Option<Item>> {
        let Some(new) = model.take_base() else {
            return Ok(None);
        };
        let mut base = new.base;
        if let Some(files) = new.files {
            let (name, path) = self.log.base_folder(model.id());
            self.names.push(name.clone());
            data_folder::rename(files.path(), &path)
                .map_err(|error| Error::io("keeping the checkpoint that a model was restored from", error))?;
            base.origin = Some(Origin {
                kind: Some(origin::Kind::Saved(name)),
            });
        }
        Ok(Some(Item::Base {
            model: model.id(),
            base: Box::new(base),
            through: None,
        }))
    }
}

impl Drop for Bases<'_> {
    fn drop(&mut self) {
        self.names.iter().for_each(|name| self.log.remove_base(name));
    }
}
