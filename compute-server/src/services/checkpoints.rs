//! `CheckpointsService`.

use candle_compute_proto::v1;
use candle_compute_proto::v1::checkpoints_service_server::CheckpointsService;
use tonic::{Request, Response, Status};

use super::Service;
use crate::access::Caller;
use crate::checkpoints;
use crate::error::Error;
use crate::names::{MAX_NAME_CHARACTERS, ModelKey};
use crate::transactions::{Reader, Scope, WriteKind};

#[tonic::async_trait]
impl CheckpointsService for Service {
    async fn create_checkpoint(
        &self,
        request: Request<v1::CreateCheckpointRequest>,
    ) -> Result<Response<v1::CreateCheckpointResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        if request.tag.chars().count() > MAX_NAME_CHARACTERS {
            return Err(Error::invalid(format!("the tag has more than {MAX_NAME_CHARACTERS} characters")).into());
        }
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let model = scope.find(&request.model, &request.adapter)?;
        let step = model.describe(&scope.view()).step;
        let key = (model.key().to_text(), step);
        if scope
            .reader()
            .is_some_and(|reader| reader.checkpoint_path(&key).is_some())
        {
            return Err(checkpoints::taken(&key).into());
        }
        let guard = self.app.requests.begin(&caller, "checkpoint", &request.model)?;
        let (view, tag) = (scope.view(), request.tag);
        let saving = model.call(move |owner| owner.begin_saving(&view, &tag)).await?;
        let files = saving
            .write(self.app.checkpoints.stage(), self.app.library(&model), Some(guard))
            .await?;
        let staged = self.app.checkpoints.describe(&key.0, files)?;
        let row = staged.row.clone();
        scope.push(WriteKind::CreateCheckpoint(staged))?;
        scope.close().await?;
        Ok(Response::new(v1::CreateCheckpointResponse {
            checkpoint: Some(checkpoints::published_row(row)),
        }))
    }

    async fn list_checkpoints(
        &self,
        request: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let rows = reader.checkpoints().into_iter().map(checkpoints::published_row);
        let wanted = |row: &v1::Checkpoint| {
            row.adapter == request.adapter && (request.models.is_empty() || request.models.contains(&row.model))
        };
        let checkpoints = rows.filter(wanted).collect();
        Ok(Response::new(v1::ListCheckpointsResponse { checkpoints }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<v1::DeleteCheckpointRequest>,
    ) -> Result<Response<v1::DeleteCheckpointResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let key = (ModelKey::new(&request.model, &request.adapter).to_text(), request.step);
        if scope
            .reader()
            .is_none_or(|reader| reader.checkpoint_path(&key).is_none())
        {
            return Err(checkpoints::not_found(&key).into());
        }
        scope.push(WriteKind::DeleteCheckpoint(key))?;
        scope.close().await?;
        Ok(Response::new(v1::DeleteCheckpointResponse {}))
    }
}
