//! Models and adapters by one name: `model`, or `model:adapter`.

use crate::app::App;
use crate::names::ModelKey;

/// The name of a model or adapter.
pub(super) fn id(key: &ModelKey) -> String {
    match &key.adapter {
        None => key.model.clone(),
        Some(adapter) => format!("{}:{adapter}", key.model),
    }
}

/// What `id` means. A model that has the whole of it as its name comes first, then the longest model name before a
/// colon whose adapter there is. What nothing is called is taken as a model's name.
pub(super) fn resolve(app: &App, id: &str) -> ModelKey {
    let whole = ModelKey::new(id, "");
    if app.registry.find(&whole).is_some() {
        return whole;
    }
    let mut splits = id.match_indices(':').collect::<Vec<_>>();
    splits.reverse();
    // Names are short, and so is what is worth looking for.
    let splits = splits
        .into_iter()
        .take(16)
        .map(|(at, _)| ModelKey::new(&id[..at], &id[at + 1..]));
    let known = |key: &ModelKey| app.registry.find(key).is_some() || app.registry.unavailable(key).is_some();
    splits
        .into_iter()
        .filter(|key| key.adapter.is_some())
        .find(known)
        .unwrap_or(whole)
}
