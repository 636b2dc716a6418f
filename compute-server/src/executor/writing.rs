//! A call that writes. What it did is undone when it is dropped before it has finished.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use candle_compute_proto::v1;
use candle_models::executor::{self, Attributes, TensorType};

use super::operation::{Facts, StoredOperation, Work};
use super::sessions::Executor;
use super::state::{SessionKey, State, Transaction};
use super::steps::{self, Step};
use super::tensor::{Content, StoredTensor, element_type};
use crate::access::Caller;
use crate::devices;
use crate::error::{Error, Result};
use crate::names;

/// Bytes that a tensor without elements counts for: its name and its place.
const OVERHEAD: u64 = 1024;

static NEXT_TENSOR: AtomicU64 = AtomicU64::new(1);

/// A chunk to be put.
pub(crate) struct Put<'a> {
    /// The chunk.
    pub(crate) chunk: &'a v1::TensorChunk,
    /// Whether its shape was given.
    pub(crate) has_shape: bool,
    /// Where the tensor is to be; empty for the default.
    pub(crate) device: &'a str,
    /// Whether others are to see it.
    pub(crate) persistent: Option<bool>,
}

/// A call that writes.
pub(crate) struct Write {
    executor: Arc<Executor>,
    caller: Caller,
    key: SessionKey,
    /// The client's transaction, the subtransaction, and how many rollbacks there had been when the call began.
    transaction: Option<(String, u32, usize)>,
    steps: Vec<Step>,
}

impl Write {
    /// Begins a call. An open transaction of the session with another id is undone: the client has given it up.
    ///
    /// # Errors
    /// `SessionEnded`, `Stale` for a transaction that was published, `InvalidArgument` for an id that cannot be one.
    pub(crate) fn begin(
        executor: &Arc<Executor>,
        caller: &Caller,
        session: &str,
        context: Option<&v1::TransactionContext>,
    ) -> Result<Self> {
        let key = executor.key(caller, session);
        let mut state = executor.lock();
        state.session(&key)?;
        let transaction = match context {
            None => None,
            Some(context) => {
                names::validate("transaction", &context.transaction_id)?;
                let transaction = join(&mut state, &key, &context.transaction_id)?;
                let rollbacks = transaction.rolled_back.len();
                Some((
                    context.transaction_id.clone(),
                    context.subtransaction_id.max(1),
                    rollbacks,
                ))
            }
        };
        drop(state);
        executor.wake();
        Ok(Self {
            executor: Arc::clone(executor),
            caller: caller.clone(),
            key,
            transaction,
            steps: Vec::new(),
        })
    }

    /// Takes a chunk; the first one makes the tensor.
    ///
    /// # Errors
    /// `InvalidArgument`, `NameTaken`, `Memory`, `SessionEnded`.
    pub(crate) fn put(&mut self, put: &Put<'_>) -> Result<Arc<StoredTensor>> {
        let name = &put.chunk.name;
        names::validate("tensor", name)?;
        let executor = Arc::clone(&self.executor);
        let mut state = executor.lock();
        let present = state.session(&self.key)?.tensors.get(name).cloned();
        let tensor = match present {
            Some(tensor) => {
                check_agrees(&tensor, put)?;
                tensor
            }
            None => self.make(&mut state, put)?,
        };
        drop(state);
        let number = put.chunk.chunk as usize;
        let given = put.chunk.elements;
        if given != 0 && number < tensor.chunks() && given != tensor.range(number).len() as u64 {
            return Err(Error::invalid(format!(
                "tensor \"{name}\", chunk {number}: it is given as {given} elements, but has {}",
                tensor.range(number).len()
            )));
        }
        tensor.put(number, &put.chunk.data)?;
        self.steps.push(Step::Filled(Arc::clone(&tensor), number));
        Ok(tensor)
    }

    /// Makes the tensor of a first chunk.
    fn make(&mut self, state: &mut State, put: &Put<'_>) -> Result<Arc<StoredTensor>> {
        let name = &put.chunk.name;
        let persistent = put.persistent.unwrap_or(false);
        state.check_free(&self.key, name, persistent)?;
        if !put.has_shape {
            return Err(Error::invalid(format!(
                "there is no tensor \"{name}\" yet, and the first chunk of one needs its shape"
            )));
        }
        let device = match put.device {
            "" => self.executor.default_device.clone(),
            device => {
                devices::open(device)?;
                device.to_owned()
            }
        };
        let shape = sizes(&put.chunk.shape)?;
        let tensor_type = TensorType::new(element_type(put.chunk.dtype)?, &shape)
            .map_err(|error| Error::invalid(format!("tensor \"{name}\": {error}")))?;
        let tensor = self.store(name, tensor_type, device, persistent, None, Content::empty)?;
        state
            .session(&self.key)?
            .tensors
            .insert(name.clone(), Arc::clone(&tensor));
        self.steps.push(Step::Made(Arc::clone(&tensor)));
        Ok(tensor)
    }

    /// A tensor that counts against the memory limit.
    fn store(
        &self,
        name: &str,
        tensor_type: TensorType,
        device: String,
        persistent: bool,
        made_by: Option<Arc<Facts>>,
        content: impl FnOnce(&TensorType) -> Content,
    ) -> Result<Arc<StoredTensor>> {
        let what = format!("tensor \"{name}\" of {tensor_type}");
        let memory = self.caller.tenant.memory();
        let memory = memory.reserve(&what, OVERHEAD.saturating_add(tensor_type.bytes()))?;
        Ok(Arc::new(StoredTensor {
            id: NEXT_TENSOR.fetch_add(1, Ordering::Relaxed),
            name: name.to_owned(),
            content: Mutex::new(content(&tensor_type)),
            tensor_type,
            device,
            persistent,
            made_by,
            created_at: SystemTime::now(),
            _memory: memory,
        }))
    }

    /// Deletes tensors.
    ///
    /// # Errors
    /// `NotFound`, `SessionEnded`.
    pub(crate) fn delete(&mut self, names: &[String]) -> Result<()> {
        let executor = Arc::clone(&self.executor);
        let mut state = executor.lock();
        for name in names {
            let tensor = state.require(&self.key, name)?;
            let session = state.session(&self.key)?;
            if session.tensors.remove(name).is_none() {
                session.hidden.insert(tensor.id);
            }
            self.steps.push(Step::Deleted(tensor));
        }
        Ok(())
    }

    /// Queues an operation.
    ///
    /// # Errors
    /// What `SubmitOperations` is documented to refuse.
    pub(crate) fn submit(&mut self, spec: v1::OperationSpec) -> Result<Arc<StoredOperation>> {
        let executor = Arc::clone(&self.executor);
        let mut state = executor.lock();
        let session = state.session(&self.key)?;
        let (id, waiting) = (session.last_operation + 1, session.waiting());
        if waiting >= executor.queue_limit {
            return Err(Error::Limit {
                what: format!("a further operation beside {waiting} that wait"),
                limit: executor.queue_limit as u64,
                flag: "max-queue",
            });
        }
        let inputs = spec.inputs.iter().map(|name| state.require(&self.key, name));
        let inputs = inputs.collect::<Result<Vec<Arc<StoredTensor>>>>()?;
        inputs.iter().try_for_each(|input| input.check_complete())?;
        let types: Vec<(&str, TensorType)> = inputs
            .iter()
            .map(|input| (input.name.as_str(), input.tensor_type.clone()))
            .collect();
        let attributes = Attributes::parse(&spec.attributes_json)?;
        let plan = executor::plan(&spec.operation, &types, &attributes)?;
        let [name] = &spec.outputs[..] else {
            let count = spec.outputs.len();
            return Err(Error::invalid(format!("{} has 1 output, not {count}", spec.operation)));
        };
        names::validate("tensor", name)?;
        state.check_free(&self.key, name, spec.persistent)?;
        let device = place(&spec, &inputs, plan.moves())?;
        let request = executor.requests.begin(&self.caller, "tensor_operation", "")?;
        request.wake_on_cancel(Arc::clone(&executor.cancelled));
        let (name, persistent, output) = (name.clone(), spec.persistent, plan.output().clone());
        let spec = v1::OperationSpec {
            device: device.clone(),
            ..spec
        };
        let facts = Arc::new(Facts::new(id, spec, request.id()));
        let made_by = Some(Arc::clone(&facts));
        let output = self.store(&name, output, device.clone(), persistent, made_by, |_| Content::Pending)?;
        let work = Work {
            plan,
            inputs,
            output: Arc::clone(&output),
            request,
            tenant: Arc::clone(&self.caller.tenant),
        };
        let operation = Arc::new(StoredOperation::new(facts, work, executor.counter.clone()));
        executor.queues.push(&self.key, &device, Arc::clone(&operation))?;
        let session = state.session(&self.key)?;
        session.last_operation = id;
        session.tensors.insert(name, Arc::clone(&output));
        session.list(Arc::clone(&operation));
        self.steps.push(Step::Made(output));
        self.steps.push(Step::Submitted(Arc::clone(&operation)));
        Ok(operation)
    }

    /// Ends the call: what it did belongs to the transaction, or is final where there is none.
    ///
    /// # Errors
    /// `Stale` when the transaction has ended meanwhile; without one those of a publish. Nothing was done then.
    pub(crate) fn finish(mut self) -> Result<()> {
        let executor = Arc::clone(&self.executor);
        let mut state = executor.lock();
        let Some((id, level, rollbacks)) = &self.transaction else {
            steps::settle(&mut state, &self.key, self.steps.iter())?;
            self.steps.clear();
            return Ok(());
        };
        let session = state.session(&self.key)?;
        let open = session.transaction.as_mut().filter(|open| open.id == *id);
        let open = open.filter(|open| !open.rolled_back.iter().skip(*rollbacks).any(|rolled| rolled <= level));
        let Some(open) = open else {
            return Err(Error::Stale(format!("transaction {id} has ended")));
        };
        open.steps.extend(self.steps.drain(..).map(|step| (*level, step)));
        Ok(())
    }
}

impl Drop for Write {
    fn drop(&mut self) {
        if !self.steps.is_empty() {
            let undone = std::mem::take(&mut self.steps);
            steps::undo(&mut self.executor.lock(), &self.key, undone);
            self.executor.wake();
        }
    }
}

/// The session's open transaction, which is `id` from now on.
fn join<'a>(state: &'a mut State, key: &SessionKey, id: &str) -> Result<&'a mut Transaction> {
    let session = state.session(key)?;
    if session.published(id).is_some() {
        return Err(Error::Stale(format!("transaction {id} was published already")));
    }
    if let Some(other) = session.transaction.take_if(|open| open.id != id) {
        let undone = other.steps.into_iter().map(|(_, step)| step).collect();
        steps::undo(state, key, undone);
    }
    let session = state.session(key)?;
    Ok(session.transaction.get_or_insert_with(|| Transaction::new(id)))
}

/// Refuses a chunk that tells of another tensor than the one that is there.
fn check_agrees(tensor: &StoredTensor, put: &Put<'_>) -> Result<()> {
    let (name, chunk) = (&tensor.name, put.chunk);
    let refuse = |what: String| {
        Err(Error::invalid(format!(
            "tensor \"{name}\", chunk {}: {what}",
            chunk.chunk
        )))
    };
    let present = &tensor.tensor_type;
    if put.has_shape && sizes(&chunk.shape)? != present.shape() {
        let (given, shape) = (&chunk.shape, present.shape());
        return refuse(format!(
            "its shape is given as {given:?}, but the tensor's is {shape:?}"
        ));
    }
    if chunk.dtype != 0 && element_type(chunk.dtype)? != present.element() {
        let given = element_type(chunk.dtype)?;
        return refuse(format!(
            "its dtype is given as {given}, but the tensor's is {}",
            present.element()
        ));
    }
    if !put.device.is_empty() && put.device != tensor.device {
        return refuse(format!(
            "its device is given as {}, but the tensor's is {}",
            put.device, tensor.device
        ));
    }
    match put.persistent {
        Some(persistent) if persistent != tensor.persistent => refuse(format!(
            "persistent is given as {persistent}, but for the tensor it is {}",
            tensor.persistent
        )),
        _ => Ok(()),
    }
}

fn sizes(shape: &[u64]) -> Result<Vec<usize>> {
    let size = |size: &u64| usize::try_from(*size).map_err(|_| Error::invalid(format!("{size} is too large a size")));
    shape.iter().map(size).collect()
}

/// Where an operation runs: as it says, else where its first input is.
fn place(spec: &v1::OperationSpec, inputs: &[Arc<StoredTensor>], moves: bool) -> Result<String> {
    let device = match (spec.device.as_str(), inputs.first()) {
        ("", Some(first)) => first.device.clone(),
        ("", None) => return Err(Error::invalid("an operation without inputs needs a device")),
        (given, _) => given.to_owned(),
    };
    devices::open(&device)?;
    match inputs.iter().find(|input| input.device != device && !moves) {
        None => Ok(device),
        Some(elsewhere) => Err(Error::Precondition {
            message: format!(
                "tensor \"{}\" is on {}, but {} is to be computed on {device}",
                elsewhere.name, elsewhere.device, spec.operation
            ),
            hint: "Bring it there by the operation copy.",
        }),
    }
}
