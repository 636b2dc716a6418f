//! `TrainingService`.

use candle_compute_proto::v1;
use candle_compute_proto::v1::training_service_server::TrainingService;
use candle_models::ParameterInfo;
use candle_models::training::{Gradient, TrainingSequence};
use tonic::{Request, Response, Status};

use super::{ResponseStream, Service, connection};
use crate::chunks;
use crate::error::{Error, Result};
use crate::owner::{ChunkReader, ModelHandle, OutputStream, Selection, Step, Target, TrainingRequest};
use crate::transactions::{Reader, Scope};

#[tonic::async_trait]
impl TrainingService for Service {
    type BackwardStream = ResponseStream<v1::BackwardResponse>;
    type ReadGradientsStream = OutputStream<v1::ReadGradientsResponse, v1::ReadGradientsResponse>;

    async fn accumulate_batches(
        &self,
        request: Request<v1::AccumulateBatchesRequest>,
    ) -> Result<Response<v1::AccumulateBatchesResponse>, Status> {
        let connection = connection(&request);
        let v1::AccumulateBatchesRequest {
            transaction,
            model,
            sequences,
        } = request.into_inner();
        let scope = Scope::open(&self.app, transaction.as_ref(), connection)?;
        let handle = scope.model(&model)?;
        let target = Target::Stage(scope.ticket());
        let work = self.training_request(&handle, sequences, target)?;
        let trained = scope.train(&handle, work).await?;
        scope.close().await?;
        let losses = trained.losses.iter().map(loss_to_proto).collect();
        Ok(Response::new(v1::AccumulateBatchesResponse { losses }))
    }

    async fn list_batches(
        &self,
        request: Request<v1::ListBatchesRequest>,
    ) -> Result<Response<v1::ListBatchesResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let mut sequences = Vec::new();
        for model in models(&reader, &request.models) {
            let view = reader.view();
            match model.call(move |owner| Ok(owner.sequences(&view))).await {
                Err(Error::Unloaded(_)) => {}
                rows => sequences.extend(rows?),
            }
        }
        Ok(Response::new(v1::ListBatchesResponse { sequences }))
    }

    async fn backward(&self, request: Request<v1::BackwardRequest>) -> Result<Response<Self::BackwardStream>, Status> {
        let v1::BackwardRequest {
            transaction,
            model,
            sequences,
            selection,
        } = request.into_inner();
        let reader = Reader::open(&self.app, transaction.as_ref())?;
        let handle = reader.model(&model)?;
        let work = self.training_request(&handle, sequences, Target::Return(reader.view()))?;
        let trained = handle
            .start_work(move |owner, reply| owner.submit_training(work, reply))
            .await?;
        let losses = trained.losses.iter().map(loss_to_proto).collect();
        let gradient = trained
            .part
            .ok_or_else(|| Error::Internal("a gradient was lost".to_owned()))?;
        let stream = GradientStream {
            first: Some(v1::BackwardResponse { losses, chunk: None }),
            handle,
            selection: Selection::new(selection),
            next: (0, 0),
        };
        let messages = std::iter::from_fn({
            let mut stream = stream;
            move || stream.next(gradient.gradient())
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn read_gradients(
        &self,
        request: Request<v1::ReadGradientsRequest>,
    ) -> Result<Response<Self::ReadGradientsStream>, Status> {
        let v1::ReadGradientsRequest {
            transaction,
            model,
            selection,
        } = request.into_inner();
        let reader = Reader::open(&self.app, transaction.as_ref())?;
        let handle = reader.model(&model)?;
        let (output, stream) = OutputStream::channel(&handle, |message: v1::ReadGradientsResponse| {
            if message.chunk.is_some() {
                Step::Next(message)
            } else {
                Step::End
            }
        });
        let chunks = ChunkReader::gradients(reader.view(), Selection::new(selection), output);
        handle
            .call(move |owner| {
                owner.add_reader(chunks);
                Ok(())
            })
            .await?;
        Ok(Response::new(stream))
    }

    async fn zero_gradients(
        &self,
        request: Request<v1::ZeroGradientsRequest>,
    ) -> Result<Response<v1::ZeroGradientsResponse>, Status> {
        let connection = connection(&request);
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), connection)?;
        let model = scope.model(&request.model)?;
        scope.change(&model, |owner, ticket| owner.stage_zero(ticket)).await?;
        scope.close().await?;
        Ok(Response::new(v1::ZeroGradientsResponse {}))
    }

    async fn step(&self, request: Request<v1::StepRequest>) -> Result<Response<v1::StepResponse>, Status> {
        let connection = connection(&request);
        let v1::StepRequest {
            transaction,
            model,
            options,
        } = request.into_inner();
        let scope = Scope::open(&self.app, transaction.as_ref(), connection)?;
        let handle = scope.model(&model)?;
        let guard = self.app.requests.begin("step", &model);
        let options = options.unwrap_or_default();
        let step = scope
            .change(&handle, move |owner, ticket| owner.stage_step(ticket, &options))
            .await?;
        scope.close().await?;
        drop(guard);
        Ok(Response::new(v1::StepResponse { step: Some(step) }))
    }

    async fn list_steps(
        &self,
        request: Request<v1::ListStepsRequest>,
    ) -> Result<Response<v1::ListStepsResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let mut steps = Vec::new();
        for model in models(&reader, &request.models) {
            let view = reader.view();
            match model.call(move |owner| Ok(owner.log(&view))).await {
                Err(Error::Unloaded(_)) => {}
                rows => steps.extend(rows?),
            }
        }
        Ok(Response::new(v1::ListStepsResponse { steps }))
    }
}

impl Service {
    /// Checks sequences.
    fn training_request(
        &self,
        model: &ModelHandle,
        rows: Vec<v1::Sequence>,
        target: Target,
    ) -> Result<TrainingRequest> {
        if rows.is_empty() {
            return Err(Error::invalid("sequences is empty; at least one is needed"));
        }
        self.app
            .check_request_tokens(rows.iter().map(|row| row.token_ids.len() as u64).sum())?;
        let config = &model.facts().decoder_config;
        let check = |row: &v1::Sequence| {
            let targets = (row.has_targets || !row.targets.is_empty()).then_some(row.targets.as_slice());
            Ok(TrainingSequence::new(&row.token_ids, targets, row.loss_weight, config)?)
        };
        let sequences = rows.iter().map(check).collect::<Result<_>>()?;
        Ok(TrainingRequest {
            target,
            sequences,
            rows,
            request: self.app.requests.begin("batch", model.name()),
        })
    }
}

/// The models of a request: those named, or all.
fn models(reader: &Reader, names: &[String]) -> Vec<ModelHandle> {
    let models = reader.models().into_iter().map(|(model, _)| model);
    models
        .filter(|model| names.is_empty() || names.iter().any(|name| name == model.name()))
        .collect()
}

fn loss_to_proto(loss: &candle_models::training::SequenceLoss) -> v1::SequenceLoss {
    v1::SequenceLoss {
        loss: loss.loss,
        token_count: loss.token_count,
    }
}

/// Makes the messages of `Backward` as the client reads them.
struct GradientStream {
    first: Option<v1::BackwardResponse>,
    handle: ModelHandle,
    selection: Selection,
    /// Parameter and chunk to be looked at next.
    next: (usize, usize),
}

impl GradientStream {
    fn next(&mut self, gradient: &Gradient) -> Option<Result<v1::BackwardResponse, Status>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        let parameters: &[ParameterInfo] = &self.handle.facts().parameters;
        let (index, chunk) = self.selection.next(parameters, &mut self.next)?;
        let chunk = chunks::gradient_chunk(&[gradient], &parameters[index], chunk, self.selection.without_data);
        let message = chunk.map(|chunk| v1::BackwardResponse {
            losses: Vec::new(),
            chunk: Some(chunk),
        });
        Some(message.map_err(Status::from))
    }
}
