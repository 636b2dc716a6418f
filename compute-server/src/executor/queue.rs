//! The workers: a thread for each device takes the operations of all sessions in turn, those of one session in the order
//! in which they were submitted.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_models::Tensor;
use candle_models::executor::Monitor;

use super::operation::{StoredOperation, Work};
use super::state::SessionKey;
use super::tensor::Failure;
use crate::devices;
use crate::error::{Error, Result};

/// What waits, by device.
#[derive(Default)]
pub(super) struct Queues {
    waiting: Mutex<HashMap<String, Vec<Line>>>,
    changed: Condvar,
}

/// The operations of one session on one device.
struct Line {
    session: SessionKey,
    operations: VecDeque<Arc<StoredOperation>>,
}

impl Queues {
    /// Queues operations; starts the worker of a device that has none.
    ///
    /// # Errors
    /// `Io` when the system gives no thread.
    pub(super) fn push(
        self: &Arc<Self>,
        session: &SessionKey,
        device: &str,
        operation: Arc<StoredOperation>,
    ) -> Result<()> {
        let mut waiting = self.lock();
        if !waiting.contains_key(device) {
            let (queues, name) = (Arc::clone(self), device.to_owned());
            std::thread::Builder::new()
                .name(format!("executor {device}"))
                .spawn(move || queues.work(&name))
                .map_err(|error| Error::io("starting a thread", error))?;
        }
        let lines = waiting.entry(device.to_owned()).or_default();
        match lines.iter_mut().find(|line| line.session == *session) {
            Some(line) => line.operations.push_back(operation),
            None => lines.push(Line {
                session: session.clone(),
                operations: VecDeque::from([operation]),
            }),
        }
        drop(waiting);
        self.changed.notify_all();
        Ok(())
    }

    /// Ends operations that wait and whose requests were cancelled.
    pub(super) fn drop_cancelled(&self) {
        let cancelled: Vec<Arc<StoredOperation>> = {
            let waiting = self.lock();
            let operations = waiting.values().flatten().flat_map(|line| &line.operations);
            operations
                .filter(|operation| operation.is_request_cancelled())
                .cloned()
                .collect()
        };
        cancelled.iter().for_each(|operation| operation.cancel());
        self.wake();
    }

    /// Has the workers look again: something has ended.
    pub(super) fn wake(&self) {
        // With the lock, so that a worker which has just looked does not miss it.
        drop(self.lock());
        self.changed.notify_all();
    }

    fn work(&self, device: &str) {
        loop {
            let operation = self.next(device);
            if let Some(work) = operation.start() {
                let result = run(&operation, &work);
                operation.finish(work, result);
            }
            self.wake();
        }
    }

    /// The next operation; its session goes to the end of the line.
    fn next(&self, device: &str) -> Arc<StoredOperation> {
        let mut waiting = self.lock();
        loop {
            let lines = waiting.entry(device.to_owned()).or_default();
            let due = |line: &Line| line.operations.front().is_some_and(|first| first.is_due());
            if let Some(index) = lines.iter().position(due) {
                let mut line = lines.remove(index);
                let first = line.operations.pop_front();
                if !line.operations.is_empty() {
                    lines.push(line);
                }
                if let Some(first) = first {
                    return first;
                }
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Line>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Computes the output; a failed input is the operation's failure.
fn run(operation: &StoredOperation, work: &Work) -> Result<Tensor, Failure> {
    if let Some(failure) = work.inputs.iter().find_map(|input| input.failure()) {
        return Err(Failure {
            message: format!("{} has no input, because {}", operation.facts.label(), failure.cause),
            ..failure
        });
    }
    let computed = catch_unwind(AssertUnwindSafe(|| compute(operation, work)));
    match computed {
        Ok(Ok(tensor)) => Ok(tensor),
        Ok(Err(Error::Cancelled | Error::Model(candle_models::Error::Cancelled))) => Err(operation.cancellation()),
        Ok(Err(error)) => Err(operation.failure(&error)),
        Err(_) => {
            let error = Error::Internal("the operation panicked; the server's log says where".to_owned());
            Err(operation.failure(&error))
        }
    }
}

fn compute(operation: &StoredOperation, work: &Work) -> Result<Tensor> {
    let label = operation.facts.label();
    let _workspace = work.tenant.memory().reserve(&label, work.plan.workspace())?;
    let device = devices::open(&work.output.device)?;
    let inputs = work.inputs.iter().map(|input| {
        let pending = || Error::Internal(format!("an input of {label} is pending"));
        input.value()?.ok_or_else(pending)
    });
    let inputs = inputs.collect::<Result<Vec<Tensor>>>()?;
    let monitor = Monitor {
        cancelled: &|| operation.facts.is_cancelled() || work.request.is_cancelled(),
        progress: &|done, total| {
            operation.facts.set_progress(done, total);
            work.request.set_progress(done, total);
        },
    };
    Ok(work.plan.run(&inputs, &device, &monitor)?)
}
