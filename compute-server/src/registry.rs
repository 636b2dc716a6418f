//! The published models and adapters by name.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use crate::names::ModelKey;
use crate::owner::ModelHandle;

/// The models and adapters that everybody sees.
#[derive(Default)]
pub(crate) struct Registry {
    models: RwLock<BTreeMap<ModelKey, ModelHandle>>,
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
