//! The published models and adapters by name.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use candle_compute_proto::v1;

use crate::error::Error;
use crate::names::ModelKey;
use crate::owner::ModelHandle;

/// The models and adapters that everybody sees.
#[derive(Default)]
pub(crate) struct Registry {
    models: RwLock<BTreeMap<ModelKey, ModelHandle>>,
    unavailable: RwLock<BTreeMap<ModelKey, Unavailable>>,
}

/// A model or adapter that could not be made again after a restart.
#[derive(Debug, Clone)]
pub(crate) struct Unavailable {
    /// Its numbers in the commit log: its own, then those of its adapters.
    pub(crate) ids: Vec<u64>,
    /// What is known of a model, or of an adapter's.
    pub(crate) row: v1::Model,
    /// What was in the way.
    pub(crate) reason: String,
}

impl Registry {
    /// The model or adapter called `key`.
    pub(crate) fn find(&self, key: &ModelKey) -> Option<ModelHandle> {
        self.models
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned()
    }

    /// The error for a model or adapter that cannot be used: there is none, or it could not be made again.
    pub(crate) fn missing(&self, key: &ModelKey) -> Error {
        match self.unavailable(key) {
            Some(unavailable) => Error::Unrecovered {
                kind: key.kind(),
                name: key.to_string(),
                reason: unavailable.reason,
            },
            None => Error::NotFound {
                kind: key.kind(),
                name: key.to_string(),
            },
        }
    }

    /// The model or adapter called `key`, if it could not be made again.
    pub(crate) fn unavailable(&self, key: &ModelKey) -> Option<Unavailable> {
        let models = self.unavailable.read().unwrap_or_else(PoisonError::into_inner);
        models.get(key).cloned()
    }

    /// Whether an adapter of `model` could not be made again.
    pub(crate) fn has_unavailable_adapter(&self, model: &str) -> bool {
        let models = self.unavailable.read().unwrap_or_else(PoisonError::into_inner);
        models.keys().any(|key| key.model == model && key.adapter.is_some())
    }

    /// Models that could not be made again, in the order of their names.
    pub(crate) fn unavailable_models(&self) -> Vec<Unavailable> {
        let models = self.unavailable.read().unwrap_or_else(PoisonError::into_inner);
        let models = models.iter().filter(|(key, _)| key.adapter.is_none());
        models.map(|(_, model)| model.clone()).collect()
    }

    /// Adds a model or adapter that could not be made again.
    pub(crate) fn add_unavailable(&self, key: ModelKey, model: Unavailable) {
        let mut models = self.unavailable.write().unwrap_or_else(PoisonError::into_inner);
        models.insert(key, model);
    }

    /// Forgets a model or adapter that could not be made again.
    pub(crate) fn forget_unavailable(&self, key: &ModelKey) {
        let mut models = self.unavailable.write().unwrap_or_else(PoisonError::into_inner);
        models.remove(key);
    }

    /// All models and adapters in the order of their names, each model before its adapters.
    pub(crate) fn list(&self) -> Vec<ModelHandle> {
        self.models
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// Adds a model.
    pub(crate) fn insert(&self, model: ModelHandle) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.insert(model.key(), model);
    }

    /// Removes a model, unless another one has its name by now.
    pub(crate) fn remove(&self, model: &ModelHandle) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        let key = model.key();
        if models.get(&key).is_some_and(|present| present.is(model)) {
            models.remove(&key);
        }
    }
}
