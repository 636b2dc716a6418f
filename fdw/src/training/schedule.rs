//! The learning rate of a run, step by step: the formula of a model's own `schedule`, over the steps of the run.

use std::f64::consts::PI;

use crate::error::{Error, Result};

/// Shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScheduleKind {
    Constant,
    Linear,
    Cosine,
}

impl ScheduleKind {
    const ALL: [(&'static str, Self); 3] = [
        ("constant", Self::Constant),
        ("linear", Self::Linear),
        ("cosine", Self::Cosine),
    ];

    /// The kind of that name.
    pub(super) fn named(name: &str) -> Result<Self> {
        let found = Self::ALL
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, kind)| *kind);
        found.ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(known, _)| *known).collect();
            Error::bad_value(format!(
                "schedule is \"{name}\"; it must be one of {}",
                names.join(", ")
            ))
        })
    }
}

/// A learning rate for every step of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    kind: ScheduleKind,
    highest: f64,
    lowest: f64,
    warmup: i64,
    steps: i64,
}

impl Schedule {
    /// Checks a schedule.
    ///
    /// # Errors
    /// 22023 for rates that are not finite or negative, a lowest rate above the highest, and a warm-up that leaves no step.
    pub(super) fn new(kind: ScheduleKind, highest: f64, lowest: Option<f64>, warmup: i64, steps: i64) -> Result<Self> {
        for (name, rate) in [("learning_rate", Some(highest)), ("min_learning_rate", lowest)] {
            if let Some(rate) = rate.filter(|rate| !(rate.is_finite() && *rate >= 0.0)) {
                return Err(Error::bad_value(format!(
                    "{name} is {rate}; it must be finite and at least 0"
                )));
            }
        }
        let lowest = lowest.unwrap_or(0.0);
        if lowest > highest {
            return Err(Error::bad_value(format!(
                "min_learning_rate is {lowest}, more than the learning rate {highest}"
            )));
        }
        if kind != ScheduleKind::Constant && warmup >= steps {
            return Err(Error::bad_value(format!(
                "warmup is {warmup}, which leaves none of the {steps} steps for the schedule to come down"
            )));
        }
        Ok(Self {
            kind,
            highest,
            lowest,
            warmup,
            steps,
        })
    }

    /// The rate of step `step` of the run, from 1.
    pub(super) fn learning_rate(&self, step: i64) -> f64 {
        if step <= self.warmup {
            return self.highest * (step as f64 / self.warmup as f64);
        }
        let progress = ((step - 1 - self.warmup) as f64 / (self.steps - self.warmup).max(1) as f64).min(1.0);
        let fall = |part: f64| self.lowest + (self.highest - self.lowest) * part;
        match self.kind {
            ScheduleKind::Constant => self.highest,
            ScheduleKind::Linear => fall(1.0 - progress),
            ScheduleKind::Cosine => fall((1.0 + (PI * progress).cos()) / 2.0),
        }
    }
}
