//! A call's way into its transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_compute_proto::v1;

use super::committing::AUTOMATIC;
use super::transaction::{Transaction, Write, WriteKind};
use crate::access::Caller;
use crate::app::App;
use crate::error::{Error, Result};
use crate::names::ModelKey;
use crate::owner::{ModelHandle, Owner, Ticket, Trained, TrainingRequest, View};
use crate::registry::Unavailable;

/// A call that reads: what everybody sees, and what its transaction staged.
pub(crate) struct Reader {
    app: Arc<App>,
    transaction: Option<Arc<Transaction>>,
}

impl Reader {
    /// The reader of a call. A transaction that has written nothing yet sees what everybody sees.
    ///
    /// # Errors
    /// `Stale` when the transaction is just ending.
    pub(crate) fn open(app: &Arc<App>, context: Option<&v1::TransactionContext>) -> Result<Self> {
        let id = context
            .map(|context| context.transaction_id.as_str())
            .filter(|id| !id.is_empty());
        let transaction = id.and_then(|id| app.transactions.find(id));
        if let Some(transaction) = &transaction {
            transaction.enter()?;
        }
        Ok(Self {
            app: Arc::clone(app),
            transaction,
        })
    }

    /// Whose state is seen.
    pub(crate) fn view(&self) -> View {
        self.transaction.as_ref().map_or(View::Committed, |transaction| {
            View::Transaction(Arc::clone(&transaction.id))
        })
    }

    /// The model called `name`.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn model(&self, name: &str) -> Result<ModelHandle> {
        self.find(name, "")
    }

    /// The model called `model`, or the adapter `adapter` of it unless that is empty.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` for an adapter of a model whose weights the transaction has changed.
    pub(crate) fn find(&self, model: &str, adapter: &str) -> Result<ModelHandle> {
        find(&self.app, self.transaction.as_deref(), &self.view(), model, adapter)
    }

    /// All models that are seen, by name, with whether only this transaction sees them.
    pub(crate) fn models(&self) -> Vec<(ModelHandle, bool)> {
        let all = self.models_and_adapters().into_iter();
        all.filter(|(model, _)| model.key().adapter.is_none()).collect()
    }

    /// The adapters that are seen, by model and name, with whether only this transaction sees them.
    pub(crate) fn adapters(&self) -> Vec<(ModelHandle, bool)> {
        let all = self.models_and_adapters().into_iter();
        all.filter(|(model, _)| model.key().adapter.is_some()).collect()
    }

    fn models_and_adapters(&self) -> Vec<(ModelHandle, bool)> {
        let mut models: std::collections::BTreeMap<ModelKey, (ModelHandle, bool)> = self
            .app
            .registry
            .list()
            .into_iter()
            .map(|model| (model.key(), (model, false)))
            .collect();
        if let Some(transaction) = &self.transaction {
            for write in &transaction.lock().writes {
                match &write.kind {
                    WriteKind::CreateModel(model) | WriteKind::ReplaceModel { new: model, .. } => {
                        models.insert(model.key(), (model.clone(), true));
                    }
                    WriteKind::DropModel(model) => {
                        models.remove(&model.key());
                    }
                    _ => {}
                }
            }
        }
        models.into_values().collect()
    }

    /// Models that could not be made again after a restart, and that the transaction has not dropped.
    pub(crate) fn unavailable(&self) -> Vec<Unavailable> {
        let mut models = self.app.registry.unavailable_models();
        if let Some(transaction) = &self.transaction {
            let state = transaction.lock();
            let drops = |write: &Write, name: &str| matches!(&write.kind, WriteKind::DropUnavailable(key) if *key == ModelKey::new(name, ""));
            models.retain(|model| !state.writes.iter().any(|write| drops(write, &model.row.name)));
        }
        models
    }

    /// All checkpoints that are seen, in the order of model and step.
    pub(crate) fn checkpoints(&self) -> Vec<v1::Checkpoint> {
        let row = |row: v1::Checkpoint| ((row.model.clone(), row.step), row);
        let mut rows: std::collections::BTreeMap<_, _> = self.app.checkpoints.list().into_iter().map(row).collect();
        if let Some(transaction) = &self.transaction {
            for write in &transaction.lock().writes {
                match &write.kind {
                    WriteKind::CreateCheckpoint(staged) => {
                        rows.insert(staged.key(), staged.row.clone());
                    }
                    WriteKind::DeleteCheckpoint(key) => {
                        rows.remove(key);
                    }
                    _ => {}
                }
            }
        }
        rows.into_values().collect()
    }

    /// Where the tokenizer called `name` lies that the transaction itself has trained, if it has.
    pub(crate) fn staged_tokenizer(&self, name: &str) -> Option<std::path::PathBuf> {
        let transaction = self.transaction.as_ref()?;
        let state = transaction.lock();
        state.writes.iter().rev().find_map(|write| match &write.kind {
            WriteKind::CreateTokenizer(staged) if staged.name() == name => Some(staged.path().to_owned()),
            _ => None,
        })
    }

    /// All evaluations that are seen, in the order of their ids.
    pub(crate) fn evaluations(&self) -> Vec<v1::Evaluation> {
        let rows = self.app.evaluations.list().into_iter();
        let mut rows: std::collections::BTreeMap<_, _> = rows.map(|row| (row.id, row)).collect();
        if let Some(transaction) = &self.transaction {
            for write in &transaction.lock().writes {
                match &write.kind {
                    WriteKind::CreateEvaluation(staged) => {
                        rows.insert(staged.id(), staged.row().clone());
                    }
                    WriteKind::DeleteEvaluation(id) => {
                        rows.remove(id);
                    }
                    _ => {}
                }
            }
        }
        rows.into_values().collect()
    }

    /// The folder of a checkpoint that is seen.
    pub(crate) fn checkpoint_path(&self, key: &crate::checkpoints::Key) -> Option<std::path::PathBuf> {
        let published = self.app.checkpoints.path(key);
        let Some(transaction) = &self.transaction else {
            return published;
        };
        transaction
            .lock()
            .writes
            .iter()
            .fold(published, |found, write| match &write.kind {
                WriteKind::CreateCheckpoint(staged) if staged.key() == *key => Some(staged.files.path().to_owned()),
                WriteKind::DeleteCheckpoint(deleted) if deleted == key => None,
                _ => found,
            })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(transaction) = &self.transaction {
            transaction.leave();
        }
    }
}

/// A call that writes. Without a transaction of the client's it is one of its own, published by [`close`](Self::close)
/// and rolled back when it is dropped before.
pub(crate) struct Scope {
    app: Arc<App>,
    transaction: Arc<Transaction>,
    ticket: Ticket,
    automatic: bool,
    closed: bool,
    reader: Option<Reader>,
}

static NEXT_AUTOMATIC: AtomicU64 = AtomicU64::new(1);

impl Scope {
    /// The scope of a call; begins the transaction on its first write.
    ///
    /// # Errors
    /// `Limit` when too many transactions are open, `Stale` for one that has ended, `InvalidArgument` for an id that is
    /// empty or too long.
    pub(crate) fn open(app: &Arc<App>, context: Option<&v1::TransactionContext>, caller: &Caller) -> Result<Self> {
        let automatic = context.is_none();
        let (transaction, subtransaction) = match context {
            Some(context) => {
                let transaction = app.transactions.find_or_begin(&context.transaction_id, caller)?;
                (transaction, context.subtransaction_id.max(1))
            }
            None => {
                let id = format!("{AUTOMATIC}{}", NEXT_AUTOMATIC.fetch_add(1, Ordering::Relaxed));
                (app.transactions.find_or_begin(&id, caller)?, 1)
            }
        };
        transaction.enter()?;
        let ticket = Ticket {
            transaction: Arc::clone(&transaction.id),
            subtransaction,
        };
        let reader = Reader {
            app: Arc::clone(app),
            transaction: Some(Arc::clone(&transaction)),
        };
        Ok(Self {
            app: Arc::clone(app),
            transaction,
            ticket,
            automatic,
            closed: false,
            reader: Some(reader),
        })
    }

    /// Where a write belongs.
    pub(crate) fn ticket(&self) -> Ticket {
        self.ticket.clone()
    }

    /// Whose state is seen.
    pub(crate) fn view(&self) -> View {
        View::Transaction(Arc::clone(&self.transaction.id))
    }

    /// The model called `name`.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn model(&self, name: &str) -> Result<ModelHandle> {
        self.find(name, "")
    }

    /// As [`Reader::find`].
    pub(crate) fn find(&self, model: &str, adapter: &str) -> Result<ModelHandle> {
        find(&self.app, Some(&self.transaction), &self.view(), model, adapter)
    }

    /// The model or adapter called `key`, if there is one.
    pub(crate) fn named(&self, key: &ModelKey) -> Option<ModelHandle> {
        visible(&self.app, Some(&self.transaction), key)
    }

    /// What the transaction sees.
    pub(crate) fn reader(&self) -> Option<&Reader> {
        self.reader.as_ref()
    }

    /// Adds a write.
    ///
    /// # Errors
    /// `Stale` when the transaction has ended meanwhile.
    pub(crate) fn push(&self, kind: WriteKind) -> Result<()> {
        self.transaction.push(self.ticket.subtransaction, kind)
    }

    /// Stages something in the owner of `model`.
    ///
    /// # Errors
    /// Those of `work`, and `Stale` when the transaction has ended.
    pub(crate) async fn change<T: Send + 'static>(
        &self,
        model: &ModelHandle,
        work: impl FnOnce(&mut Owner, &Ticket) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (ticket, transaction) = (self.ticket(), Arc::clone(&self.transaction));
        let work = model.call(move |owner| {
            transaction.check_open()?;
            work(owner, &ticket)
        });
        self.changing(model, work).await
    }

    /// As [`change`](Self::change), for what uses up the committed gradient: it waits for a publish that is under way.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub(crate) async fn change_settled<T: Send + 'static>(
        &self,
        model: &ModelHandle,
        work: impl FnOnce(&mut Owner, &Ticket) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (ticket, transaction) = (self.ticket(), Arc::clone(&self.transaction));
        let work = model.start_work(move |owner, reply| {
            owner.once_settled(move |owner| {
                let open = transaction.check_open();
                reply.send(open.and_then(|()| work(owner, &ticket)));
            });
        });
        self.changing(model, work).await
    }

    /// Queues sequences whose gradient is to be staged, and waits for them.
    ///
    /// # Errors
    /// Those of training, and `Stale` when the transaction has ended.
    pub(crate) async fn train(&self, model: &ModelHandle, request: TrainingRequest) -> Result<Trained> {
        let transaction = Arc::clone(&self.transaction);
        let work = model.start_work(move |owner, reply| match transaction.check_open() {
            Ok(()) => owner.submit_training(request, reply),
            Err(error) => reply.send(Err(error)),
        });
        self.changing(model, work).await
    }

    /// Notes that `work` stages something in the owner of `model`: before it starts, so that a rollback that overtakes
    /// it knows where to look.
    async fn changing<T>(&self, model: &ModelHandle, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.push(WriteKind::Change(model.clone()))?;
        let result = work.await;
        if result.is_err() {
            self.transaction.retract_change(model);
        }
        result
    }

    /// Ends the call: publishes what it wrote, if the transaction is its own.
    ///
    /// # Errors
    /// As publishing.
    pub(crate) async fn close(mut self) -> Result<()> {
        self.closed = true;
        drop(self.reader.take());
        if !self.automatic {
            return Ok(());
        }
        let (app, id) = (Arc::clone(&self.app), Arc::clone(&self.transaction.id));
        // A client that goes away now must not leave half a publish.
        let published = tokio::spawn(async move { app.publish(&id, false).await });
        published
            .await
            .map_err(|error| Error::Internal(format!("publishing failed: {error}")))?
            .map(drop)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        if self.automatic && !self.closed {
            let (app, transaction) = (Arc::clone(&self.app), Arc::clone(&self.transaction));
            tokio::spawn(async move { app.discard(&transaction).await });
        }
    }
}

fn visible(app: &App, transaction: Option<&Transaction>, key: &ModelKey) -> Option<ModelHandle> {
    let published = app.registry.find(key);
    match transaction {
        Some(transaction) => transaction.model(key, published),
        None => published,
    }
}

/// The model, or an adapter of it, whose weights are those that everybody sees: its thread knows no others.
fn find(app: &App, transaction: Option<&Transaction>, view: &View, model: &str, adapter: &str) -> Result<ModelHandle> {
    let base = visible(app, transaction, &ModelKey::new(model, ""))
        .ok_or_else(|| app.registry.missing(&ModelKey::new(model, "")))?;
    if adapter.is_empty() {
        return Ok(base);
    }
    let key = ModelKey::new(model, adapter);
    let found = visible(app, transaction, &key).filter(|found| found.is_adapter_of(&base));
    let found = found.ok_or_else(|| app.registry.missing(&key))?;
    if base.changes_weights(view) {
        return Err(Error::Precondition {
            message: format!(
                "the weights of model \"{model}\" were changed in this transaction; its adapters do not see that"
            ),
            hint: "Commit first, then use the adapter.",
        });
    }
    Ok(found)
}
