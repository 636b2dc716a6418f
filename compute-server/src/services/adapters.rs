//! `AdaptersService`.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_compute_proto::v1::adapters_service_server::AdaptersService;
use candle_models::adapters::{self, LoraConfig, TargetModules};
use candle_models::training::{AdamW, LossScale, checkpoint};
use candle_models::{Decoder, Model};
use tonic::{Request, Response, Status};

use super::Service;
use super::load::Located;
use crate::access::{Caller, Tenant};
use crate::app::App;
use crate::checkpoints;
use crate::commit_log::{LogBase, Origin, origin};
use crate::data_folder;
use crate::error::{Error, Result};
use crate::names::{self, ModelKey};
use crate::owner::{ModelHandle, NewBase, NewModel, View, log_row_from_json};
use crate::requests::Phase;
use crate::sources::{self, Source};
use crate::transactions::{Reader, Scope, WriteKind};

#[tonic::async_trait]
impl AdaptersService for Service {
    async fn create_adapter(
        &self,
        request: Request<v1::CreateAdapterRequest>,
    ) -> Result<Response<v1::CreateAdapterResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        names::validate("adapter", &request.name)?;
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let model = scope.model(&request.model)?;
        let key = ModelKey::new(&request.model, &request.name);
        if scope.named(&key).is_some() {
            return Err(Error::NameTaken {
                kind: key.kind(),
                name: key.to_string(),
            }
            .into());
        }
        let source = locate(&self.app, &scope, &request.source)?;
        let slot = self.app.model_slot()?;
        let in_transaction = request.transaction.is_some();
        let guard = self.app.requests.begin(&caller, "load", &request.model)?;
        guard.set_phase(Phase::Running);
        let (app, base) = (Arc::clone(&self.app), model.clone());
        let made = tokio::task::spawn_blocking(move || make(&app, base, request, source, caller.tenant)).await;
        let mut new = made.map_err(|error| Error::Internal(format!("making an adapter failed: {error}")))??;
        new.slot = Some(slot);
        let adapter = ModelHandle::start(new, self.app.config.limits, &self.app.expert_access)?;
        scope.push(WriteKind::CreateModel(adapter.clone()))?;
        let row = describe(&adapter, &scope.view(), in_transaction);
        scope.close().await?;
        drop(guard);
        Ok(Response::new(v1::CreateAdapterResponse { adapter: row }))
    }

    async fn list_adapters(
        &self,
        request: Request<v1::ListAdaptersRequest>,
    ) -> Result<Response<v1::ListAdaptersResponse>, Status> {
        let request = request.into_inner();
        let reader = Reader::open(&self.app, request.transaction.as_ref())?;
        let wanted = |names: &[String], name: &str| names.is_empty() || names.iter().any(|wanted| wanted == name);
        let rows = reader.adapters().into_iter();
        let rows = rows.filter_map(|(adapter, staged)| describe(&adapter, &reader.view(), staged));
        let rows = rows.filter(|row| wanted(&request.models, &row.model) && wanted(&request.names, &row.name));
        Ok(Response::new(v1::ListAdaptersResponse {
            adapters: rows.collect(),
        }))
    }

    async fn merge_adapter(
        &self,
        request: Request<v1::MergeAdapterRequest>,
    ) -> Result<Response<v1::MergeAdapterResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let model = scope.model(&request.model)?;
        let adapter = scope.find(&request.model, &required("name", &request.name)?)?;
        let ticket = scope.ticket();
        let merge = adapter.call(move |owner| owner.delta(&ticket)).await?;
        // The model may refuse, the adapter does not any more.
        scope
            .change(&model, move |owner, ticket| owner.stage_merge_of(ticket, merge))
            .await?;
        scope
            .change(&adapter, |owner, ticket| owner.stage_merged(ticket))
            .await?;
        let staged = is_staged(&scope, &adapter);
        let row = describe(&adapter, &scope.view(), staged);
        scope.close().await?;
        Ok(Response::new(v1::MergeAdapterResponse { adapter: row }))
    }

    async fn drop_adapter(
        &self,
        request: Request<v1::DropAdapterRequest>,
    ) -> Result<Response<v1::DropAdapterResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let scope = Scope::open(&self.app, request.transaction.as_ref(), &caller)?;
        let key = ModelKey::new(&request.model, &required("name", &request.name)?);
        let write = match scope.named(&key) {
            Some(adapter) => WriteKind::DropModel(adapter),
            None if self.app.registry.unavailable(&key).is_some() => WriteKind::DropUnavailable(key),
            None => return Err(self.app.registry.missing(&key).into()),
        };
        scope.push(write)?;
        scope.close().await?;
        Ok(Response::new(v1::DropAdapterResponse {}))
    }
}

/// A field that must not be empty.
fn required(field: &str, value: &str) -> Result<String> {
    match value {
        "" => Err(Error::invalid(format!("{field} is required"))),
        value => Ok(value.to_owned()),
    }
}

fn is_staged(scope: &Scope, adapter: &ModelHandle) -> bool {
    let adapters = scope.reader().map(Reader::adapters).unwrap_or_default();
    adapters.iter().any(|(other, staged)| other.is(adapter) && *staged)
}

fn describe(adapter: &ModelHandle, view: &View, staged: bool) -> Option<v1::Adapter> {
    let mut row = adapter.describe_adapter(view)?;
    row.status = if staged { "staged" } else { "ready" }.to_owned();
    Some(row)
}

/// Finds a source, as `scope` sees it. In `checkpoint://MODEL/ADAPTER/STEP` names may hold slashes themselves.
fn locate(app: &App, scope: &Scope, source: &str) -> Result<Located> {
    match Source::parse(source)? {
        Source::Nothing => Ok(Located::Nothing),
        Source::Path(path) => sources::locate(&app.config.models_dir, &path).map(Located::Files),
        Source::Checkpoint { model: names, step } => {
            let keys = names.match_indices('/').map(|(slash, _)| {
                let key = ModelKey::new(&names[..slash], &names[slash + 1..]);
                (key.to_text(), step)
            });
            let mut paths = keys.filter_map(|key| scope.reader()?.checkpoint_path(&key));
            let path = paths
                .next()
                .ok_or_else(|| checkpoints::not_found(&(names.clone(), step)))?;
            Ok(Located::Checkpoint(path))
        }
    }
}

/// Makes or reads the factors. Takes long; called on a thread that may block.
pub(crate) fn make(
    app: &App,
    base: ModelHandle,
    request: v1::CreateAdapterRequest,
    source: Located,
    tenant: Arc<Tenant>,
) -> Result<NewModel> {
    let facts = base.facts();
    let given_seed = request.seed;
    let seed = given_seed.unwrap_or(0);
    let log_base = match app.log {
        Some(_) => Some(log_base(app, &base, &request, &source, tenant.name())?),
        None => None,
    };
    let (mut loss_scale, mut stored_seed) = (LossScale::default(), 0);
    let (decoder, optimizer, log) = {
        let base = facts.base.read();
        let untrained = |decoder| (decoder, AdamW::new(), Vec::new());
        match source {
            Located::Nothing | Located::Tokenizer(_) => {
                untrained(adapters::create(&base.decoder, &config(&request)?, seed as u64)?)
            }
            Located::Files(directory) => {
                let loaded = adapters::load(&directory, &base.decoder);
                untrained(loaded.map_err(|error| sources::relative(error, &app.config.models_dir))?)
            }
            Located::Checkpoint(directory) => {
                let loaded = checkpoint::load_adapter(&directory, &base.decoder);
                let (decoder, optimizer, manifest) =
                    loaded.map_err(|error| sources::relative(error, &app.config.data_dir))?;
                (loss_scale, stored_seed) = (manifest.loss_scale, manifest.seed);
                let rows = manifest.log.iter();
                let log = rows.map(|row| log_row_from_json(&request.model, row)).collect();
                (decoder, optimizer, log)
            }
        }
    };
    check_given(&decoder, &request)?;
    let memory = decoder.memory_bytes() + optimizer.memory_bytes();
    let memory = tenant.memory().reserve("an adapter", memory)?;
    let settings = facts.base.read().settings.clone();
    let seed = request.source.is_empty().then_some(seed);
    Ok(NewModel {
        name: request.model,
        source: request.source,
        seed,
        device: base.describe(&View::Committed).device,
        model: Model {
            decoder,
            tokenizer: facts.tokenizer.clone(),
            chat_template: facts.chat_template.clone(),
            end_tokens: facts.end_tokens.clone(),
            config: serde_json::Value::Object(facts.config.clone()),
        },
        adapter: Some((request.name, base)),
        optimizer,
        loss_scale,
        dropout_seed: given_seed.map_or(stored_seed, |seed| seed as u64),
        settings,
        log,
        tenant,
        memory,
        slot: None,
        logged: None,
        base: log_base,
    })
}

/// How the commit log makes an adapter again.
fn log_base(
    app: &App,
    model: &ModelHandle,
    request: &v1::CreateAdapterRequest,
    source: &Located,
    tenant: &str,
) -> Result<NewBase> {
    let (mut files, mut kind) = (None, None);
    match source {
        Located::Nothing | Located::Tokenizer(_) => kind = Some(origin::Kind::Created(String::new())),
        Located::Files(path) => kind = Some(origin::Kind::Files(sources::begin_digest(path).finish(path)?)),
        Located::Checkpoint(path) => {
            let staged = app.folder.stage();
            data_folder::link_folder(path, staged.path())
                .map_err(|error| Error::io("keeping the checkpoint that an adapter is restored from", error))?;
            files = Some(staged);
        }
    }
    Ok(NewBase {
        base: LogBase {
            request: None,
            seed: None,
            created_at: None,
            origin: Some(Origin { kind }),
            adapter: Some(v1::CreateAdapterRequest {
                transaction: None,
                ..request.clone()
            }),
            of: model.id(),
            tenant: tenant.to_owned(),
        },
        files,
    })
}

/// What a request says of a new adapter.
fn config(request: &v1::CreateAdapterRequest) -> Result<LoraConfig> {
    let default = LoraConfig::default();
    let rank = match request.rank {
        None => default.rank,
        Some(rank) => {
            usize::try_from(rank).map_err(|_| Error::invalid(format!("rank is {rank}; it must be at least 1")))?
        }
    };
    Ok(LoraConfig {
        rank,
        alpha: request.alpha.unwrap_or(default.alpha),
        target_modules: match request.target_modules.as_slice() {
            [] => TargetModules::Default,
            names => TargetModules::from_names(names)?,
        },
        dropout: request.dropout.unwrap_or(default.dropout),
        rank_stabilized: request.use_rslora.unwrap_or(default.rank_stabilized),
    })
}

/// Refuses a request that says something else than the adapter's file.
fn check_given(decoder: &Decoder, request: &v1::CreateAdapterRequest) -> Result<()> {
    let Some(lora) = decoder.lora_config() else {
        return Err(Error::Internal("an adapter without a configuration".to_owned()));
    };
    let refuse = |field: &str, given: String, stored: String| {
        Err(Error::invalid(format!(
            "{field} is {given}, but the adapter's file says {stored}; leave it out"
        )))
    };
    if let Some(rank) = request
        .rank
        .filter(|rank| u64::try_from(*rank).ok() != Some(lora.rank as u64))
    {
        return refuse("rank", rank.to_string(), lora.rank.to_string());
    }
    if let Some(alpha) = request.alpha.filter(|alpha| *alpha as f32 != lora.alpha as f32) {
        return refuse("alpha", alpha.to_string(), lora.alpha.to_string());
    }
    if let Some(dropout) = request.dropout.filter(|dropout| *dropout as f32 != lora.dropout as f32) {
        return refuse("dropout", dropout.to_string(), lora.dropout.to_string());
    }
    if let Some(given) = request.use_rslora.filter(|given| *given != lora.rank_stabilized) {
        return refuse("use_rslora", given.to_string(), lora.rank_stabilized.to_string());
    }
    let sorted = |mut names: Vec<String>| {
        names.sort_unstable();
        names
    };
    let stored = sorted(lora.target_modules.names(decoder.config().architecture));
    if !request.target_modules.is_empty() && sorted(request.target_modules.clone()) != stored {
        return refuse("target_modules", request.target_modules.join(", "), stored.join(", "));
    }
    Ok(())
}
