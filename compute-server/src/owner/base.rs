//! The weights of a model as its adapters share them, each from a thread of its own.
//!
//! An adapter computes on the very storage of its model's weights, which a published step changes in place. So adapters
//! hold this lock for reading while they work, a token or a micro-batch at a time, and the model's thread holds it for
//! writing while it publishes a change.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_models::Decoder;

use super::settings::TrainingSettings;
use super::state::Owner;
use super::{TransactionId, View};
use crate::error::Result;

/// A model's committed weights and training settings.
pub(crate) struct BaseState {
    /// Shares the storage of the model's own.
    pub(crate) decoder: Decoder,
    pub(crate) settings: TrainingSettings,
    /// Grows with every change of the weights.
    weights_version: u64,
    /// Grows with every change.
    version: u64,
}

/// [`BaseState`] behind its lock.
pub(crate) struct Base(RwLock<BaseState>);

impl Base {
    pub(super) fn new(decoder: &Decoder, settings: &TrainingSettings) -> Self {
        Self(RwLock::new(BaseState {
            decoder: decoder.share(),
            settings: settings.clone(),
            weights_version: 0,
            version: 0,
        }))
    }

    /// Whether an adapter computes on them.
    pub(super) fn is_followed(self: &Arc<Self>) -> bool {
        // The model's own, and one for each adapter.
        Arc::strong_count(self) > 1
    }

    /// The weights, which stay as they are until the guard is dropped.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, BaseState> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BaseState> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an adapter's thread knows of its model.
pub(super) struct Followed {
    base: Arc<Base>,
    weights_version: u64,
    version: u64,
}

impl Followed {
    pub(super) fn new(base: Arc<Base>) -> Self {
        // Whatever was published since the adapter was made is followed first.
        Self {
            base,
            weights_version: u64::MAX,
            version: u64::MAX,
        }
    }
}

impl Owner {
    /// Does some work while the weights of an adapter's model stay as they are.
    pub(super) fn on_base<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let Some(base) = self.followed.as_ref().map(|followed| Arc::clone(&followed.base)) else {
            return work(self);
        };
        let state = base.read();
        if let Err(error) = self.follow(&state) {
            tracing::error!(model = %self.shared.name, %error, "an adapter does not fit its model any more");
            self.shared.set_failed();
        }
        work(self)
    }

    /// Takes over what has changed of an adapter's model.
    fn follow(&mut self, state: &BaseState) -> Result<()> {
        let Some(followed) = self
            .followed
            .as_mut()
            .filter(|followed| followed.version != state.version)
        else {
            return Ok(());
        };
        followed.version = state.version;
        self.settings = state.settings.clone();
        if followed.weights_version != state.weights_version {
            let first = followed.weights_version == u64::MAX;
            followed.weights_version = state.weights_version;
            self.model.decoder.share_base(&state.decoder)?;
            // What transactions staged on the weights before is stale.
            self.versions.weights += u64::from(!first);
            self.forget_stale_pages();
        }
        self.describe_committed();
        Ok(())
    }

    /// Lets an adapter look at its model anew before its next work.
    pub(super) fn forget_base(&mut self) {
        if let Some(followed) = &mut self.followed {
            followed.version = u64::MAX;
            followed.weights_version = u64::MAX;
        }
    }

    /// [`apply`](Self::apply). Waits for the token or the micro-batch that adapters are at where that changes weights or
    /// settings.
    pub(super) fn apply_beside_adapters(&mut self, id: &TransactionId, sealed: usize) -> Result<()> {
        let changes = self
            .overlay(&View::Transaction(Arc::clone(id)))
            .is_some_and(|overlay| overlay.changes().next().is_some() || overlay.settings().is_some());
        if !changes {
            return self.apply_staged(id, sealed);
        }
        let base = Arc::clone(&self.shared.base);
        let mut state = base.write();
        let weights = self.versions.weights;
        let applied = self.apply_staged(id, sealed);
        state.decoder = self.model.decoder.share();
        state.settings = self.settings.clone();
        state.weights_version += u64::from(self.versions.weights != weights);
        state.version += 1;
        applied
    }
}
