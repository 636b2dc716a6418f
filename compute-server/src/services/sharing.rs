//! Changing which layers of a model share their parameters.

use std::sync::Arc;

use crate::app::App;
use crate::error::{Error, Result};
use crate::owner::{ModelHandle, TrainingSettings};
use crate::transactions::{Scope, WriteKind};

/// Stages that the layers of `model` share their parameters in `groups` groups, and are trained with `settings`: another
/// model takes its place, with what the blocks of a group find in its first one. Returns that model.
///
/// # Errors
/// As [`stage_replacement`](crate::owner::Owner::stage_replacement); `Memory` and `Limit` for the further model.
pub(super) async fn change(
    app: &Arc<App>,
    scope: &Scope,
    model: &ModelHandle,
    groups: usize,
    settings: TrainingSettings,
) -> Result<ModelHandle> {
    let slot = app.model_slot()?;
    let legacy = scope
        .change(model, |owner, ticket| owner.stage_replacement(ticket))
        .await?;
    let tenant = app.tenants.tenant(legacy.tenant());
    let memory = tenant
        .memory()
        .reserve("the model with another \"share\"", legacy.bytes_with(groups))?;
    let files = app.log.as_ref().map(|_| app.folder.stage());
    let made = tokio::task::spawn_blocking(move || legacy.succeed(groups, settings, (tenant, memory), files)).await;
    let mut new = made.map_err(|error| Error::Internal(format!("changing \"share\" failed: {error}")))??;
    new.slot = Some(slot);
    let new = ModelHandle::start(new, app.config.limits, &app.expert_access)?;
    scope.push(WriteKind::ReplaceModel {
        old: model.clone(),
        new: new.clone(),
    })?;
    Ok(new)
}
