//! Saving new bases for the commit log, so that a restart has little to compute again.

use std::sync::Arc;

use crate::app::App;
use crate::commit_log::{CommitLog, Item, LogBase, Origin, origin};
use crate::data_folder::{self, Staged};
use crate::error::{Error, Result};
use crate::names::ModelKey;
use crate::owner::{ModelHandle, Saving};

impl App {
    /// Begins to save the models whose log has become too long, and sooner those of which a checkpoint was made: then
    /// little has to be written. Nobody waits for it.
    pub(super) fn save_bases(self: &Arc<Self>, changed: &[ModelHandle], saved: &[String]) {
        let Some(log) = &self.log else { return };
        let saved = saved
            .iter()
            .filter_map(|name| self.registry.find(&ModelKey::from_text(name)));
        let saved = saved.filter(|model| log.is_worthwhile(model.id()));
        let due = changed.iter().filter(|model| log.is_due(model.id())).cloned();
        for model in due.chain(saved) {
            let (app, log) = (Arc::clone(self), Arc::clone(log));
            tokio::spawn(async move {
                match app.save_base(&log, &model).await {
                    Ok(saved) => tracing::debug!(model = model.name(), saved, "a base of the commit log"),
                    Err(Error::Unloaded(_)) => {}
                    Err(error) => tracing::warn!(
                        model = model.name(),
                        %error,
                        "the model's state could not be saved; its commit log goes on growing"
                    ),
                }
                log.saved(model.id());
            });
        }
    }

    /// Saves a model or an adapter; false when its state does not allow it now.
    async fn save_base(&self, log: &Arc<CommitLog>, model: &ModelHandle) -> Result<bool> {
        let Some(begun) = self.begin_saving_bases(log, model).await? else {
            return Ok(false);
        };
        let mut saved = Vec::with_capacity(begun.len());
        for (member, saving) in begun {
            let (base, through) = saving.base.clone();
            let files = saving.write(self.folder.stage(), self.library(&member), None).await?;
            saved.push(Saved {
                model: member.id(),
                base,
                through,
                files,
            });
        }
        // While nothing is published, the models stay as they are in the log.
        let _one_at_a_time = self.transactions.publishing.lock().await;
        if !log.knows(model.id()) {
            return Ok(false);
        }
        saved.retain(|saved| log.knows(saved.model));
        let log = Arc::clone(log);
        let begun = tokio::task::spawn_blocking(move || append(&log, saved)).await;
        begun.map_err(|error| Error::Internal(format!("writing the commit log failed: {error}")))??;
        Ok(true)
    }

    /// Begins to save an adapter; or a model, and then with it, as of the same commit, its adapters that have changes to be
    /// replayed: these rest on the weights that the model had at the time, which its base leaves out. None when the state of
    /// one does not allow it.
    async fn begin_saving_bases(
        &self,
        log: &CommitLog,
        model: &ModelHandle,
    ) -> Result<Option<Vec<(ModelHandle, Saving)>>> {
        let _one_at_a_time = self.transactions.publishing.lock().await;
        let mut members = vec![model.clone()];
        if model.key().adapter.is_none() {
            if self.registry.has_unavailable_adapter(model.name()) {
                return Ok(None);
            }
            let adapters = self.registry.list().into_iter();
            members.extend(adapters.filter(|other| other.is_adapter_of(model) && log.has_changes(other.id())));
        }
        let mut begun = Vec::with_capacity(members.len());
        for member in members {
            let Some(saving) = member.call(|owner| owner.begin_saving_base()).await? else {
                return Ok(None);
            };
            begun.push((member, saving));
        }
        Ok(Some(begun))
    }
}

/// A model or adapter that was written as a base.
struct Saved {
    model: u64,
    base: LogBase,
    /// The last frame that it includes.
    through: u64,
    files: Staged,
}

/// Makes what was saved bases, all or none. Blocks.
fn append(log: &CommitLog, saved: Vec<Saved>) -> Result<()> {
    let (mut items, mut names) = (Vec::with_capacity(saved.len()), Vec::new());
    let mut moved = Ok(());
    for Saved {
        model,
        mut base,
        through,
        files,
    } in saved
    {
        let (name, path) = log.base_folder(model);
        moved = data_folder::rename(files.path(), &path);
        names.push(name.clone());
        if moved.is_err() {
            break;
        }
        base.origin = Some(Origin {
            kind: Some(origin::Kind::Saved(name)),
        });
        items.push(Item::Base {
            model,
            base: Box::new(base),
            through: Some(through),
        });
    }
    let appended = match moved {
        Ok(()) => log.append("", 0, items, Vec::new()).map(drop),
        Err(error) => Err(Error::io("keeping the state of a model", error)),
    };
    appended.inspect_err(|_| names.iter().for_each(|name| log.remove_base(name)))
}
