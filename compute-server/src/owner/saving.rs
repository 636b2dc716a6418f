//! Saving the state of a model from another thread, while its own goes on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_models::Model;
use candle_models::training::AdamW;
use candle_models::training::checkpoint::{self, Library, Writing};
use serde_json::Value;

use super::handle::Shared;
use super::state::Owner;
use super::writing::set_trainable;
use super::{View, log_row};
use crate::commit_log::LogBase;
use crate::data_folder::Staged;
use crate::error::{Error, Result};
use crate::requests::{Phase, RequestGuard};

/// A state that is being saved. Nothing is published for its model as long as it lives: it shares the storage of weights
/// and moments, which a publish would change in place.
pub(crate) struct Saving {
    model: Model,
    optimizer: AdamW,
    details: checkpoint::Details,
    /// The model as a base of the commit log, and the last frame that the committed state includes.
    pub(crate) base: (LogBase, u64),
    _lease: Lease,
}

/// Counts as a save of a model.
struct Lease(Arc<Shared>);

impl Lease {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.saves.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(shared))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.saves.fetch_sub(1, Ordering::AcqRel);
        self.0.wake.notify_one();
    }
}

impl Saving {
    /// The model, whose weights share their storage with those in use.
    pub(super) fn model(&self) -> &Model {
        &self.model
    }

    /// Its optimizer, likewise.
    pub(super) fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// What is saved beside them.
    pub(super) fn details(&self) -> &checkpoint::Details {
        &self.details
    }

    /// Writes it to `files`, on a thread that may block. Stops and leaves nothing when `request` is cancelled, or when
    /// nobody waits any more.
    ///
    /// # Errors
    /// As [`checkpoint::save_with`].
    pub(crate) async fn write(self, files: Staged, library: Library, request: Option<RequestGuard>) -> Result<Staged> {
        let waiting = Arc::new(());
        let waited_for = Arc::downgrade(&waiting);
        let written = tokio::task::spawn_blocking(move || {
            let request = request.as_ref();
            request.inspect(|request| request.set_phase(Phase::Running));
            let writing = Writing {
                library: &library,
                cancelled: &|| waited_for.strong_count() == 0 || request.is_some_and(|request| request.is_cancelled()),
                progress: &|done, total| {
                    request.inspect(|request| request.set_progress(done, total));
                },
            };
            self.write_to(files.path(), &writing)?;
            Ok(files)
        });
        let written = written.await;
        drop(waiting);
        written.map_err(|error| Error::Internal(format!("saving failed: {error}")))?
    }

    fn write_to(self, directory: &Path, writing: &Writing<'_>) -> Result<()> {
        checkpoint::save_with(directory, &self.model, &self.optimizer, self.details, writing)?;
        Ok(())
    }
}

impl Owner {
    /// Begins to save the state that `view` sees.
    ///
    /// # Errors
    /// As [`decoder`](Self::decoder).
    pub(crate) fn begin_saving(&mut self, view: &View, tag: &str) -> Result<Saving> {
        self.materialize(view)?;
        let mut config = self.shared.config.clone();
        config.extend(self.settings(view).values().clone());
        let (model, optimizer) = match self.staged_state(view) {
            Some(state) => (&state.model, state.optimizer.as_ref().unwrap_or(&self.optimizer)),
            None => (&self.model, &self.optimizer),
        };
        let mut decoder = model.decoder.share();
        set_trainable(&mut decoder, &self.trainable(view));
        Ok(Saving {
            model: Model {
                decoder,
                tokenizer: model.tokenizer.clone(),
                chat_template: model.chat_template.clone(),
                end_tokens: model.end_tokens.clone(),
                config: Value::Object(config),
            },
            optimizer: optimizer.share(),
            details: checkpoint::Details {
                tag: tag.to_owned(),
                log: self.log(view).iter().map(log_row::to_json).collect(),
                loss_scale: self.loss_scale(view),
                seed: self.dropout_seed,
            },
            base: (self.shared.log_base(), self.applied),
            _lease: Lease::new(&self.shared),
        })
    }

    /// Begins to save the committed state as a base of the commit log. None while the state is more than what a checkpoint
    /// holds: between a batch and its step, as long as weights are held other than in f32, and for an adapter that has been
    /// merged.
    ///
    /// # Errors
    /// As [`begin_saving`](Self::begin_saving).
    pub(crate) fn begin_saving_base(&mut self) -> Result<Option<Saving>> {
        let decoder = &self.model.decoder;
        let parameters = &decoder.parameters()[decoder.own_parameters()];
        let whole = !decoder.is_merged()
            && self.accumulated.parts.is_empty()
            && self.publishing.is_none()
            && parameters.iter().all(|parameter| parameter.dtype == "f32");
        whole.then(|| self.begin_saving(&View::Committed, "")).transpose()
    }

    /// Whether weights are being saved, and must not be changed in place.
    pub(super) fn is_being_saved(&self) -> bool {
        self.shared.saves.load(Ordering::Acquire) > 0
    }

    /// Does `work` now, or once no save reads the weights any more.
    pub(crate) fn once_saved(&mut self, work: impl FnOnce(&mut Owner) + Send + 'static) {
        match self.is_being_saved() {
            false => work(self),
            true => self.waiting_for_saves.push(Box::new(work)),
        }
    }
}
