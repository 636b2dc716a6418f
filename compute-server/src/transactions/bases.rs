//! Saving new bases for the commit log, so that a restart has little to compute again.

use std::sync::Arc;

use crate::app::App;
use crate::commit_log::{CommitLog, Item, Origin, origin};
use crate::data_folder;
use crate::error::{Error, Result};
use crate::names::ModelKey;
use crate::owner::ModelHandle;

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

    /// Saves a model; false when its state does not allow it now.
    async fn save_base(&self, log: &Arc<CommitLog>, model: &ModelHandle) -> Result<bool> {
        let Some(saving) = model.call(|owner| owner.begin_saving_base()).await? else {
            return Ok(false);
        };
        let (mut base, through) = saving.base.clone();
        let files = saving.write(self.folder.stage(), self.library(model), None).await?;
        // While nothing is published, the model stays as it is in the log.
        let _one_at_a_time = self.transactions.publishing.lock().await;
        if !log.knows(model.id()) {
            return Ok(false);
        }
        let (log, id) = (Arc::clone(log), model.id());
        let begun = tokio::task::spawn_blocking(move || {
            let (name, path) = log.base_folder(id);
            data_folder::rename(files.path(), &path)
                .map_err(|error| Error::io("keeping the state of a model", error))?;
            base.origin = Some(Origin {
                kind: Some(origin::Kind::Saved(name.clone())),
            });
            let item = Item::Base {
                model: id,
                base: Box::new(base),
                through: Some(through),
            };
            log.append("", 0, vec![item], Vec::new())
                .inspect_err(|_| log.remove_base(&name))
        });
        let begun = begun.await;
        begun.map_err(|error| Error::Internal(format!("writing the commit log failed: {error}")))??;
        Ok(true)
    }
}
