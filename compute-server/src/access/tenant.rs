//! A tenant: the holder of one token or several, with quotas and what was used of them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::bucket::{Bucket, Rate};
use crate::error::{Error, Result};
use crate::memory::MemoryBudget;

/// What a tenant may use; none is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Quotas {
    /// Calls a second. Those of one second may come at once.
    pub(crate) requests_per_second: Option<f64>,
    /// Tokens a minute that models read and generate for the tenant. Those of one minute may come at once.
    pub(crate) tokens_per_minute: Option<f64>,
    /// Pieces of work at once, running and queued.
    pub(crate) concurrent: Option<u64>,
    /// Bytes held by the models that the tenant loaded (weights, gradients and optimizer states), and by its tensors.
    pub(crate) memory: Option<u64>,
}

impl Quotas {
    fn requests(&self) -> Option<Rate> {
        self.requests_per_second.map(|per_second| Rate {
            per_second,
            capacity: per_second.max(1.0),
        })
    }

    fn tokens(&self) -> Option<Rate> {
        self.tokens_per_minute.map(|per_minute| Rate {
            per_second: per_minute / 60.0,
            capacity: per_minute,
        })
    }
}

/// The holder of tokens.
#[derive(Debug)]
pub(crate) struct Tenant {
    name: Arc<str>,
    usage: Mutex<Usage>,
    memory: Arc<MemoryBudget>,
}

#[derive(Debug)]
struct Usage {
    quotas: Quotas,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: u64,
}

impl Tenant {
    /// A tenant that has used nothing and may use all that the server has. `memory` is the server's.
    pub(super) fn new(name: &str, memory: &Arc<MemoryBudget>) -> Self {
        Self {
            name: name.into(),
            usage: Mutex::new(Usage {
                quotas: Quotas::default(),
                requests: None,
                tokens: None,
                running: 0,
            }),
            memory: MemoryBudget::of_tenant(name, memory),
        }
    }

    /// Its name; empty for everybody where no token is asked for.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The budget of what the tenant's models hold, within the server's.
    pub(crate) fn memory(&self) -> &Arc<MemoryBudget> {
        &self.memory
    }

    /// Sets quotas; what has been used of those that stay remains used.
    pub(super) fn set_quotas(&self, quotas: Quotas) {
        let mut usage = self.lock();
        if usage.quotas.requests_per_second != quotas.requests_per_second {
            usage.requests = None;
        }
        if usage.quotas.tokens_per_minute != quotas.tokens_per_minute {
            usage.tokens = None;
        }
        usage.quotas = quotas;
        self.memory.set_limit(quotas.memory.unwrap_or(u64::MAX));
    }

    /// Counts a call.
    ///
    /// # Errors
    /// `Quota` when the calls of this second are used up.
    pub(crate) fn admit_call(&self) -> Result<()> {
        let mut usage = self.lock();
        let Some(rate) = usage.quotas.requests() else {
            return Ok(());
        };
        let now = Instant::now();
        let bucket = usage.requests.get_or_insert_with(|| Bucket::full(rate, now));
        let refused = |wait| self.over(format!("{} requests per second", rate.per_second), Some(wait));
        bucket.take(1.0, rate, now).map_err(refused)
    }

    /// Counts tokens that a model is about to read.
    ///
    /// # Errors
    /// `Quota` when the tokens of this minute are used up, or would never suffice.
    pub(crate) fn admit_tokens(&self, count: usize) -> Result<()> {
        let mut usage = self.lock();
        let Some(rate) = usage.quotas.tokens() else {
            return Ok(());
        };
        let (now, amount) = (Instant::now(), count as f64);
        let quota = format!("{} tokens per minute", rate.capacity);
        if amount > rate.capacity {
            return Err(self.over(format!("{quota}, less than the {count} of this request"), None));
        }
        let bucket = usage.tokens.get_or_insert_with(|| Bucket::full(rate, now));
        bucket
            .take(amount, rate, now)
            .map_err(|wait| self.over(quota, Some(wait)))
    }

    /// Counts tokens that were generated. What goes beyond the quota delays the tenant's next request.
    pub(crate) fn charge_tokens(&self, count: usize) {
        let mut usage = self.lock();
        let Some(rate) = usage.quotas.tokens() else { return };
        let now = Instant::now();
        let bucket = usage.tokens.get_or_insert_with(|| Bucket::full(rate, now));
        bucket.charge(count as f64, rate, now);
    }

    /// Counts a piece of work as running until [`end_work`](Self::end_work).
    ///
    /// # Errors
    /// `Quota` when as many as allowed are running.
    pub(crate) fn begin_work(&self) -> Result<()> {
        let mut usage = self.lock();
        match usage.quotas.concurrent {
            Some(limit) if usage.running >= limit => Err(self.over(format!("{limit} requests at once"), None)),
            _ => {
                usage.running += 1;
                Ok(())
            }
        }
    }

    /// A piece of work has ended.
    pub(crate) fn end_work(&self) {
        let mut usage = self.lock();
        usage.running = usage.running.saturating_sub(1);
    }

    fn over(&self, quota: String, retry_after: Option<Duration>) -> Error {
        Error::Quota {
            tenant: self.name.to_string(),
            quota,
            retry_after,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache_memory::CacheMemory;

    fn tenant(quotas: Quotas) -> Tenant {
        let memory = MemoryBudget::new(1000, CacheMemory::new(0, 0));
        memory.enforce_quotas();
        let tenant = Tenant::new("ann", &memory);
        tenant.set_quotas(quotas);
        tenant
    }

    #[test]
    fn a_tenant_without_quotas_is_never_refused() {
        let tenant = tenant(Quotas::default());
        for _ in 0..1000 {
            tenant.admit_call().unwrap();
            tenant.begin_work().unwrap();
            tenant.admit_tokens(1 << 40).unwrap();
        }
    }

    #[test]
    fn each_quota_is_named_when_it_is_used_up() {
        let tenant = tenant(Quotas {
            requests_per_second: Some(0.001),
            tokens_per_minute: Some(60.0),
            concurrent: Some(1),
            memory: Some(100),
        });
        let refusal = |result: Result<()>| result.unwrap_err().to_string();
        tenant.admit_call().unwrap();
        assert!(refusal(tenant.admit_call()).contains("0.001 requests per second"));
        tenant.begin_work().unwrap();
        assert!(refusal(tenant.begin_work()).contains("1 requests at once"));
        tenant.end_work();
        tenant.begin_work().unwrap();
        tenant.admit_tokens(10).unwrap();
        assert!(refusal(tenant.admit_tokens(61)).contains("less than the 61"));
        tenant.charge_tokens(100_000);
        let Err(Error::Quota {
            retry_after: Some(wait),
            ..
        }) = tenant.admit_tokens(10)
        else {
            panic!("the debt is not collected");
        };
        assert!(wait > Duration::from_secs(60 * 60 * 23), "{wait:?}");
        let message = tenant.memory().reserve("a model", 101).unwrap_err().to_string();
        assert!(message.contains("ann") && message.contains("100 bytes"), "{message}");
    }

    #[test]
    fn what_was_used_survives_a_change_of_another_quota() {
        let quotas = Quotas {
            requests_per_second: Some(0.001),
            ..Quotas::default()
        };
        let tenant = tenant(quotas);
        tenant.admit_call().unwrap();
        tenant.set_quotas(Quotas {
            concurrent: Some(7),
            ..quotas
        });
        assert!(tenant.admit_call().is_err());
        tenant.set_quotas(Quotas::default());
        assert!(tenant.admit_call().is_ok());
    }
}
