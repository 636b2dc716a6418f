//! The published models by name.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use crate::owner::ModelHandle;

/// The models that everybody sees.
#[derive(Default)]
pub(crate) struct Registry {
    models: RwLock<BTreeMap<String, ModelHandle>>,
}

impl Registry {
    /// The model called `name`.
    pub(crate) fn find(&self, name: &str) -> Option<ModelHandle> {
        self.models
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// All models in the order of their names.
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
        models.insert(model.name().to_owned(), model);
    }

    /// Removes a model, unless another one has its name by now.
    pub(crate) fn remove(&self, model: &ModelHandle) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        if models.get(model.name()).is_some_and(|present| present.is(model)) {
            models.remove(model.name());
        }
    }
}
