//! Running and queued work: what `ListRequests` shows and `CancelRequest` stops.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;

use crate::access::{Caller, Tenant};
use crate::error::{Error, Result};

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

/// Leaves an error for a client that does not read.
type GiveUp = Box<dyn FnOnce(Error) + Send>;

/// One piece of work. It is listed for as long as the [`RequestGuard`] lives.
pub(crate) struct ActiveRequest {
    id: u64,
    /// `generate`, `score`, `forward`, `batch`, `step`, `checkpoint`, `load`, …: see `ActiveRequest` of the protocol.
    pub(crate) kind: &'static str,
    /// Its model; empty when it has none.
    pub(crate) model: String,
    /// Whose it is.
    pub(crate) tenant: Arc<Tenant>,
    /// When it arrived.
    pub(crate) started_at: SystemTime,
    phase: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    /// Since when it waits for a client that does not read.
    stalled: Mutex<Option<Instant>>,
    /// Tells the client, should it ever read on, that the work was given up.
    give_up: Mutex<Option<GiveUp>>,
    given_up: AtomicBool,
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

    /// Says how an error reaches the client when the work is given up.
    pub(crate) fn on_give_up(&self, tell: impl FnOnce(Error) + Send + 'static) {
        *self.give_up.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(tell));
    }

    /// Notes whether the work waits for a client that does not read.
    pub(crate) fn set_stalled(&self, stalled: bool) {
        let mut since = self.stalled.lock().unwrap_or_else(PoisonError::into_inner);
        match stalled {
            true => drop(since.get_or_insert_with(Instant::now)),
            false => *since = None,
        }
    }

    /// Whether its client was waited for too long.
    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Gives the work up if it has waited for its client for longer than `timeout`.
    fn give_up_after(&self, timeout: Duration) {
        let since = *self.stalled.lock().unwrap_or_else(PoisonError::into_inner);
        if since.is_none_or(|since| since.elapsed() < timeout) {
            return;
        }
        if let Some(tell) = self.give_up.lock().unwrap_or_else(PoisonError::into_inner).take() {
            tell(Error::Stalled(timeout));
        }
        self.given_up.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn wake(&self) {
        if let Some(wake) = self.wake.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            wake.notify_one();
        }
    }
}

/// Lists the work of the whole server.
#[derive(Default)]
pub(crate) struct Requests {
    next: AtomicU64,
    active: Mutex<BTreeMap<u64, Arc<ActiveRequest>>>,
}

impl Requests {
    /// Lists a new piece of work, queued, until the guard is dropped.
    ///
    /// # Errors
    /// `Quota` when the caller's tenant has as much work at once as it may have.
    pub(crate) fn begin(self: &Arc<Self>, caller: &Caller, kind: &'static str, model: &str) -> Result<RequestGuard> {
        caller.tenant.begin_work()?;
        Ok(self.list_new(caller, kind, model, true))
    }

    /// Lists work that the client does by calls of its own, which are counted themselves.
    pub(crate) fn begin_tracking(self: &Arc<Self>, caller: &Caller, kind: &'static str, model: &str) -> RequestGuard {
        self.list_new(caller, kind, model, false)
    }

    fn list_new(self: &Arc<Self>, caller: &Caller, kind: &'static str, model: &str, counted: bool) -> RequestGuard {
        let request = Arc::new(ActiveRequest {
            id: self.next.fetch_add(1, Ordering::Relaxed) + 1,
            kind,
            model: model.to_owned(),
            tenant: Arc::clone(&caller.tenant),
            started_at: SystemTime::now(),
            phase: AtomicU8::new(Phase::Queued as u8),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            stalled: Mutex::new(None),
            give_up: Mutex::new(None),
            given_up: AtomicBool::new(false),
            wake: Mutex::new(None),
        });
        self.lock().insert(request.id, Arc::clone(&request));
        RequestGuard {
            requests: Arc::clone(self),
            request,
            counted,
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

    /// Asks a piece of work to stop; false when there is none with this id that the caller may stop.
    pub(crate) fn cancel(&self, caller: &Caller, id: &str) -> bool {
        let Some(number) = id.strip_prefix('r').and_then(|digits| digits.parse::<u64>().ok()) else {
            return false;
        };
        let request = self.lock().get(&number).cloned();
        let request = request.filter(|request| caller.may_manage(request.tenant.name()));
        request.inspect(|request| request.cancel()).is_some()
    }

    /// Gives up work that has waited for longer than `timeout` for a client that does not read.
    pub(crate) fn give_up_stalled(&self, timeout: Duration) {
        self.list().iter().for_each(|request| request.give_up_after(timeout));
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
pub(crate) struct RequestGuard {
    requests: Arc<Requests>,
    request: Arc<ActiveRequest>,
    /// Whether it is one of those that its tenant may have at once.
    counted: bool,
}

impl RequestGuard {
    /// The request, for whoever looks whether it goes on while the guard is busy elsewhere.
    pub(crate) fn watched(&self) -> Arc<ActiveRequest> {
        Arc::clone(&self.request)
    }
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
        if self.counted {
            self.request.tenant.end_work();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{Directory, Roles};
    use crate::cache_memory::CacheMemory;
    use crate::memory::MemoryBudget;

    fn caller(name: &str, roles: &str) -> Caller {
        let tenants = Directory::open(None, &MemoryBudget::new(0, CacheMemory::new(0, 0))).unwrap();
        Caller {
            tenant: tenants.tenant(name),
            roles: Roles::parse(roles).unwrap(),
            connection: None,
            deadline: None,
        }
    }

    #[test]
    fn work_is_listed_until_its_guard_is_dropped() {
        let requests = Arc::new(Requests::default());
        let ann = caller("ann", "read");
        let guard = requests.begin(&ann, "generate", "m").unwrap();
        guard.set_phase(Phase::Decode);
        guard.set_progress(3, 10);
        assert_eq!(requests.list()[0].phase(), Phase::Decode);
        assert!(requests.cancel(&ann, &guard.id()));
        assert!(guard.is_cancelled());
        assert!(!requests.cancel(&ann, "r999") && !requests.cancel(&ann, "x"));
        drop(guard);
        assert!(requests.is_empty());
    }

    #[test]
    fn only_its_tenant_and_administrators_cancel_work() {
        let requests = Arc::new(Requests::default());
        let guard = requests.begin(&caller("ann", "read"), "generate", "m").unwrap();
        assert!(!requests.cancel(&caller("bob", "read,generate,train"), &guard.id()));
        assert!(!guard.is_cancelled());
        assert!(requests.cancel(&caller("bob", "admin"), &guard.id()));
        assert!(guard.is_cancelled());
    }
}
