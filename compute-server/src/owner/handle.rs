//! What the rest of the server holds of a model: facts that never change, and the way to its thread.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use candle_compute_proto::v1;
use candle_models::adapters::LoraConfig;
use candle_models::config::TRAINING_FIELDS;
use candle_models::training::{AdamW, LossScale, Retention};
use candle_models::{CacheType, ChatTemplate, DecoderConfig, Model, PagePool, ParameterInfo, RemoteExperts, Tokenizer};
use serde_json::{Map, Value};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::base::{Base, Followed};
use super::factors::PublishedFactors;
use super::reading::ChunkReader;
use super::settings::TrainingSettings;
use super::state::{Owner, Versions};
use super::{TransactionId, View};
use crate::access::Tenant;
use crate::app::ModelSlot;
use crate::commit_log::LogBase;
use crate::config::Limits;
use crate::data_folder::Staged;
use crate::error::{Error, Result};
use crate::expert_servers::{ExpertAccess, ExpertServers};
use crate::memory::{MemoryBudget, Reservation};
use crate::metrics::ModelMetrics;
use crate::names::ModelKey;

/// A piece of work for the thread. Long work puts itself into a queue of the owner and returns.
pub(super) type Work = Box<dyn FnOnce(&mut Owner) + Send>;

/// A model that is about to get its thread.
pub(crate) struct NewModel {
    /// Its name; of an adapter, its model's.
    pub(crate) name: String,
    /// Name of an adapter, and the model that it belongs to.
    pub(crate) adapter: Option<(String, ModelHandle)>,
    /// Where it came from; empty for a model made from nothing.
    pub(crate) source: String,
    /// Seed of its initial weights, if it was made from nothing.
    pub(crate) seed: Option<i64>,
    /// Where it computes.
    pub(crate) device: String,
    /// Weights, tokenizer, configuration.
    pub(crate) model: Model,
    /// State of the optimizer.
    pub(crate) optimizer: AdamW,
    /// The dynamic loss scale.
    pub(crate) loss_scale: LossScale,
    /// Seed of the masks of dropout.
    pub(crate) dropout_seed: u64,
    /// Training settings.
    pub(crate) settings: TrainingSettings,
    /// Steps that were taken.
    pub(crate) log: Vec<v1::OptimizerStep>,
    /// Who loaded it; what the model holds counts for that tenant.
    pub(crate) tenant: Arc<Tenant>,
    /// Memory of weights and moments.
    pub(crate) memory: Reservation,
    /// Its place among the models that the server may hold.
    pub(crate) slot: Option<ModelSlot>,
    /// Number and time of creation of a model that was there before: in the commit log, or in another shape.
    pub(crate) logged: Option<(u64, SystemTime)>,
    /// How the commit log is to make it again.
    pub(crate) base: Option<NewBase>,
}

/// How a model that is not yet published is to be made again.
#[derive(Debug)]
pub(crate) struct NewBase {
    /// What the commit log will hold.
    pub(crate) base: LogBase,
    /// The state that it refers to, if it does.
    pub(crate) files: Option<Staged>,
}

/// Facts of a model as `models` shows them, for one view.
#[derive(Debug, Clone)]
pub(crate) struct Description {
    /// Training settings.
    pub(super) settings: Map<String, Value>,
    /// How the weights are held.
    pub(super) dtype: String,
    /// Bytes of weights, moments and gradients.
    pub(super) memory_bytes: u64,
    /// Optimizer steps taken.
    pub(super) step: u64,
    /// Which checkpoints are kept.
    pub(super) retention: Retention,
    /// Whether an adapter has been merged into its model.
    pub(super) merged: bool,
    /// Whether the view has other weights than the committed ones.
    pub(super) changes_weights: bool,
}

/// A model. Cloning is cheap; the thread ends when it was told to, or when no handle is left.
#[derive(Clone)]
pub(crate) struct ModelHandle {
    shared: Arc<Shared>,
    work: mpsc::Sender<Work>,
    /// Closed once the thread has ended and given its memory back.
    running: watch::Receiver<()>,
}

/// What handles and thread share.
pub(crate) struct Shared {
    pub(super) id: u64,
    /// The name; of an adapter, its model's.
    pub(crate) name: String,
    /// Name of the tenant that loaded it.
    pub(super) tenant: Arc<str>,
    /// Of an adapter: its name, and the number of the loaded model that it belongs to.
    adapter: Option<(String, u64)>,
    /// Of an adapter: wakes the thread of its model.
    base_wake: Option<Arc<Notify>>,
    /// Of an adapter: what it adds, for its model's thread.
    pub(super) factors: PublishedFactors,
    /// What adapters share of it.
    pub(crate) base: Arc<Base>,
    pub(super) source: String,
    pub(super) seed: Option<i64>,
    pub(super) device: String,
    /// Configuration without training settings.
    pub(crate) config: Map<String, Value>,
    /// Shape.
    pub(crate) decoder_config: DecoderConfig,
    /// Parameters in the order of the decoder.
    pub(crate) parameters: Vec<ParameterInfo>,
    /// Which of them are its own: all, or an adapter's.
    pub(crate) own_parameters: Range<usize>,
    /// Of an adapter: what it is made of.
    lora: Option<LoraConfig>,
    parameter_count: u64,
    /// The tokenizer, if the model has one.
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    /// The chat template, if the model has one.
    pub(crate) chat_template: Option<Arc<ChatTemplate>>,
    /// Tokens that end a generation.
    pub(crate) end_tokens: Vec<u32>,
    pub(super) created_at: SystemTime,
    /// Taken when the model is published.
    new_base: Mutex<Option<NewBase>>,
    /// Wakes the thread when a client has read something or gone away.
    pub(crate) wake: Arc<Notify>,
    phase: AtomicU8,
    /// Saves that read weights and moments.
    pub(super) saves: AtomicU64,
    /// Pages of the caches of its generations.
    pub(crate) pages: Arc<PagePool>,
    /// What is measured of it.
    pub(crate) metrics: Arc<ModelMetrics>,
    descriptions: Mutex<HashMap<View, Description>>,
}

const RUNNING: u8 = 0;
const UNLOADED: u8 = 1;
const FAILED: u8 = 2;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A number that no model has had.
pub(super) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

impl Shared {
    /// The model or adapter as a base of the commit log, but for its origin.
    pub(super) fn log_base(&self) -> LogBase {
        if let Some((name, of)) = &self.adapter {
            return LogBase {
                created_at: Some(self.created_at.into()),
                adapter: Some(v1::CreateAdapterRequest {
                    model: self.name.clone(),
                    name: name.clone(),
                    source: self.source.clone(),
                    seed: self.seed,
                    ..Default::default()
                }),
                of: *of,
                tenant: self.tenant.to_string(),
                ..Default::default()
            };
        }
        LogBase {
            request: Some(v1::LoadModelRequest {
                name: self.name.clone(),
                source: self.source.clone(),
                device: self.device.clone(),
                ..Default::default()
            }),
            seed: self.seed,
            created_at: Some(self.created_at.into()),
            origin: None,
            adapter: None,
            of: 0,
            tenant: self.tenant.to_string(),
        }
    }

    /// Whether the thread answers.
    pub(super) fn is_running(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == RUNNING
    }

    /// Whether the model was unloaded.
    pub(super) fn is_unloaded(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == UNLOADED
    }

    /// A panic may have left the state half-changed: nothing uses it any more.
    pub(super) fn set_failed(&self) {
        self.phase.store(FAILED, Ordering::Relaxed);
    }

    /// Why the thread does not answer.
    pub(crate) fn gone(&self) -> Error {
        match self.phase.load(Ordering::Relaxed) {
            FAILED => Error::Internal(format!("model \"{}\" failed; unload it and load it again", self.name)),
            _ => Error::Unloaded(self.name.clone()),
        }
    }

    pub(super) fn describe(&self, view: View, description: Description) {
        self.lock().insert(view, description);
    }

    pub(super) fn forget(&self, transaction: &TransactionId) {
        self.lock().remove(&View::Transaction(Arc::clone(transaction)));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<View, Description>> {
        self.descriptions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ModelHandle {
    /// Starts the thread of a model. Servers of its experts are spoken to by `access`.
    ///
    /// # Errors
    /// `Io` when the system gives no thread.
    pub(crate) fn start(new: NewModel, limits: Limits, access: &Arc<ExpertAccess>) -> Result<Self> {
        let mut model = new.model;
        let mut config = model.config.as_object().cloned().unwrap_or_default();
        if new.adapter.is_none() {
            let servers = candle_models::config::expert_servers(&config, model.decoder.config())?;
            let servers = ExpertServers::new(&new.name, servers, access)?;
            model
                .decoder
                .set_remote_experts(servers.map(|servers| -> Arc<dyn RemoteExperts> { servers }));
        }
        TRAINING_FIELDS.iter().for_each(|&field| drop(config.remove(field)));
        let adapter = new.adapter;
        let base_wake = adapter.as_ref().map(|(_, model)| Arc::clone(&model.shared.wake));
        let adapter_name = adapter.as_ref().map(|(name, model)| (name.clone(), model.shared.id));
        let (id, created_at) = match new.logged {
            Some((id, created_at)) => {
                NEXT_ID.fetch_max(id + 1, Ordering::Relaxed);
                (id, created_at)
            }
            None => (next_id(), SystemTime::now()),
        };
        let mut new_base = new.base;
        if let Some(new) = &mut new_base {
            new.base.created_at = Some(created_at.into());
        }
        let pages = page_pool(&model, &limits, new.tenant.memory().server());
        let shared = Arc::new(Shared {
            id,
            name: new.name,
            tenant: Arc::clone(new.tenant.name()),
            adapter: adapter_name,
            base_wake,
            factors: PublishedFactors::default(),
            base: Arc::new(Base::new(&model.decoder, &new.settings)),
            source: new.source,
            seed: new.seed,
            device: new.device,
            config,
            decoder_config: model.decoder.config().clone(),
            parameters: model.decoder.parameters().to_vec(),
            own_parameters: model.decoder.own_parameters(),
            lora: model.decoder.lora_config().cloned(),
            parameter_count: model.decoder.parameter_count(),
            tokenizer: model.tokenizer.clone(),
            chat_template: model.chat_template.clone(),
            end_tokens: model.end_tokens.clone(),
            created_at,
            new_base: Mutex::new(new_base),
            wake: Arc::new(Notify::new()),
            phase: AtomicU8::new(RUNNING),
            saves: AtomicU64::new(0),
            pages,
            metrics: Arc::new(ModelMetrics::new()?),
            descriptions: Mutex::default(),
        });
        let (work, inbox) = mpsc::channel(limits.queue);
        let owner = Owner {
            shared: Arc::clone(&shared),
            model,
            trainable: None,
            half: None,
            optimizer: new.optimizer,
            loss_scale: new.loss_scale,
            dropout_seed: new.dropout_seed,
            settings: new.settings,
            followed: adapter.map(|(_, model)| Followed::new(Arc::clone(&model.shared.base))),
            versions: Versions {
                weights: 0,
                gradient: 0,
            },
            accumulated: Default::default(),
            log: new.log,
            tape: Vec::new(),
            overlays: HashMap::new(),
            publishing: None,
            deferred: Vec::new(),
            waiting_for_saves: Vec::new(),
            applied: 0,
            generations: Default::default(),
            embeddings: Default::default(),
            training: Default::default(),
            readers: Vec::new(),
            lent: super::experts::LentExperts::default(),
            limits,
            budget: Arc::clone(new.tenant.memory()),
            memory: new.memory,
            _slot: new.slot,
        };
        owner.describe_committed();
        let runtime = tokio::runtime::Handle::current();
        let (alive, running) = watch::channel(());
        std::thread::Builder::new()
            .name(format!("model-{}", shared.id))
            .spawn(move || {
                owner.run(inbox, &runtime);
                drop(alive);
            })
            .map_err(|error| Error::io("starting the thread of a model", error))?;
        Ok(Self { shared, work, running })
    }

    /// Facts that never change.
    pub(crate) fn facts(&self) -> &Shared {
        &self.shared
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Its number, which no other model has had.
    pub(crate) fn id(&self) -> u64 {
        self.shared.id
    }

    /// How a new model is to be made again; none the second time.
    pub(crate) fn take_base(&self) -> Option<NewBase> {
        self.shared
            .new_base
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// The name.
    pub(crate) fn name(&self) -> &str {
        &self.shared.name
    }

    /// What it is known by.
    pub(crate) fn key(&self) -> ModelKey {
        ModelKey {
            model: self.shared.name.clone(),
            adapter: self.shared.adapter.as_ref().map(|(name, _)| name.clone()),
        }
    }

    /// Whether it is an adapter of the loaded model `model`.
    pub(crate) fn is_adapter_of(&self, model: &Self) -> bool {
        let adapter = self.shared.adapter.as_ref();
        adapter.is_some_and(|(_, id)| *id == model.shared.id)
    }

    /// Whether `view` sees other weights than everybody.
    pub(crate) fn changes_weights(&self, view: &View) -> bool {
        self.shared.lock().get(view).is_some_and(|seen| seen.changes_weights)
    }

    /// Whether both are the same loaded model, not merely of the same name.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.shared.id == other.shared.id
    }

    /// Runs `work` on the thread, in its turn, and returns its answer. Work whose caller has gone away is not run.
    ///
    /// # Errors
    /// What `work` returns; `Unloaded` when the model goes away first.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Owner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.start_work(move |owner, reply| reply.send(work(owner))).await
    }

    /// Adds a stream of parameters or gradients, which the thread serves between its other work.
    ///
    /// # Errors
    /// `Unloaded` when the model goes away first.
    pub(crate) async fn add_reader(&self, reader: ChunkReader) -> Result<()> {
        let add = move |owner: &mut Owner| {
            owner.add_reader(reader);
            Ok(())
        };
        self.call(add).await
    }

    /// As [`call`](Self::call), once no save reads the weights.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub(crate) async fn call_once_saved<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Owner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.start_work(move |owner, reply| owner.once_saved(move |owner| reply.send(work(owner))))
            .await
    }

    /// As [`call`](Self::call), for work that answers later.
    pub(crate) async fn start_work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Owner, Reply<T>) + Send + 'static,
    ) -> Result<T> {
        let (sender, answer) = oneshot::channel();
        let work: Work = Box::new(move |owner| {
            if !sender.is_closed() {
                work(owner, Reply(sender));
            }
        });
        // Wakes the thread should the caller go away while the work runs.
        let _wake = WakeOnDrop(&self.shared.wake);
        self.work.send(work).await.map_err(|_| self.shared.gone())?;
        answer.await.unwrap_or_else(|_| Err(self.shared.gone()))
    }

    /// Ends the thread after the step it is doing; what runs on the model ends with an error.
    pub(crate) fn unload(&self) {
        let _ = self
            .shared
            .phase
            .compare_exchange(RUNNING, UNLOADED, Ordering::Relaxed, Ordering::Relaxed);
        self.shared.wake.notify_one();
        // Its model's thread may be at generations with it.
        self.shared.base_wake.iter().for_each(|wake| wake.notify_one());
    }

    /// Waits until the thread has ended and its memory is free.
    pub(crate) async fn ended(&self) {
        // Nothing is ever sent: the only change is the end.
        let _ = self.running.clone().changed().await;
    }

    /// Which of its checkpoints are kept, as `view` sees it.
    pub(crate) fn retention(&self, view: &View) -> Retention {
        let descriptions = self.shared.lock();
        let description = descriptions.get(view).or_else(|| descriptions.get(&View::Committed));
        description.map(|description| description.retention).unwrap_or_default()
    }

    /// The row of `models` that `view` sees, without status.
    pub(crate) fn describe(&self, view: &View) -> v1::Model {
        let shared = &self.shared;
        let descriptions = shared.lock();
        let description = descriptions.get(view).or_else(|| descriptions.get(&View::Committed));
        let mut config = shared.config.clone();
        if let Some(description) = description {
            config.extend(description.settings.clone());
        }
        v1::Model {
            name: shared.name.clone(),
            architecture: shared.decoder_config.architecture.name().to_owned(),
            source: shared.source.clone(),
            config_json: Value::Object(config).to_string(),
            dtype: description.map(|d| d.dtype.clone()).unwrap_or_default(),
            device: shared.device.clone(),
            seed: shared.seed,
            status: String::new(),
            parameters: shared.parameter_count,
            memory_bytes: description.map_or(0, |d| d.memory_bytes) + shared.pages.bytes(),
            context_length: u32::try_from(shared.decoder_config.context_length).unwrap_or(u32::MAX),
            vocabulary: u32::try_from(shared.decoder_config.vocabulary).unwrap_or(u32::MAX),
            step: description.map_or(0, |d| d.step),
            created_at: Some(shared.created_at.into()),
        }
    }
}

impl ModelHandle {
    /// The row of `adapters` that `view` sees, without status; none for what is no adapter.
    pub(crate) fn describe_adapter(&self, view: &View) -> Option<v1::Adapter> {
        let shared = &self.shared;
        let ((name, _), lora) = (shared.adapter.as_ref()?, shared.lora.as_ref()?);
        let row = self.describe(view);
        let descriptions = shared.lock();
        let merged = |view| descriptions.get(view).map(|description| description.merged);
        Some(v1::Adapter {
            model: shared.name.clone(),
            name: name.clone(),
            rank: u32::try_from(lora.rank).unwrap_or(u32::MAX),
            alpha: lora.alpha,
            target_modules: lora.target_modules.names(shared.decoder_config.architecture),
            dropout: lora.dropout,
            use_rslora: lora.rank_stabilized,
            source: row.source,
            seed: row.seed,
            merged: merged(view).or_else(|| merged(&View::Committed)).unwrap_or(false),
            parameters: row.parameters,
            memory_bytes: row.memory_bytes,
            step: row.step,
            status: String::new(),
            created_at: row.created_at,
        })
    }
}

/// The pages of a model's caches.
fn page_pool(model: &Model, limits: &Limits, budget: &Arc<MemoryBudget>) -> Arc<PagePool> {
    let kind = limits.cache_type.unwrap_or(match model.decoder.dtype() {
        "f32" => CacheType::F32,
        _ => CacheType::F16,
    });
    let pool = PagePool::new(model.decoder.config(), kind, Arc::clone(budget) as _);
    let pool = Arc::new(pool);
    budget.cache.add_pool(&pool);
    pool
}

/// Where the answer to a piece of work goes.
pub(crate) struct Reply<T>(oneshot::Sender<Result<T>>);

impl<T> Reply<T> {
    /// Answers.
    pub(crate) fn send(self, answer: Result<T>) {
        let _ = self.0.send(answer);
    }

    /// Whether nobody waits for the answer any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

struct WakeOnDrop<'a>(&'a Notify);

impl Drop for WakeOnDrop<'_> {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}
