//! A token bucket: so much at once, refilled at a steady rate. It may be overdrawn by what was not known beforehand.

use std::time::{Duration, Instant};

/// How fast a bucket fills, and how much it holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rate {
    /// Units a second.
    pub(super) per_second: f64,
    /// Most units that gather.
    pub(super) capacity: f64,
}

/// What is left, as of a moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub(super) fn full(rate: Rate, now: Instant) -> Self {
        Self {
            level: rate.capacity,
            at: now,
        }
    }

    fn refill(&mut self, rate: Rate, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + elapsed * rate.per_second).min(rate.capacity);
        self.at = now;
    }

    /// Takes `amount`, at most the capacity, if it is there.
    ///
    /// # Errors
    /// The time until it will be.
    pub(super) fn take(&mut self, amount: f64, rate: Rate, now: Instant) -> Result<(), Duration> {
        self.refill(rate, now);
        let missing = amount - self.level;
        if missing > 0.0 {
            // A day is as good as any longer time, and no rate overflows it.
            return Err(Duration::from_secs_f64((missing / rate.per_second).min(86_400.0)));
        }
        self.level -= amount;
        Ok(())
    }

    /// Takes `amount` whether it is there or not.
    pub(super) fn charge(&mut self, amount: f64, rate: Rate, now: Instant) {
        self.refill(rate, now);
        self.level -= amount;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_fills_at_its_rate_and_says_when_enough_is_there() {
        let rate = Rate {
            per_second: 2.0,
            capacity: 4.0,
        };
        let start = Instant::now();
        let after = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut bucket = Bucket::full(rate, start);
        assert_eq!(bucket.take(4.0, rate, start), Ok(()));
        assert_eq!(bucket.take(1.0, rate, start), Err(Duration::from_millis(500)));
        assert_eq!(bucket.take(1.0, rate, after(0.5)), Ok(()));
        // Overdrawn: the debt is paid first.
        bucket.charge(3.0, rate, after(0.5));
        assert_eq!(bucket.take(1.0, rate, after(0.5)), Err(Duration::from_secs(2)));
        // Never more than the capacity.
        assert!(bucket.take(4.5, rate, after(100.0)).is_err());
        assert_eq!(bucket.take(4.0, rate, after(100.0)), Ok(()));
    }
}
