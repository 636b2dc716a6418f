//! `EvaluationsService`.

use candle_compute_proto::v1;
use candle_compute_proto::v1::evaluations_service_server::EvaluationsService;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Service;
use super::evaluating::Run;
use crate::access::Caller;
use crate::error::Error;
use crate::evaluations;
use crate::transactions::{Reader, Scope, WriteKind};

#[tonic::async_trait]
impl EvaluationsService for Service {
    type EvaluateStream = ReceiverStream<Result<v1::EvaluateResponse, Status>>;

    async fn evaluate(
        &self,
        request: Request<Streaming<v1::EvaluateRequest>>,
    ) -> Result<Response<Self::EvaluateStream>, Status> {
        let caller = Caller::of(&request)?;
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|first| first.message);
        let Some(v1::evaluate_request::Message::Start(start)) = first else {
            return Err(Error::invalid("the first message of Evaluate must be start").into());
        };
        let run = Run::begin(&self.app, caller, start)?;
        Ok(Response::new(run.follow(messages)))
    }

    async fn list_evaluations(
        &self,
        request: Request<v1::ListEvaluationsRequest>,
    ) -> Result<Response<v1::ListEvaluationsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let mut evaluations = reader.evaluations();
        evaluations.retain(|row| {
            let wanted = request.models.is_empty() || request.models.contains(&row.model);
            wanted && caller.may_manage(&row.tenant)
        });
        Ok(Response::new(v1::ListEvaluationsResponse { evaluations }))
    }

    async fn delete_evaluation(
        &self,
        request: Request<v1::DeleteEvaluationRequest>,
    ) -> Result<Response<v1::DeleteEvaluationResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let rows = scope.reader().map(Reader::evaluations).unwrap_or_default();
        let own = |row: &v1::Evaluation| row.id == request.id && caller.may_manage(&row.tenant);
        if !rows.iter().any(own) {
            return Err(evaluations::not_found(request.id).into());
        }
        scope.push(WriteKind::DeleteEvaluation(request.id))?;
        scope.close().await?;
        Ok(Response::new(v1::DeleteEvaluationResponse {}))
    }
}
