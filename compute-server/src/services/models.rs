//! `ModelsService`.

use candle_compute_proto::v1;
use candle_compute_proto::v1::models_service_server::ModelsService;
use candle_models::Tokenizer;
use candle_models::config::{self, TRAINING_FIELDS};
use serde_json::{Map, Value};
use tonic::{Request, Response, Status, Streaming};

use super::load::{self, Loading};
use super::sharing;
use super::{ResponseStream, Service};
use crate::access::Caller;
use crate::devices;
use crate::error::{Error, Result};
use crate::names::{self, ModelKey};
use crate::owner::{ChunkReader, ModelHandle, OutputStream, Owner, Selection, Step, Ticket, TrainingSettings};
use crate::requests::Phase;
use crate::tokenizers::TokenizerStore;
use crate::transactions::{Reader, Scope, WriteKind};

#[tonic::async_trait]
impl ModelsService for Service {
    type ListAttentionBlocksStream = ResponseStream<v1::ListAttentionBlocksResponse>;
    type ReadParametersStream = OutputStream<v1::ReadGradientsResponse, v1::ReadParametersResponse>;

    async fn load_model(
        &self,
        request: Request<v1::LoadModelRequest>,
    ) -> Result<Response<v1::LoadModelResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        names::validate("model", &request.name)?;
        let device = if request.device.is_empty() {
            &self.app.config.device
        } else {
            &request.device
        };
        let device = devices::open(device)?;
        let config = load::parse_config(&request.config_json)?;
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        if scope.named(&ModelKey::new(&request.name, "")).is_some() {
            return Err(Error::NameTaken {
                kind: "model",
                name: request.name,
            }
            .into());
        }
        let (source, staged_tokenizer) = {
            let reader = scope
                .reader()
                .ok_or_else(|| Error::Internal("a scope without a reader".to_owned()))?;
            let named = config.get("tokenizer").and_then(Value::as_str);
            let staged = named.and_then(|name| reader.staged_tokenizer(name));
            (load::locate(&self.app, reader, &request.source)?, staged)
        };
        let slot = self.app.model_slot()?;
        let in_transaction = request.transaction.is_some();
        let guard = self.app.requests.begin(&caller, "load", &request.name)?;
        guard.set_phase(Phase::Running);
        let (app, loading) = (
            std::sync::Arc::clone(&self.app),
            Loading {
                request,
                config,
                source,
                device,
                tenant: std::sync::Arc::clone(&caller.tenant),
                staged_tokenizer,
            },
        );
        let loaded = tokio::task::spawn_blocking(move || load::load(&app, loading)).await;
        let mut new = loaded.map_err(|error| Error::Internal(format!("loading failed: {error}")))??;
        new.slot = Some(slot);
        let model = ModelHandle::start(new, self.app.config.limits, &self.app.expert_access)?;
        scope.push(WriteKind::CreateModel(model.clone()))?;
        let row = describe(&model, &scope.view(), in_transaction);
        scope.close().await?;
        drop(guard);
        Ok(Response::new(v1::LoadModelResponse { model: Some(row) }))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let wanted = |name: &str| request.names.is_empty() || request.names.iter().any(|wanted| wanted == name);
        let models = reader.models().into_iter().filter(|(model, _)| wanted(model.name()));
        let mut models: Vec<v1::Model> = models
            .map(|(model, staged)| describe(&model, &reader.view(), staged))
            .collect();
        for unavailable in reader.unavailable() {
            if wanted(&unavailable.row.name) && !models.iter().any(|model| model.name == unavailable.row.name) {
                models.push(unavailable.row);
            }
        }
        models.sort_by(|first, second| first.name.cmp(&second.name));
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn update_model(
        &self,
        request: Request<v1::UpdateModelRequest>,
    ) -> Result<Response<v1::UpdateModelResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let model = scope.model(&request.name)?;
        let (settings, groups) = new_settings(&model, &load::parse_config(&request.config_json)?)?;
        let model = match groups {
            Some(groups) => sharing::change(&self.app, &scope, &model, groups, settings).await?,
            None => {
                let stage = move |owner: &mut Owner, ticket: &Ticket| owner.stage_settings(ticket, settings);
                scope.change(&model, stage).await?;
                model
            }
        };
        let seen = scope.reader().map(Reader::models).unwrap_or_default();
        // What the call publishes itself is not staged any more when it is answered.
        let staged = request.transaction.is_some() && seen.iter().any(|(other, staged)| other.is(&model) && *staged);
        let row = describe(&model, &scope.view(), staged);
        scope.close().await?;
        Ok(Response::new(v1::UpdateModelResponse { model: Some(row) }))
    }

    async fn digest_model(
        &self,
        request: Request<v1::DigestModelRequest>,
    ) -> Result<Response<v1::DigestModelResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let (model, view) = (reader.find(&request.model, &request.adapter)?, reader.view());
        let (sha256, step) = model.call(move |owner| owner.digest(&view)).await?;
        Ok(Response::new(v1::DigestModelResponse { sha256, step }))
    }

    async fn unload_model(
        &self,
        request: Request<v1::UnloadModelRequest>,
    ) -> Result<Response<v1::UnloadModelResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let key = ModelKey::new(&request.name, "");
        if scope.named(&key).is_none() && self.app.registry.unavailable(&key).is_some() {
            scope.push(WriteKind::DropUnavailable(key))?;
        } else {
            let model = scope.model(&request.name)?;
            let adapters = scope.reader().map(Reader::adapters).unwrap_or_default();
            for (adapter, _) in adapters
                .into_iter()
                .filter(|(adapter, _)| adapter.is_adapter_of(&model))
            {
                scope.push(WriteKind::DropModel(adapter))?;
            }
            scope.push(WriteKind::DropModel(model))?;
        }
        scope.close().await?;
        Ok(Response::new(v1::UnloadModelResponse {}))
    }

    async fn read_parameters(
        &self,
        request: Request<v1::ReadParametersRequest>,
    ) -> Result<Response<Self::ReadParametersStream>, Status> {
        let v1::ReadParametersRequest {
            transaction,
            model,
            selection,
            adapter,
        } = request.into_inner();
        let reader = Reader::open(&self.app, transaction.as_ref())?;
        let handle = reader.find(&model, &adapter)?;
        let (output, stream) =
            OutputStream::channel(&handle, |message: v1::ReadGradientsResponse| match message.chunk {
                Some(chunk) => Step::Next(v1::ReadParametersResponse { chunk: Some(chunk) }),
                None => Step::End,
            });
        let chunks = ChunkReader::parameters(reader.view(), Selection::new(selection), output);
        handle.add_reader(chunks).await?;
        Ok(Response::new(stream))
    }

    async fn list_attention_blocks(
        &self,
        request: Request<v1::ListAttentionBlocksRequest>,
    ) -> Result<Response<Self::ListAttentionBlocksStream>, Status> {
        Ok(Response::new(self.attention_blocks(request.into_inner()).await?))
    }

    async fn change_attention_blocks(
        &self,
        request: Request<v1::ChangeAttentionBlocksRequest>,
    ) -> Result<Response<v1::ChangeAttentionBlocksResponse>, Status> {
        let caller = Caller::of(&request)?;
        let changed = self.change_attention(&caller, request.into_inner()).await?;
        Ok(Response::new(changed))
    }

    async fn train_tokenizer(
        &self,
        request: Request<Streaming<v1::TrainTokenizerRequest>>,
    ) -> Result<Response<v1::TrainTokenizerResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut messages = request.into_inner();
        let first = messages
            .message()
            .await?
            .ok_or_else(|| Error::invalid("the stream is empty"))?;
        let (name, vocabulary_size) = (first.name.clone(), first.vocabulary_size as usize);
        TokenizerStore::validate_name(&name)?;
        let scope = Scope::open(&self.app, first.transaction.as_ref(), &caller)?;
        let mut texts: Vec<String> = Vec::new();
        let (mut bytes, limit) = (0u64, self.app.config.limits.tokenizer_bytes);
        let mut next = Some(first);
        while let Some(message) = next {
            bytes += message.texts.iter().map(|text| text.len() as u64).sum::<u64>();
            if bytes > limit {
                let what = format!("a total of {bytes} bytes of text");
                return Err(Error::Limit {
                    what,
                    limit,
                    flag: "max-tokenizer-bytes",
                }
                .into());
            }
            texts.extend(message.texts);
            next = messages.message().await?;
        }
        let (store, count) = (self.app.tokenizers.clone(), texts.len() as u64);
        let trained = tokio::task::spawn_blocking(move || {
            let tokenizer = Tokenizer::train_bpe(texts.iter(), vocabulary_size)?;
            Ok::<_, Error>((store.stage(&name, &tokenizer)?, tokenizer.vocabulary_size()))
        });
        let (staged, size) = trained
            .await
            .map_err(|error| Error::Internal(format!("training failed: {error}")))??;
        scope.push(WriteKind::CreateTokenizer(staged))?;
        scope.close().await?;
        let vocabulary_size = u32::try_from(size).unwrap_or(u32::MAX);
        Ok(Response::new(v1::TrainTokenizerResponse {
            vocabulary_size,
            texts: count,
        }))
    }
}

fn describe(model: &ModelHandle, view: &crate::owner::View, staged: bool) -> v1::Model {
    let mut row = model.describe(view);
    row.status = if staged { "staged" } else { "ready" }.to_owned();
    row
}

/// The training settings of a new configuration, and the number of groups of layers if it is to be another one. Other
/// fields must be as they are.
fn new_settings(model: &ModelHandle, given: &Map<String, Value>) -> Result<(TrainingSettings, Option<usize>)> {
    let (present, shape) = (&model.facts().config, &model.facts().decoder_config);
    let mut fields = config::normalize_settings(given)?;
    let groups = config::share_groups(&fields, shape.layers)?.filter(|groups| *groups != shape.groups);
    fields.remove("share");
    for (field, value) in &fields {
        let same =
            |present: &Value| present == value || present.as_f64().is_some_and(|number| Some(number) == value.as_f64());
        if !TRAINING_FIELDS.contains(&field.as_str()) && !present.get(field).is_some_and(same) {
            let present = present
                .get(field)
                .map_or_else(|| "not set".to_owned(), ToString::to_string);
            return Err(Error::invalid(format!(
                "the configuration's \"{field}\" is {present} and cannot become {value}; only share, {} may change",
                TRAINING_FIELDS.join(", ")
            )));
        }
    }
    config::check_router_settings(&fields, shape)?;
    Ok((TrainingSettings::take(&mut fields)?, groups))
}
