//! An operation: what is known of it, and its work until it has ended.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use candle_compute_proto::v1::{self, OperationStatus};
use candle_models::Tensor;
use candle_models::executor::Plan;
use prometheus::IntCounterVec;
use tokio::sync::watch;

use super::tensor::{Content, Failure, StoredTensor};
use crate::access::Tenant;
use crate::error::Error;
use crate::requests::{Phase, RequestGuard};

/// What is known of an operation.
pub(crate) struct Facts {
    /// Its number within the session.
    pub(crate) id: u64,
    /// As it was submitted, with the device filled in.
    spec: v1::OperationSpec,
    request: String,
    submitted_at: SystemTime,
    status: watch::Sender<OperationStatus>,
    cancelled: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
    ending: Mutex<Ending>,
}

#[derive(Default)]
struct Ending {
    started_at: Option<SystemTime>,
    finished_at: Option<SystemTime>,
    error: String,
}

/// An operation of a session.
pub(crate) struct StoredOperation {
    /// What is known of it.
    pub(crate) facts: Arc<Facts>,
    /// Until it has ended, or a worker has taken it.
    work: Mutex<Option<Work>>,
    counter: IntCounterVec,
}

/// What a worker needs.
pub(super) struct Work {
    pub(super) plan: Plan,
    pub(super) inputs: Vec<Arc<StoredTensor>>,
    pub(super) output: Arc<StoredTensor>,
    pub(super) request: RequestGuard,
    pub(super) tenant: Arc<Tenant>,
}

impl Facts {
    pub(super) fn new(id: u64, spec: v1::OperationSpec, request: String) -> Self {
        Self {
            id,
            spec,
            request,
            submitted_at: SystemTime::now(),
            status: watch::Sender::new(OperationStatus::Queued),
            cancelled: AtomicBool::new(false),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            ending: Mutex::default(),
        }
    }

    /// How errors call it: number, kind and tensors.
    pub(super) fn label(&self) -> String {
        let quoted = |names: &[String]| {
            let names: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
            names.join(", ")
        };
        let v1::OperationSpec {
            operation,
            inputs,
            outputs,
            ..
        } = &self.spec;
        // A concatenation may have any number of inputs.
        let inputs = match &inputs[..] {
            few if few.len() <= 4 => quoted(few),
            many => format!("{} and {} more", quoted(&many[..3]), many.len() - 3),
        };
        format!(
            "operation {} ({operation} of {inputs} into {})",
            self.id,
            quoted(outputs)
        )
    }

    fn lock(&self) -> MutexGuard<'_, Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        is_final(*self.status.borrow())
    }

    /// Waits until it has ended.
    pub(crate) async fn ended(&self) {
        // The sender is this value itself, so that waiting cannot fail.
        let _ = self.status.subscribe().wait_for(|status| is_final(*status)).await;
    }

    /// Whether it is to stop.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(super) fn set_progress(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// What the protocol tells of it.
    pub(crate) fn describe(&self) -> v1::Operation {
        let ending = self.lock();
        v1::Operation {
            id: self.id,
            spec: Some(self.spec.clone()),
            status: (*self.status.borrow()).into(),
            error: ending.error.clone(),
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
            submitted_at: Some(self.submitted_at.into()),
            started_at: ending.started_at.map(Into::into),
            finished_at: ending.finished_at.map(Into::into),
            request_id: self.request.clone(),
        }
    }
}

fn is_final(status: OperationStatus) -> bool {
    !matches!(status, OperationStatus::Queued | OperationStatus::Running)
}

impl StoredOperation {
    pub(super) fn new(facts: Arc<Facts>, work: Work, counter: IntCounterVec) -> Self {
        Self {
            facts,
            work: Mutex::new(Some(work)),
            counter,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a worker can take it: its inputs are there or have failed, or there is nothing to do any more.
    pub(super) fn is_due(&self) -> bool {
        let work = self.lock();
        let inputs = work.as_ref().map_or(&[][..], |work| &work.inputs);
        !inputs.iter().any(|input| input.is_pending())
    }

    /// Gives a worker the work; none when it has ended already.
    pub(super) fn start(&self) -> Option<Work> {
        let work = self.lock().take()?;
        work.request.set_phase(Phase::Running);
        self.facts.lock().started_at = Some(SystemTime::now());
        self.facts.status.send_replace(OperationStatus::Running);
        Some(work)
    }

    /// The tensor that it makes, while it waits.
    pub(super) fn output(&self) -> Option<Arc<StoredTensor>> {
        self.lock().as_ref().map(|work| Arc::clone(&work.output))
    }

    /// Whether it waits and its request was cancelled.
    pub(super) fn is_request_cancelled(&self) -> bool {
        self.lock().as_ref().is_some_and(|work| work.request.is_cancelled())
    }

    /// Stops it, now if it waits, otherwise at the next chance.
    pub(super) fn cancel(&self) {
        self.facts.cancelled.store(true, Ordering::Relaxed);
        let waiting = self.lock().take();
        if let Some(work) = waiting {
            self.finish(work, Err(self.cancellation()));
        }
    }

    /// The failure of an operation that was stopped.
    pub(super) fn cancellation(&self) -> Failure {
        let message = format!("{} was cancelled", self.facts.label());
        Failure {
            cause: message.as_str().into(),
            message,
            cancelled: true,
            code: tonic::Code::Cancelled,
            sqlstate: "57014",
        }
    }

    /// The failure of an operation by an error of its own.
    pub(super) fn failure(&self, error: &Error) -> Failure {
        let (code, sqlstate, _) = error.classify();
        let message = format!("{} failed: {error}", self.facts.label());
        Failure {
            cause: message.as_str().into(),
            message,
            cancelled: false,
            code,
            sqlstate,
        }
    }

    /// Ends it: the output is there or has failed, who waits goes on.
    pub(super) fn finish(&self, work: Work, result: Result<Tensor, Failure>) {
        let status = match &result {
            Ok(_) => OperationStatus::Done,
            Err(failure) if self.facts.is_cancelled() || failure.cancelled && work.request.is_cancelled() => {
                OperationStatus::Cancelled
            }
            Err(_) => OperationStatus::Failed,
        };
        let mut ending = self.facts.lock();
        ending.finished_at = Some(SystemTime::now());
        *work.output.lock() = match result {
            Ok(tensor) => Content::Ready(tensor),
            Err(failure) => {
                ending.error.clone_from(&failure.message);
                Content::Failed(failure)
            }
        };
        drop(ending);
        let outcome = match status {
            OperationStatus::Done => "done",
            OperationStatus::Cancelled => "cancelled",
            _ => "failed",
        };
        self.counter
            .with_label_values(&[self.facts.spec.operation.as_str(), outcome])
            .inc();
        // The request goes off the list before anybody learns of the end.
        drop(work);
        self.facts.status.send_replace(status);
    }
}
