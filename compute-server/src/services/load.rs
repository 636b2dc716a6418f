//! Loading, creating and restoring models.

use std::path::Path;
use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::config::{self, TRAINING_FIELDS};
use candle_models::training::{AdamW, LossScale, checkpoint};
use candle_models::{DecoderConfig, Device, LoadOptions, Model, Tokenizer};
use serde_json::{Map, Value};

use crate::access::Tenant;
use crate::app::App;
use crate::commit_log::{LogBase, Origin, origin};
use crate::data_folder;
use crate::error::{Error, Result};
use crate::memory::{MemoryBudget, Reservation};
use crate::owner::{NewBase, NewModel, TrainingSettings, log_row_from_json, set_share};
use crate::sources::{self, Source};
use crate::transactions::Reader;

/// A checked request to load a model.
pub(crate) struct Loading {
    /// The request.
    pub(crate) request: v1::LoadModelRequest,
    pub(crate) config: Map<String, Value>,
    pub(crate) source: Located,
    pub(crate) device: Device,
    /// Whose memory it takes.
    pub(crate) tenant: Arc<Tenant>,
    /// The tokenizer that the configuration names, where the transaction itself has trained it.
    pub(crate) staged_tokenizer: Option<std::path::PathBuf>,
}

/// Where the weights are.
pub(crate) enum Located {
    /// Nowhere: they are made, with the tokenizer that the configuration names.
    Nothing,
    /// Likewise, with this tokenizer as JSON; empty for none.
    Tokenizer(String),
    /// In files.
    Files(std::path::PathBuf),
    /// In a checkpoint.
    Checkpoint(std::path::PathBuf),
}

/// Finds a source, as `reader` sees it.
pub(super) fn locate(app: &App, reader: &Reader, source: &str) -> Result<Located> {
    match Source::parse(source)? {
        Source::Nothing => Ok(Located::Nothing),
        Source::Path(path) => sources::locate(&app.config.models_dir, &path).map(Located::Files),
        Source::Checkpoint { model, step } => {
            let key = (model, step);
            let path = reader
                .checkpoint_path(&key)
                .ok_or_else(|| crate::checkpoints::not_found(&key))?;
            Ok(Located::Checkpoint(path))
        }
    }
}

/// The fields of a configuration given as JSON text; none for an empty text.
pub(crate) fn parse_config(text: &str) -> Result<Map<String, Value>> {
    if text.is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(Error::invalid("the configuration must be a JSON object")),
        Err(error) => Err(Error::invalid(format!("the configuration is no JSON: {error}"))),
    }
}

/// Reads or makes the weights. Takes long; called on a thread that may block.
pub(crate) fn load(app: &Arc<App>, loading: Loading) -> Result<NewModel> {
    let Loading {
        request,
        config,
        source,
        device,
        tenant,
        staged_tokenizer,
    } = loading;
    let budget = tenant.memory();
    let digest = match (&source, &app.log) {
        (Located::Files(path), Some(_)) => Some(sources::begin_digest(path)),
        _ => None,
    };
    let options = LoadOptions {
        dtype: (!request.dtype.is_empty()).then(|| request.dtype.clone()),
        device,
        seed: request.seed.unwrap_or(0) as u64,
        config,
    };
    let (mut model, trained, memory) = match &source {
        Located::Nothing => {
            let (model, memory) = create(app, budget, &options, Tokens::Named(staged_tokenizer.as_deref()))?;
            (model, Trained::default(), memory)
        }
        Located::Tokenizer(json) => {
            let (model, memory) = create(app, budget, &options, Tokens::Kept(json))?;
            (model, Trained::default(), memory)
        }
        Located::Files(path) => {
            if options.config.contains_key("tokenizer") {
                return Err(Error::invalid(
                    "\"tokenizer\" is for models made from nothing; this one brings its own",
                ));
            }
            let memory = budget.reserve("loading the model", sources::size(path))?;
            let model =
                Model::load(path, &options).map_err(|error| sources::relative(error, &app.config.models_dir))?;
            (model, Trained::default(), memory)
        }
        Located::Checkpoint(path) => restore(app, budget, &request.name, path, &options)?,
    };
    let mut memory = memory;
    memory.resize(
        "loading the model",
        model.decoder.memory_bytes() + trained.optimizer.memory_bytes(),
    )?;
    let base = match app.log {
        Some(_) => Some(base(app, &request, &source, &model, digest, tenant.name())?),
        None => None,
    };
    let mut fields = model.config.as_object().cloned().unwrap_or_default();
    let settings = TrainingSettings::take(&mut fields)?;
    model.config = Value::Object(fields);
    Ok(NewModel {
        name: request.name,
        adapter: None,
        source: request.source,
        seed: matches!(source, Located::Nothing).then_some(request.seed.unwrap_or(0)),
        device: if request.device.is_empty() {
            app.config.device.clone()
        } else {
            request.device
        },
        model,
        optimizer: trained.optimizer,
        loss_scale: trained.loss_scale,
        dropout_seed: request.seed.map_or(trained.seed, |seed| seed as u64),
        settings,
        log: trained.log,
        tenant,
        memory,
        slot: None,
        logged: None,
        base,
    })
}

/// How the commit log makes a model again.
fn base(
    app: &App,
    request: &v1::LoadModelRequest,
    source: &Located,
    model: &Model,
    digest: Option<sources::Digest>,
    tenant: &str,
) -> Result<NewBase> {
    let (mut files, mut origin) = (None, None);
    match (source, digest) {
        (Located::Files(path), Some(digest)) => origin = Some(origin::Kind::Files(digest.finish(path)?)),
        (Located::Checkpoint(path), _) => {
            let staged = app.folder.stage();
            data_folder::link_folder(path, staged.path())
                .map_err(|error| Error::io("keeping the checkpoint that a model is restored from", error))?;
            files = Some(staged);
        }
        _ => {
            let tokenizer = model
                .tokenizer
                .as_ref()
                .map(|tokenizer| tokenizer.to_json())
                .transpose()?;
            origin = Some(origin::Kind::Created(tokenizer.unwrap_or_default()));
        }
    }
    Ok(NewBase {
        base: LogBase {
            request: Some(v1::LoadModelRequest {
                transaction: None,
                ..request.clone()
            }),
            seed: matches!(source, Located::Nothing).then_some(request.seed.unwrap_or(0)),
            created_at: None,
            origin: Some(Origin { kind: origin }),
            adapter: None,
            of: 0,
            tenant: tenant.to_owned(),
        },
        files,
    })
}

/// What training has brought about beside the weights.
#[derive(Default)]
struct Trained {
    optimizer: AdamW,
    log: Vec<v1::OptimizerStep>,
    loss_scale: LossScale,
    /// Seed of the masks of dropout.
    seed: u64,
}

/// Where the tokenizer of a model that is made from nothing comes from.
enum Tokens<'a> {
    /// By the name in the configuration, or from the file that the transaction staged for it.
    Named(Option<&'a Path>),
    /// As JSON; empty for none.
    Kept(&'a str),
}

fn create(
    app: &App,
    budget: &Arc<MemoryBudget>,
    options: &LoadOptions,
    tokens: Tokens<'_>,
) -> Result<(Model, Reservation)> {
    let tokenizer = match (tokens, options.config.get("tokenizer")) {
        (Tokens::Kept(""), _) | (Tokens::Named(_), None | Some(Value::Null)) => None,
        (Tokens::Kept(json), _) => Some(Arc::new(Tokenizer::from_json(json)?)),
        (Tokens::Named(staged), Some(Value::String(name))) => Some(Arc::new(app.tokenizers.load(name, staged)?)),
        (Tokens::Named(_), Some(other)) => {
            return Err(Error::invalid(format!(
                "\"tokenizer\" is {other}; it must be a tokenizer's name"
            )));
        }
    };
    let size = tokenizer.as_ref().map(|tokenizer| tokenizer.vocabulary_size());
    let shape = config::from_settings(&options.config, size)?;
    let memory = budget.reserve("the weights of the model", weight_bytes(&shape))?;
    Ok((Model::create(options, tokenizer)?, memory))
}

/// Bytes of the f32 matrices of a decoder, estimated without making anything.
fn weight_bytes(config: &DecoderConfig) -> u64 {
    let size = |number: usize| number as u128;
    let (width, head_dim) = (size(config.width), size(config.head_dim));
    let attention = 2 * width * head_dim * (size(config.heads) + size(config.key_value_heads));
    let feed_forward = if config.gated { 3 } else { 2 } * width * size(config.feed_forward_width);
    let embeddings = size(config.vocabulary) * width * if config.tied_head { 1 } else { 2 };
    let parameters = size(config.groups) * (attention + feed_forward) + embeddings;
    u64::try_from(4 * parameters).unwrap_or(u64::MAX)
}

fn restore(
    app: &App,
    budget: &Arc<MemoryBudget>,
    name: &str,
    path: &Path,
    options: &LoadOptions,
) -> Result<(Model, Trained, Reservation)> {
    if options.dtype.as_deref().is_some_and(|dtype| dtype != "f32") {
        return Err(Error::Model(candle_models::Error::Unsupported(
            "a checkpoint is restored as f32, so that training can go on".to_owned(),
        )));
    }
    let given = config::normalize_settings(&options.config)?;
    let memory = budget.reserve("restoring the checkpoint", sources::size(path))?;
    let mut restored =
        checkpoint::load(path, &options.device).map_err(|error| sources::relative(error, &app.config.data_dir))?;
    let mut fields = restored.model.config.as_object().cloned().unwrap_or_default();
    let shape = restored.model.decoder.config();
    let groups = config::share_groups(&given, shape.layers)?.filter(|groups| *groups != shape.groups);
    if let Some(groups) = groups {
        let (decoder, sources) = restored.model.decoder.regrouped(groups)?;
        restored.optimizer = restored.optimizer.regrouped(&sources)?;
        set_share(&mut fields, decoder.config());
        restored.model.decoder = decoder;
    }
    for (field, value) in given.into_iter().filter(|(field, _)| field != "share") {
        if !TRAINING_FIELDS.contains(&field.as_str()) && fields.get(&field) != Some(&value) {
            return Err(Error::invalid(format!(
                "the configuration's \"{field}\" contradicts the checkpoint; only \"share\" and training settings may differ"
            )));
        }
        fields.insert(field, value);
    }
    restored.model.config = Value::Object(fields);
    let log = restored
        .manifest
        .log
        .iter()
        .map(|row| log_row_from_json(name, row))
        .collect();
    let trained = Trained {
        optimizer: restored.optimizer,
        log,
        loss_scale: restored.manifest.loss_scale,
        seed: restored.manifest.seed,
    };
    Ok((restored.model, trained, memory))
}
