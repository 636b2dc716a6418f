//! Running and queued work: what `ListRequests` shows and `CancelRequest` stops.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::Notify;

/// What a piece of work is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Waits for its turn.
    Queued,
    /// Reads its prompt.
    Prefill,
    /// Generates tokens.
    Decode,
    /// Runs.
    Running,
    /// Measures a loss between steps.
    Evaluating,
    /// Saves a checkpoint between steps.
    Saving,
}

impl Phase {
    /// Its name in the protocol.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Running => "running",
            Self::Evaluating => "evaluating",
            Self::Saving => "saving",
        }
    }
}

/// One piece of work. It is listed for as long as the [`RequestGuard`] lives.
#[derive(Debug)]
pub(crate) struct ActiveRequest {
    id: u64,
    /// `generate`, `score`, `forward`, `batch`, `step`, `checkpoint`, `load`, …: see `ActiveRequest` of the protocol.
    pub(crate) kind: &'static str,
    /// Its model; empty when it has none.
    pub(crate) model: String,
    /// When it arrived.
    pub(crate) started_at: SystemTime,
    phase: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    /// Woken when the work is cancelled, so that a thread that waits looks at it.
    wake: Mutex<Option<Arc<Notify>>>,
}

impl ActiveRequest {
    /// The id that clients see.
    pub(crate) fn id(&self) -> String {
        format!("r{}", self.id)
    }

    /// What it is doing.
    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Queued,
            1 => Phase::Prefill,
            2 => Phase::Decode,
            3 => Phase::Running,
            4 => Phase::Evaluating,
            _ => Phase::Saving,
        }
    }

    /// Units finished, and units in all (0 when unknown).
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// Sets the phase.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Sets units finished and in all.
    pub(crate) fn set_progress(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// Counts one more unit as finished.
    pub(crate) fn advance(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether somebody asked for it to stop.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Names what to wake when the request is cancelled.
    pub(crate) fn wake_on_cancel(&self, wake: Arc<Notify>) {
        *self.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(wake) = self.wake.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            wake.notify_one();
        }
    }
}

/// Lists the work of the whole server.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    next: AtomicU64,
    active: Mutex<BTreeMap<u64, Arc<ActiveRequest>>>,
}

impl Requests {
    /// Lists a new piece of work, queued, until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>, kind: &'static str, model: &str) -> RequestGuard {
        let request = Arc::new(ActiveRequest {
            id: self.next.fetch_add(1, Ordering::Relaxed) + 1,
            kind,
            model: model.to_owned(),
            started_at: SystemTime::now(),
            phase: AtomicU8::new(Phase::Queued as u8),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            wake: Mutex::new(None),
        });
        self.lock().insert(request.id, Arc::clone(&request));
        RequestGuard {
            requests: Arc::clone(self),
            request,
        }
    }

    /// The work, oldest first.
    pub(crate) fn list(&self) -> Vec<Arc<ActiveRequest>> {
        self.lock().values().cloned().collect()
    }

    /// Whether nothing runs or waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Asks a piece of work to stop; false when there is none with this id.
    pub(crate) fn cancel(&self, id: &str) -> bool {
        let Some(number) = id.strip_prefix('r').and_then(|digits| digits.parse::<u64>().ok()) else {
            return false;
        };
        let request = self.lock().get(&number).cloned();
        request.inspect(|request| request.cancel()).is_some()
    }

    /// Asks all work to stop.
    pub(crate) fn cancel_all(&self) {
        self.list().iter().for_each(|request| request.cancel());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Arc<ActiveRequest>>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a piece of work listed.
#[derive(Debug)]
pub(crate) struct RequestGuard {
    requests: Arc<Requests>,
    request: Arc<ActiveRequest>,
}

impl std::ops::Deref for RequestGuard {
    type Target = ActiveRequest;

    fn deref(&self) -> &ActiveRequest {
        &self.request
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.requests.lock().remove(&self.request.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_listed_until_its_guard_is_dropped() {
        let requests = Arc::new(Requests::default());
        let guard = requests.begin("generate", "m");
        guard.set_phase(Phase::Decode);
        guard.set_progress(3, 10);
        assert_eq!(requests.list()[0].phase(), Phase::Decode);
        assert!(requests.cancel(&guard.id()));
        assert!(guard.is_cancelled());
        assert!(!requests.cancel("r999") && !requests.cancel("x"));
        drop(guard);
        assert!(requests.is_empty());
    }
}
