//! The memory limit: what is about to hold much memory reserves it first. Pages of key/value caches that no generation uses
//! make way for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::cache_memory::CacheMemory;
use crate::error::{Error, Result};

/// Bytes that weights, gradients, optimizer states and caches may hold together.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    limit: AtomicU64,
    used: AtomicU64,
    /// The pages' part of it.
    pub(crate) cache: Arc<CacheMemory>,
    /// Of a tenant's budget: its name, and the server's budget, which has to hold as well.
    tenant: Option<(String, Arc<MemoryBudget>)>,
    /// Of the server's budget: whether the limits of tenants hold.
    quotas: AtomicBool,
}

impl MemoryBudget {
    /// A budget of `limit` bytes, part of which pages of caches may have.
    pub(crate) fn new(limit: u64, cache: CacheMemory) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicU64::new(limit),
            used: AtomicU64::new(0),
            cache: Arc::new(cache),
            tenant: None,
            quotas: AtomicBool::new(false),
        })
    }

    /// The budget of a tenant within `server`, without a limit of its own at first.
    pub(crate) fn of_tenant(name: &str, server: &Arc<Self>) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicU64::new(u64::MAX),
            used: AtomicU64::new(0),
            cache: Arc::clone(&server.cache),
            tenant: Some((name.to_owned(), Arc::clone(server))),
            quotas: AtomicBool::new(false),
        })
    }

    /// Lets the limits of tenants hold from now on. Until then models are recovered, whatever their tenants may hold today.
    pub(crate) fn enforce_quotas(&self) {
        self.quotas.store(true, Ordering::Relaxed);
    }

    /// The server's budget, of which a tenant's is a part: pages of caches count for nobody alone.
    pub(crate) fn server(self: &Arc<Self>) -> &Arc<Self> {
        self.tenant.as_ref().map_or(self, |(_, server)| server)
    }

    /// Sets the limit; what is reserved beyond it stays reserved.
    pub(crate) fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Bytes reserved now.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Reserves `bytes` for as long as the returned value lives.
    ///
    /// # Errors
    /// `Memory` naming `what` when the limit does not allow it.
    pub(crate) fn reserve(self: &Arc<Self>, what: &str, bytes: u64) -> Result<Reservation> {
        let mut reservation = Reservation {
            budget: Arc::clone(self),
            bytes: 0,
        };
        reservation.resize(what, bytes)?;
        Ok(reservation)
    }

    fn add(&self, what: &str, bytes: u64) -> Result<()> {
        if let Some((tenant, server)) = &self.tenant {
            let limit = match server.quotas.load(Ordering::Relaxed) {
                true => self.limit(),
                false => u64::MAX,
            };
            let refused = |used| Error::Memory {
                what: what.to_owned(),
                needed: bytes,
                tenant: Some(tenant.clone()),
                limit,
                available: limit.saturating_sub(used),
            };
            self.try_add_within(bytes, limit).map_err(refused)?;
            return server
                .add(what, bytes)
                .inspect_err(|_| _ = self.used.fetch_sub(bytes, Ordering::Relaxed));
        }
        loop {
            let Err(used) = self.try_add(bytes) else { return Ok(()) };
            let limit = self.limit();
            let missing = used.saturating_add(bytes).saturating_sub(limit);
            if missing > self.cache.used() || self.cache.evict(missing) == 0 {
                return Err(Error::Memory {
                    what: what.to_owned(),
                    needed: bytes,
                    tenant: None,
                    limit,
                    available: limit.saturating_sub(used),
                });
            }
        }
    }

    fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Takes `bytes` of the server's budget if they are free; otherwise returns how many are in use.
    pub(crate) fn try_add(&self, bytes: u64) -> Result<(), u64> {
        self.try_add_within(bytes, self.limit())
    }

    fn try_add_within(&self, bytes: u64, limit: u64) -> Result<(), u64> {
        let grow = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow)
            .map(|_| ())
    }

    /// Gives bytes back.
    pub(crate) fn subtract(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        if let Some((_, server)) = &self.tenant {
            server.subtract(bytes);
        }
    }
}

/// Reserved bytes, given back on drop.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<MemoryBudget>,
    bytes: u64,
}

impl Reservation {
    /// Bytes reserved.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Grows or shrinks to `bytes`.
    ///
    /// # Errors
    /// `Memory` when the limit does not allow it; the reservation is then as before.
    pub(crate) fn resize(&mut self, what: &str, bytes: u64) -> Result<()> {
        if bytes > self.bytes {
            self.budget.add(what, bytes - self.bytes)?;
        } else {
            self.budget.subtract(self.bytes - bytes);
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Shrinks to `bytes`, if that is less.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let surplus = self.bytes.saturating_sub(bytes);
        self.budget.subtract(surplus);
        self.bytes -= surplus;
    }

    /// Takes over what `other` reserved.
    pub(crate) fn absorb(&mut self, mut other: Reservation) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.subtract(self.bytes);
    }
}

/// Memory of the machine in bytes, from `/proc/meminfo`; 0 when it cannot be read.
pub(crate) fn system_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_is_refused_past_the_limit_and_given_back_on_drop() {
        let budget = MemoryBudget::new(100, CacheMemory::new(50, 50));
        let mut first = budget.reserve("a", 60).unwrap();
        assert!(budget.reserve("b", 50).is_err());
        assert!(first.resize("a", 120).is_err());
        assert_eq!(first.bytes(), 60);
        first.absorb(budget.reserve("c", 40).unwrap());
        assert_eq!(budget.used(), 100);
        drop(first);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_a_tenant_holds_counts_for_it_and_for_the_server() {
        let server = MemoryBudget::new(100, CacheMemory::new(0, 0));
        let (ann, bob) = (
            MemoryBudget::of_tenant("ann", &server),
            MemoryBudget::of_tenant("bob", &server),
        );
        ann.set_limit(50);
        drop(ann.reserve("a recovered model", 60).unwrap());
        server.enforce_quotas();
        let error = ann.reserve("a model", 51).unwrap_err().to_string();
        assert!(error.contains("tenant \"ann\""), "{error}");
        let held = ann.reserve("a model", 50).unwrap();
        let error = bob.reserve("a model", 51).unwrap_err().to_string();
        assert!(!error.contains("tenant"), "{error}");
        assert_eq!((ann.used(), bob.used(), server.used()), (50, 0, 50));
        drop(held);
        assert_eq!((ann.used(), server.used()), (0, 0));
    }
}
