//! What all services share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::access::Directory;
use crate::cache_memory::CacheMemory;
use crate::checkpoints::{self, CheckpointStore};
use crate::commit_log::{self, CommitLog, Recovered};
use crate::config::Config;
use crate::data_folder::DataFolder;
use crate::error::{Error, Result};
use crate::evaluations::EvaluationStore;
use crate::executor::Executor;
use crate::expert_servers::ExpertAccess;
use crate::memory::MemoryBudget;
use crate::metrics::ServerMetrics;
use crate::registry::Registry;
use crate::requests::Requests;
use crate::tokenizers::TokenizerStore;
use crate::transactions::Transactions;

/// The state of the server.
pub(crate) struct App {
    pub(crate) config: Config,
    /// Who may call.
    pub(crate) tenants: Directory,
    /// How this server is let in by expert servers.
    pub(crate) expert_access: Arc<ExpertAccess>,
    pub(crate) registry: Registry,
    pub(crate) transactions: Transactions,
    pub(crate) checkpoints: CheckpointStore,
    pub(crate) evaluations: EvaluationStore,
    pub(crate) tokenizers: TokenizerStore,
    pub(crate) requests: Arc<Requests>,
    /// Tensors and operations of sessions.
    pub(crate) executor: Arc<Executor>,
    pub(crate) memory: Arc<MemoryBudget>,
    /// What is measured of the server.
    pub(crate) metrics: ServerMetrics,
    /// Held by the one run of kernel benchmarks.
    pub(crate) benchmarking: Arc<tokio::sync::Mutex<()>>,
    /// Models that have a thread, published or not.
    model_count: Arc<AtomicU64>,
    draining: AtomicBool,
    recovering: AtomicBool,
    /// The data folder.
    pub(crate) folder: Arc<DataFolder>,
    /// The commit log, unless only checkpoints survive a crash.
    pub(crate) log: Option<Arc<CommitLog>>,
}

impl App {
    /// Opens the data folder; says what its commit log holds. The server is recovering until
    /// [`recovered`](Self::recovered) is called.
    ///
    /// # Errors
    /// When the token file or the data folder cannot be used.
    pub(crate) fn open(config: Config) -> Result<(Arc<Self>, Recovered)> {
        let cache = CacheMemory::new(config.limits.cache, config.limits.kept_cache);
        let memory = MemoryBudget::new(config.limits.memory, cache);
        let tenants = Directory::open(config.token_file.clone(), &memory)?;
        let expert_access = ExpertAccess::open(config.expert_token_file.clone(), config.expert_ca_file.clone())?;
        let folder = Arc::new(DataFolder::open(&config.data_dir)?);
        let (log, recovered) = match config.log_limits {
            Some(limits) => {
                let (log, recovered) = CommitLog::open(&folder, limits)?;
                (Some(Arc::new(log)), recovered)
            }
            None => {
                commit_log::set_aside(&folder)?;
                (None, Recovered::default())
            }
        };
        checkpoints::finish(&folder, &recovered.files)?;
        folder.clear_staging()?;
        let (requests, metrics) = (Arc::<Requests>::default(), ServerMetrics::new()?);
        let app = Arc::new(Self {
            tenants,
            expert_access,
            registry: Registry::default(),
            transactions: Transactions::new(config.limits.transactions, config.transaction_timeout),
            checkpoints: CheckpointStore::open(Arc::clone(&folder))?,
            evaluations: EvaluationStore::open(Arc::clone(&folder))?,
            tokenizers: TokenizerStore::new(Arc::clone(&folder)),
            executor: Executor::new(&config, Arc::clone(&requests), metrics.tensor_operations()),
            requests,
            memory,
            metrics,
            benchmarking: Arc::default(),
            model_count: Arc::default(),
            draining: AtomicBool::new(false),
            recovering: AtomicBool::new(true),
            folder,
            log,
            config,
        });
        Ok((app, recovered))
    }

    /// Takes work from now on.
    pub(crate) fn recovered(&self) {
        self.memory.enforce_quotas();
        self.recovering.store(false, Ordering::Relaxed);
    }

    /// Whether models are still being made again.
    pub(crate) fn is_recovering(&self) -> bool {
        self.recovering.load(Ordering::Relaxed)
    }

    /// Takes no new work from now on.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the server is shutting down.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether nothing runs and no transaction is open.
    pub(crate) fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.transactions.count() == 0 && !self.executor.has_transactions()
    }

    /// A place for one more model.
    ///
    /// # Errors
    /// `Limit` when all are taken.
    pub(crate) fn model_slot(&self) -> Result<ModelSlot> {
        let limit = self.config.limits.models;
        let taken = self.model_count.fetch_add(1, Ordering::Relaxed);
        let slot = ModelSlot(Arc::clone(&self.model_count));
        match taken < limit {
            true => Ok(slot),
            false => Err(Error::Limit {
                what: format!("a further model beside {taken}"),
                limit,
                flag: "max-models",
            }),
        }
    }

    /// Refuses more tokens than one request may have.
    pub(crate) fn check_request_tokens(&self, tokens: u64) -> Result<()> {
        let limit = self.config.limits.request_tokens;
        match tokens > limit {
            true => Err(Error::Limit {
                what: format!("a request of {tokens} tokens"),
                limit,
                flag: "max-request-tokens",
            }),
            false => Ok(()),
        }
    }
}

/// A model's place among those that the server may hold, free again on drop.
#[derive(Debug)]
pub(crate) struct ModelSlot(Arc<AtomicU64>);

impl Drop for ModelSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
