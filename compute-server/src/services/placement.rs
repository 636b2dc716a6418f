//! Which thread answers a request that only reads weights.

use crate::error::Result;
use crate::owner::{AppliedAdapter, ModelHandle, View};
use crate::transactions::Reader;

/// Where a generation or a score runs.
pub(super) struct Placement {
    /// What was asked for.
    pub(super) asked: ModelHandle,
    /// Whose thread does it.
    pub(super) model: ModelHandle,
    /// Whose weights it uses.
    pub(super) view: View,
    /// The adapter that is added to them.
    pub(super) adapter: Option<AppliedAdapter>,
}

/// The model's own thread, in one batch with everything else on its committed weights; or the adapter's, where the
/// transaction has changed the adapter and sees that alone.
///
/// # Errors
/// As [`Reader::find`]; `Memory` for what an adapter needs in the batch.
pub(super) async fn place(reader: &Reader, model: &str, adapter: &str) -> Result<Placement> {
    let found = reader.find(model, adapter)?;
    let view = reader.view();
    if found.changes_weights(&view) {
        return Ok(Placement {
            asked: found.clone(),
            model: found,
            view,
            adapter: None,
        });
    }
    let (model, adapter) = match adapter {
        "" => (found.clone(), None),
        _ => (reader.model(model)?, Some(found.applied().await?)),
    };
    Ok(Placement {
        asked: found,
        model,
        view: View::Committed,
        adapter,
    })
}
