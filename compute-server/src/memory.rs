//! The memory limit: what is about to hold much memory reserves it first. Pages of key/value caches that no generation uses
//! make way for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache_memory::CacheMemory;
use crate::error::{Error, Result};

/// Bytes that weights, gradients, optimizer states and caches may hold together.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    limit: u64,
    used: AtomicU64,
    /// The pages' part of it.
    pub(crate) cache: CacheMemory,
}

impl MemoryBudget {
    /// A budget of `limit` bytes, part of which pages of caches may have.
    pub(crate) fn new(limit: u64, cache: CacheMemory) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU64::new(0),
            cache,
        })
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
        loop {
            let Err(used) = self.try_add(bytes) else { return Ok(()) };
            let missing = used.saturating_add(bytes) - self.limit;
            if missing > self.cache.used() || self.cache.evict(missing) == 0 {
                return Err(Error::Memory {
                    what: what.to_owned(),
                    needed: bytes,
                    limit: self.limit,
                    available: self.limit.saturating_sub(used),
                });
            }
        }
    }

    /// Takes `bytes` if they are free; otherwise returns how many are in use.
    pub(crate) fn try_add(&self, bytes: u64) -> Result<(), u64> {
        let grow = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= self.limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow)
            .map(|_| ())
    }

    /// Gives bytes back.
    pub(crate) fn subtract(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
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
            self.budget.used.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Shrinks to `bytes`, if that is less.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let surplus = self.bytes.saturating_sub(bytes);
        self.budget.used.fetch_sub(surplus, Ordering::Relaxed);
        self.bytes -= surplus;
    }

    /// Takes over what `other` reserved.
    pub(crate) fn absorb(&mut self, mut other: Reservation) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
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
}
