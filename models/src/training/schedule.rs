//! How the learning rate changes from step to step.

use std::f64::consts::PI;

/// Shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScheduleKind {
    /// It stays.
    #[default]
    Constant,
    /// It falls in a straight line.
    Linear,
    /// It falls along half a cosine (arXiv:1608.03983, one period).
    Cosine,
}

impl ScheduleKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Constant, Self::Linear, Self::Cosine];

    /// Its name in a model's settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
        }
    }
}

/// A learning rate for every step: a linear rise over the warm-up, then `kind`.
///
/// With warm-up `W`, length `N`, highest rate `r` and lowest rate `m`, step `n` (from 1) has `r n / W` while `n <= W`;
/// after that `m + (r - m) f(p)`, where `p = (n - 1 - W) / (N - W)`, at most 1, and `f` is 1, `1 - p`, or
/// `(1 + cos(pi p)) / 2`. So no step is wasted on a rate of 0, and after the warm-up the rates are those of PyTorch's
/// `LinearLR` and `CosineAnnealingLR`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Schedule {
    /// The shape after the warm-up.
    pub kind: ScheduleKind,
    /// Steps of the rise. Default 0.
    pub warmup_steps: u64,
    /// Steps after which the lowest rate is reached, the warm-up among them; more than `warmup_steps` unless constant.
    pub steps: u64,
    /// The lowest rate after the warm-up. Default 0.
    pub min_learning_rate: f64,
}

impl Schedule {
    /// The learning rate of step `step`, from 1, when `highest` is the highest.
    #[must_use]
    pub fn learning_rate(&self, highest: f64, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return highest * (step as f64 / self.warmup_steps as f64);
        }
        let fall = |part: f64| self.min_learning_rate + (highest - self.min_learning_rate) * part;
        match self.kind {
            ScheduleKind::Constant => highest,
            ScheduleKind::Linear => fall(1.0 - self.progress(step)),
            ScheduleKind::Cosine => fall((1.0 + (PI * self.progress(step)).cos()) / 2.0),
        }
    }

    /// The part of the fall that lies behind `step`, from 0 to 1.
    fn progress(&self, step: u64) -> f64 {
        let (taken, length) = (
            step.saturating_sub(1 + self.warmup_steps),
            self.steps.saturating_sub(self.warmup_steps),
        );
        if taken >= length {
            return 1.0;
        }
        taken as f64 / length as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, steps: u64) -> Vec<f64> {
        (1..=steps).map(|step| schedule.learning_rate(0.1, step)).collect()
    }

    fn assert_close(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (actual, expected) in actual.iter().zip(expected) {
            assert!((actual - expected).abs() < 1e-12, "{actual} {expected}");
        }
    }

    fn schedule(kind: ScheduleKind, warmup_steps: u64, steps: u64, min_learning_rate: f64) -> Schedule {
        Schedule {
            kind,
            warmup_steps,
            steps,
            min_learning_rate,
        }
    }

    #[test]
    fn the_default_is_constant() {
        assert_eq!(rates(Schedule::default(), 3), [0.1; 3]);
    }

    #[test]
    fn the_rate_rises_over_the_warmup() {
        let constant = schedule(ScheduleKind::Constant, 4, 0, 0.0);
        assert_close(&rates(constant, 6), &[0.025, 0.05, 0.075, 0.1, 0.1, 0.1]);
    }

    /// PyTorch: `LinearLR(start_factor=1, end_factor=0.2, total_iters=5)` with learning rate 0.1.
    #[test]
    fn linear_is_pytorchs() {
        let expected = [0.1, 0.084, 0.068, 0.052, 0.036, 0.02, 0.02, 0.02];
        assert_close(&rates(schedule(ScheduleKind::Linear, 0, 5, 0.02), 8), &expected);
        let warmed = rates(schedule(ScheduleKind::Linear, 2, 7, 0.02), 10);
        assert_close(&warmed[..2], &[0.05, 0.1]);
        assert_close(&warmed[2..], &expected);
    }

    /// PyTorch: `CosineAnnealingLR(T_max=5, eta_min=0.02)` with learning rate 0.1.
    #[test]
    fn cosine_is_pytorchs() {
        let expected = [
            0.1,
            0.092_360_679_774_997_9,
            0.072_360_679_774_997_9,
            0.047_639_320_225_002_11,
            0.027_639_320_225_002_1,
            0.02,
        ];
        assert_close(&rates(schedule(ScheduleKind::Cosine, 0, 5, 0.02), 6), &expected);
        let warmed = rates(schedule(ScheduleKind::Cosine, 3, 8, 0.02), 12);
        assert_close(&warmed[3..9], &expected);
        assert_close(&warmed[9..], &[0.02; 3]);
    }
}
