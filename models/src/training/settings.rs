//! The training settings among the fields of `models.config`.

use std::num::{NonZeroU64, NonZeroUsize};

use serde_json::{Map, Value};

use super::{
    ActivationSettings, AdamWOptions, Compression, DropoutSettings, PrecisionSettings, Recompute, Retention,
    RouterSettings, Schedule, ScheduleKind,
};
use crate::config::{Fields, shortened};
use crate::error::{Error, Result};

/// How a model is trained unless a step says otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainingSettings {
    /// Of AdamW; its learning rate is the highest of the schedule.
    pub optimizer: AdamWOptions,
    /// How the learning rate changes.
    pub schedule: Schedule,
    /// What is kept for backward.
    pub activations: ActivationSettings,
    /// Losses of the routers of experts, and their capacity.
    pub router: RouterSettings,
    /// Which checkpoints are kept.
    pub retention: Retention,
    /// In what precision products are computed.
    pub precision: PrecisionSettings,
    /// What is dropped.
    pub dropout: DropoutSettings,
}

impl TrainingSettings {
    /// Reads the fields that are named in [`TRAINING_FIELDS`](crate::config::TRAINING_FIELDS); absent and null ones take
    /// their defaults, others are not looked at.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] and [`Error::InvalidArgument`] that name the field, its value and what it may be.
    pub fn read(settings: &Map<String, Value>) -> Result<Self> {
        let fields = Fields(settings);
        let settings = Self {
            optimizer: optimizer(&fields)?,
            schedule: schedule(&fields)?,
            retention: retention(&fields)?,
            activations: ActivationSettings {
                recompute: recompute(&fields)?,
                compression: choice(
                    &fields,
                    "compress_activations",
                    &Compression::ALL.map(|kind| (kind.name(), kind)),
                )?,
                reuse: fields.flag("reuse_activations")?.unwrap_or(false),
            },
            precision: PrecisionSettings::read(&fields)?,
            dropout: DropoutSettings::read(&fields)?,
            router: RouterSettings::read(&fields)?,
        };
        settings.optimizer.validate()?;
        let (lowest, highest) = (settings.schedule.min_learning_rate, settings.optimizer.learning_rate);
        if lowest > highest {
            let reason = format!("{lowest} is above learning_rate, which is {highest}");
            return Err(Error::invalid_config("min_learning_rate", reason));
        }
        Ok(settings)
    }

    /// The options of step `step`, from 1: the optimizer's, with the schedule's learning rate.
    #[must_use]
    pub fn options(&self, step: u64) -> AdamWOptions {
        AdamWOptions {
            learning_rate: self.schedule.learning_rate(self.optimizer.learning_rate, step),
            ..self.optimizer.clone()
        }
    }
}

fn optimizer(fields: &Fields<'_>) -> Result<AdamWOptions> {
    let default = AdamWOptions::default();
    let number = |name, default| Ok::<_, Error>(fields.number(name)?.unwrap_or(default));
    Ok(AdamWOptions {
        learning_rate: number("learning_rate", default.learning_rate)?,
        beta1: number("beta1", default.beta1)?,
        beta2: number("beta2", default.beta2)?,
        epsilon: number("epsilon", default.epsilon)?,
        weight_decay: number("weight_decay", default.weight_decay)?,
        max_grad_norm: fields.number("max_grad_norm")?,
        decay_norms_and_biases: fields
            .flag("decay_norms_and_biases")?
            .unwrap_or(default.decay_norms_and_biases),
    })
}

fn schedule(fields: &Fields<'_>) -> Result<Schedule> {
    let kinds = ScheduleKind::ALL.map(|kind| (kind.name(), kind));
    let count = |name| Ok::<_, Error>(fields.size(name)?.unwrap_or(0) as u64);
    let schedule = Schedule {
        kind: choice(fields, "schedule", &kinds)?,
        warmup_steps: count("warmup_steps")?,
        steps: count("schedule_steps")?,
        min_learning_rate: fields.number("min_learning_rate")?.unwrap_or(0.0),
    };
    if schedule.min_learning_rate < 0.0 {
        let reason = format!("{} is below 0", schedule.min_learning_rate);
        return Err(Error::invalid_config("min_learning_rate", reason));
    }
    if schedule.kind != ScheduleKind::Constant && schedule.steps <= schedule.warmup_steps {
        let reason = format!(
            "{} for schedule {}; it must be given and be more than warmup_steps, which is {}",
            schedule.steps,
            schedule.kind.name(),
            schedule.warmup_steps
        );
        return Err(Error::invalid_config("schedule_steps", reason));
    }
    Ok(schedule)
}

fn retention(fields: &Fields<'_>) -> Result<Retention> {
    let count = |name| {
        let given = fields.size(name)?;
        if given == Some(0) {
            return Err(Error::invalid_config(name, "0; it must be at least 1, or be left out"));
        }
        Ok(given.and_then(|count| NonZeroU64::new(count as u64)))
    };
    Ok(Retention {
        keep_last: count("keep_last")?,
        keep_every: count("keep_every")?,
        keep_tagged: fields.flag("keep_tagged")?,
    })
}

fn recompute(fields: &Fields<'_>) -> Result<Recompute> {
    const CHOICES: &str = "it must be \"none\", \"blocks\", or a number n of at least 1 for every n-th block";
    let Some(value) = fields.get("recompute") else {
        return Ok(Recompute::default());
    };
    match value.as_str() {
        Some("none") => return Ok(Recompute::None),
        Some("blocks") => return Ok(Recompute::BLOCKS),
        _ => {}
    }
    let every = value.is_number().then(|| fields.size("recompute").ok().flatten());
    let every = every.flatten().and_then(NonZeroUsize::new);
    every
        .map(Recompute::EveryNthBlock)
        .ok_or_else(|| Error::invalid_config("recompute", format!("`{}`; {CHOICES}", shortened(value))))
}

/// The choice that a field names; the default without one.
pub(super) fn choice<T: Copy + Default>(fields: &Fields<'_>, field: &str, choices: &[(&str, T)]) -> Result<T> {
    let Some(value) = fields.get(field) else {
        return Ok(T::default());
    };
    let chosen = choices.iter().find(|(name, _)| Some(*name) == value.as_str());
    chosen.map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let reason = format!("`{}`; it must be one of {}", shortened(value), names.join(", "));
        Error::invalid_config(field, reason)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(settings: Value) -> Result<TrainingSettings> {
        TrainingSettings::read(settings.as_object().unwrap())
    }

    #[test]
    fn absent_and_null_fields_take_their_defaults() {
        assert_eq!(read(json!({"layers": 2})).unwrap(), TrainingSettings::default());
        let nulls = json!({"schedule": null, "recompute": null, "beta1": null});
        assert_eq!(read(nulls).unwrap(), TrainingSettings::default());
    }

    #[test]
    fn fields_are_read() {
        let settings = read(
            json!({"learning_rate": 0.5, "schedule": "linear", "warmup_steps": 2, "schedule_steps": 4,
            "min_learning_rate": 0.1, "decay_norms_and_biases": false, "recompute": 3, "compress_activations": "bf16"}),
        )
        .unwrap();
        assert_eq!(settings.options(1).learning_rate, 0.25);
        assert_eq!(settings.options(3).learning_rate, 0.5);
        assert_eq!(settings.options(9).learning_rate, 0.1);
        assert!(!settings.optimizer.decay_norms_and_biases);
        let three = NonZeroUsize::new(3).unwrap();
        assert_eq!(settings.activations.recompute, Recompute::EveryNthBlock(three));
        assert_eq!(settings.activations.compression, Compression::Bf16);
        for (given, expected) in [("none", Recompute::None), ("blocks", Recompute::BLOCKS)] {
            let settings = read(json!({ "recompute": given })).unwrap();
            assert_eq!(settings.activations.recompute, expected);
        }
    }

    #[test]
    fn bad_values_are_refused_with_the_choices() {
        for (settings, expected) in [
            (
                json!({"schedule": "step"}),
                ["`schedule`", "\"constant\", \"linear\", \"cosine\""],
            ),
            (json!({"schedule": 3}), ["`schedule`", "`3`"]),
            (
                json!({"schedule": "cosine"}),
                ["`schedule_steps`", "0 for schedule cosine"],
            ),
            (
                json!({"schedule": "linear", "schedule_steps": 5, "warmup_steps": 5}),
                ["`schedule_steps`", "more than warmup_steps"],
            ),
            (json!({"warmup_steps": 1.5}), ["`warmup_steps`", "whole number"]),
            (json!({"warmup_steps": -1}), ["`warmup_steps`", "whole number"]),
            (json!({"min_learning_rate": -1}), ["`min_learning_rate`", "below 0"]),
            (
                json!({"min_learning_rate": 0.2, "learning_rate": 0.1}),
                ["`min_learning_rate`", "above learning_rate"],
            ),
            (
                json!({"decay_norms_and_biases": 1}),
                ["`decay_norms_and_biases`", "true or false"],
            ),
            (json!({"recompute": "all"}), ["`recompute`", "\"none\", \"blocks\""]),
            (json!({"recompute": 0}), ["`recompute`", "at least 1"]),
            (json!({"recompute": -2}), ["`recompute`", "at least 1"]),
            (json!({"recompute": true}), ["`recompute`", "at least 1"]),
            (
                json!({"reuse_activations": "yes"}),
                ["`reuse_activations`", "true or false"],
            ),
            (
                json!({"compress_activations": "f16"}),
                ["`compress_activations`", "\"none\", \"bf16\", \"q8\""],
            ),
            (json!({"keep_last": 0}), ["`keep_last`", "at least 1"]),
            (json!({"keep_every": 1.5}), ["`keep_every`", "whole number"]),
            (json!({"keep_tagged": "yes"}), ["`keep_tagged`", "true or false"]),
            (json!({"learning_rate": "fast"}), ["`learning_rate`", "number"]),
            (json!({"beta1": 1}), ["beta1 is 1", "below 1"]),
        ] {
            let message = read(settings.clone()).unwrap_err().to_string();
            for part in expected {
                assert!(message.contains(part), "{settings}: {message}");
            }
        }
    }
}
