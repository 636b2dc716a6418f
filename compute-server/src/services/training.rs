//! `TrainingService`.

use candle_compute_proto::v1;
use candle_compute_proto::v1::training_service_server::TrainingService;
use candle_models::ParameterInfo;
use candle_models::training::{Gradient, TrainingSequence};
use tonic::{Request, Response, Status, Streaming};

use super::{ResponseStream, Service, losses};
use crate::access::Caller;
use crate::chunks;
use crate::error::{Error, Result};
use crate::names::ModelKey;
use crate::owner::{
    ChunkReader, GradientChunk, ModelHandle, OutputStream, Selection, SourceWeight, Step, Target, TrainingRequest,
    unknown_parameter,
};
use crate::requests::Phase;
use crate::transactions::{Reader, Scope};

/// Most targets and sequences that a merged gradient may be the mean over: f64 counts them exactly.
const MOST_WEIGHT: u64 = 1 << 53;

/// What needs memory while a stream of tensors comes in.
const RECEIVED: &str = "receiving tensors";

#[tonic::async_trait]
impl TrainingService for Service {
    type BackwardStream = ResponseStream<v1::BackwardResponse>;
    type ReadGradientsStream = OutputStream<v1::ReadGradientsResponse, v1::ReadGradientsResponse>;

    async fn accumulate_batches(
        &self,
        request: Request<v1::AccumulateBatchesRequest>,
    ) -> Result<Response<v1::AccumulateBatchesResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::AccumulateBatchesRequest {
            transaction,
            model,
            sequences,
            adapter,
        } = request.into_inner();
        let scope = Scope::open(&self.app, transaction.as_ref(), &caller)?;
        let handle = scope.find(&model, &adapter)?;
        let target = Target::Stage(scope.ticket());
        let work = self.training_request(&caller, &handle, sequences, target)?;
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
        for model in models(&reader, &request.models, &request.adapter) {
            let view = reader.view();
            match model.call(move |owner| Ok(owner.sequences(&view))).await {
                Err(Error::Unloaded(_)) => {}
                rows => sequences.extend(rows?),
            }
        }
        Ok(Response::new(v1::ListBatchesResponse { sequences }))
    }

    async fn backward(&self, request: Request<v1::BackwardRequest>) -> Result<Response<Self::BackwardStream>, Status> {
        let caller = Caller::of(&request)?;
        let v1::BackwardRequest {
            transaction,
            model,
            sequences,
            selection,
            adapter,
        } = request.into_inner();
        let reader = Reader::open(&self.app, transaction.as_ref())?;
        let handle = reader.find(&model, &adapter)?;
        let work = self.training_request(&caller, &handle, sequences, Target::Return(reader.view()))?;
        let trained = handle
            .start_work(move |owner, reply| owner.submit_training(work, reply))
            .await?;
        let losses = trained.losses.iter().map(loss_to_proto).collect();
        let gradient = trained
            .part
            .ok_or_else(|| Error::Internal("a gradient was lost".to_owned()))?;
        let stream = GradientStream {
            first: Some(v1::BackwardResponse { losses, chunk: None }),
            next: (handle.facts().own_parameters.start, 0),
            handle,
            selection: Selection::new(selection),
        };
        let messages = std::iter::from_fn({
            let mut stream = stream;
            move || stream.next(gradient.gradient())
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn compute_losses(
        &self,
        request: Request<v1::ComputeLossesRequest>,
    ) -> Result<Response<v1::ComputeLossesResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::ComputeLossesRequest {
            transaction,
            model,
            sequences,
            adapter,
        } = request.into_inner();
        let reader = Reader::open(&self.app, transaction.as_ref())?;
        let handle = reader.find(&model, &adapter)?;
        let sequences = self.check_sequences(&handle, &sequences)?;
        let request = self.app.requests.begin(&caller, "losses", model.as_str())?;
        let losses = losses::compute(&handle, reader.view(), sequences, request).await?;
        Ok(Response::new(v1::ComputeLossesResponse { losses }))
    }

    async fn read_gradients(
        &self,
        request: Request<v1::ReadGradientsRequest>,
    ) -> Result<Response<Self::ReadGradientsStream>, Status> {
        let v1::ReadGradientsRequest {
            transaction,
            model,
            selection,
            adapter,
        } = request.into_inner();
        let reader = Reader::open(&self.app, transaction.as_ref())?;
        let handle = reader.find(&model, &adapter)?;
        let (output, stream) = OutputStream::channel(&handle, |message: v1::ReadGradientsResponse| {
            if message.chunk.is_some() {
                Step::Next(message)
            } else {
                Step::End
            }
        });
        let chunks = ChunkReader::gradients(reader.view(), Selection::new(selection), output);
        handle.add_reader(chunks).await?;
        Ok(Response::new(stream))
    }

    async fn merge_gradients(
        &self,
        request: Request<Streaming<v1::MergeGradientsRequest>>,
    ) -> Result<Response<v1::MergeGradientsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut messages = request.into_inner();
        let first = first_message(&mut messages).await?;
        let scope = Scope::open(&self.app, first.transaction.as_ref(), &caller)?;
        let handle = scope.find(&first.model, &first.adapter)?;
        let guard = self.app.requests.begin(&caller, "merge", &first.model)?;
        let set = first.set_id;
        let mut held = caller.tenant.memory().reserve(RECEIVED, 0)?;
        let mut chunks = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            let chunk = gradient_chunk(&handle, &message)?;
            held.resize(RECEIVED, held.bytes() + 4 * chunk.chunk.values.len() as u64)?;
            chunks.push(chunk);
            next = messages.message().await?;
        }
        let count = chunks.len() as u64;
        guard.set_phase(Phase::Running);
        scope
            .change(&handle, move |owner, ticket| {
                // Held until what was received is dropped.
                let _held = held;
                owner.stage_merge(ticket, set, &chunks)
            })
            .await?;
        scope.close().await?;
        Ok(Response::new(v1::MergeGradientsResponse { chunks: count }))
    }

    async fn write_parameters(
        &self,
        request: Request<Streaming<v1::WriteParametersRequest>>,
    ) -> Result<Response<v1::WriteParametersResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut messages = request.into_inner();
        let first = first_message(&mut messages).await?;
        let scope = Scope::open(&self.app, first.transaction.as_ref(), &caller)?;
        let handle = scope.find(&first.model, &first.adapter)?;
        let mut held = caller.tenant.memory().reserve(RECEIVED, 0)?;
        let mut writes = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            let bytes = message.chunk.as_ref().map_or(0, |chunk| chunk.data.len() as u64);
            held.resize(RECEIVED, held.bytes() + bytes)?;
            writes.push(message);
            next = messages.message().await?;
        }
        let count = writes.len() as u64;
        scope
            .change(&handle, move |owner, ticket| {
                // Held until what was received is dropped.
                let _held = held;
                owner.stage_writes(ticket, &writes)
            })
            .await?;
        scope.close().await?;
        Ok(Response::new(v1::WriteParametersResponse { writes: count }))
    }

    async fn zero_gradients(
        &self,
        request: Request<v1::ZeroGradientsRequest>,
    ) -> Result<Response<v1::ZeroGradientsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let model = scope.find(&request.model, &request.adapter)?;
        scope
            .change_settled(&model, |owner, ticket| owner.stage_zero(ticket))
            .await?;
        scope.close().await?;
        Ok(Response::new(v1::ZeroGradientsResponse {}))
    }

    async fn step(&self, request: Request<v1::StepRequest>) -> Result<Response<v1::StepResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::StepRequest {
            transaction,
            model,
            options,
            adapter,
        } = request.into_inner();
        let scope = Scope::open(&self.app, transaction.as_ref(), &caller)?;
        let handle = scope.find(&model, &adapter)?;
        let guard = self.app.requests.begin(&caller, "step", &model)?;
        let options = options.unwrap_or_default();
        let step = scope
            .change_settled(&handle, move |owner, ticket| owner.stage_step(ticket, &options))
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
        for model in models(&reader, &request.models, &request.adapter) {
            let view = reader.view();
            match model.call(move |owner| Ok(owner.log(&view))).await {
                Err(Error::Unloaded(_)) => {}
                rows => steps.extend(rows?),
            }
        }
        Ok(Response::new(v1::ListStepsResponse { steps }))
    }

    async fn list_tape(&self, request: Request<v1::ListTapeRequest>) -> Result<Response<v1::ListTapeResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let mut entries = Vec::new();
        for model in models(&reader, &request.models, &request.adapter) {
            match model.call(|owner| Ok(owner.tape())).await {
                Err(Error::Unloaded(_)) => {}
                rows => entries.extend(rows?),
            }
        }
        Ok(Response::new(v1::ListTapeResponse { entries }))
    }
}

impl Service {
    /// Checks sequences.
    fn training_request(
        &self,
        caller: &Caller,
        model: &ModelHandle,
        rows: Vec<v1::Sequence>,
        target: Target,
    ) -> Result<TrainingRequest> {
        let sequences = self.check_sequences(model, &rows)?;
        Ok(TrainingRequest {
            target,
            sequences,
            rows,
            request: self.app.requests.begin(caller, "batch", model.name())?,
        })
    }
}

impl Service {
    fn check_sequences(&self, model: &ModelHandle, rows: &[v1::Sequence]) -> Result<Vec<TrainingSequence>> {
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
        rows.iter().map(check).collect()
    }
}

/// The first message of a stream, which says where the others belong.
async fn first_message<T>(messages: &mut Streaming<T>) -> Result<T, Status> {
    let first = messages.message().await?;
    first.ok_or_else(|| Error::invalid("the stream is empty").into())
}

/// Checks a chunk of a gradient, but for whether its parameter is trained.
fn gradient_chunk(model: &ModelHandle, message: &v1::MergeGradientsRequest) -> Result<GradientChunk> {
    let chunk = message.chunk.as_ref();
    let chunk = chunk.ok_or_else(|| Error::invalid("a message has no chunk"))?;
    let parameters = &model.facts().parameters;
    let parameter = parameters
        .iter()
        .position(|parameter| parameter.is_listed() && parameter.name == chunk.name)
        .ok_or_else(|| unknown_parameter(model.name(), &chunk.name))?;
    let (tokens, micro_batches) = (message.tokens, message.micro_batches);
    if tokens > MOST_WEIGHT {
        return Err(Error::invalid(format!(
            "tokens must be at most {MOST_WEIGHT}, not {tokens}"
        )));
    }
    if !(1..=MOST_WEIGHT).contains(&micro_batches) {
        return Err(Error::invalid(format!(
            "micro_batches must be from 1 to {MOST_WEIGHT}, not {micro_batches}"
        )));
    }
    if let Some(loss) = message.loss.filter(|loss| !loss.is_finite()) {
        return Err(Error::invalid(format!("loss must be finite, not {loss}")));
    }
    let source = SourceWeight {
        tokens,
        micro_batches,
        loss: message.loss,
        rounding_losses: (message.overflows, message.underflows),
    };
    if message.accept_non_finite {
        return Ok(GradientChunk {
            parameter,
            chunk: chunks::receive_any(&parameters[parameter], chunk, v1::DataType::F32)?,
            weight: source,
            finite: false,
        });
    }
    let received = chunks::receive(&parameters[parameter], chunk, v1::DataType::F32)?;
    let largest = received
        .values
        .iter()
        // They are finite, and so a plain comparison will do, which is computed many at a time.
        .fold(
            0.0f32,
            |largest, value| if value.abs() > largest { value.abs() } else { largest },
        );
    if f64::from(largest) * tokens as f64 > f64::from(f32::MAX) {
        return Err(Error::invalid(format!(
            "parameter \"{}\", chunk {}: {largest} times the weight of {tokens} tokens exceeds the range of f32",
            chunk.name, received.number
        )));
    }
    Ok(GradientChunk {
        parameter,
        chunk: received,
        weight: source,
        finite: true,
    })
}

/// The models of a request: those named, or all; or of those the adapters called `adapter`, unless that is empty.
pub(super) fn models(reader: &Reader, names: &[String], adapter: &str) -> Vec<ModelHandle> {
    let all = match adapter {
        "" => reader.models(),
        _ => reader.adapters(),
    };
    let adapter = ModelKey::new("", adapter).adapter;
    all.into_iter()
        .map(|(model, _)| model)
        .filter(|model| names.is_empty() || names.iter().any(|name| name == model.name()))
        .filter(|model| model.key().adapter == adapter)
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
