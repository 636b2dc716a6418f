//! Training settings of a model: the fields of `models.config` that may change between steps.

use candle_compute_proto::v1;
use candle_models::config::TRAINING_FIELDS;
use candle_models::training::{self, AdamWOptions, DropoutKey, HalfWeights, PassOptions, PrecisionSettings, Retention};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Settings that the model's configuration gives; absent ones take their defaults, which are PyTorch's.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct TrainingSettings {
    /// As they were given.
    values: Map<String, Value>,
    read: training::TrainingSettings,
}

/// Values that one step gives.
pub(crate) type AdamWOverrides = v1::AdamWOptions;

impl TrainingSettings {
    /// Takes the training settings out of `config`.
    ///
    /// # Errors
    /// `InvalidArgument` that names the setting.
    pub(crate) fn take(config: &mut Map<String, Value>) -> Result<Self> {
        let mut values = Map::new();
        for &name in TRAINING_FIELDS {
            if let Some(value) = config.remove(name).filter(|value| !value.is_null()) {
                values.insert(name.to_owned(), value);
            }
        }
        let read = training::TrainingSettings::read(&values)?;
        Ok(Self { values, read })
    }

    /// The settings as fields of a configuration.
    pub(crate) fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// The settings as the text of a JSON object.
    pub(super) fn to_json(&self) -> String {
        Value::Object(self.values.clone()).to_string()
    }

    /// The settings that [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    /// As [`take`](Self::take), and for text that is no JSON object.
    pub(super) fn from_json(text: &str) -> Result<Self> {
        match serde_json::from_str(text) {
            Ok(Value::Object(mut values)) => Self::take(&mut values),
            _ => Err(Error::invalid(format!("settings {text:?} are no JSON object"))),
        }
    }

    /// Which checkpoints are kept.
    pub(super) fn retention(&self) -> Retention {
        self.read.retention
    }

    /// In what precision products are computed.
    pub(super) fn precision(&self) -> PrecisionSettings {
        self.read.precision
    }

    /// How a pass is run: with copies of the weights that [`precision`](Self::precision) asks for.
    pub(super) fn pass<'a>(
        &self,
        half: Option<&'a HalfWeights>,
        loss_scale: f64,
        dropout_key: DropoutKey,
    ) -> PassOptions<'a> {
        PassOptions {
            activations: self.read.activations,
            half,
            loss_scale,
            dropout: self.read.dropout,
            dropout_key,
            router: self.read.router,
            alone: false,
        }
    }

    /// The options of step number `step`. What the step itself gives wins, over the schedule too.
    ///
    /// # Errors
    /// `InvalidArgument` for a value out of range.
    pub(crate) fn options(&self, step: u64, overrides: &AdamWOverrides) -> Result<AdamWOptions> {
        let configured = self.read.options(step);
        let options = AdamWOptions {
            learning_rate: overrides.learning_rate.unwrap_or(configured.learning_rate),
            beta1: overrides.beta1.unwrap_or(configured.beta1),
            beta2: overrides.beta2.unwrap_or(configured.beta2),
            epsilon: overrides.epsilon.unwrap_or(configured.epsilon),
            weight_decay: overrides.weight_decay.unwrap_or(configured.weight_decay),
            max_grad_norm: overrides.max_grad_norm.or(configured.max_grad_norm),
            decay_norms_and_biases: configured.decay_norms_and_biases,
        };
        options.validate()?;
        Ok(options)
    }
}

/// Options in the protocol's form.
pub(super) fn to_proto(options: &AdamWOptions) -> v1::AdamWOptions {
    v1::AdamWOptions {
        learning_rate: Some(options.learning_rate),
        beta1: Some(options.beta1),
        beta2: Some(options.beta2),
        epsilon: Some(options.epsilon),
        weight_decay: Some(options.weight_decay),
        max_grad_norm: options.max_grad_norm,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(config: Value) -> Result<(TrainingSettings, Map<String, Value>)> {
        let Value::Object(mut config) = config else {
            unreachable!()
        };
        Ok((TrainingSettings::take(&mut config)?, config))
    }

    #[test]
    fn a_step_overrides_the_configuration_which_overrides_the_defaults() {
        let (settings, rest) = take(serde_json::json!({"layers": 2, "learning_rate": 0.5, "beta1": 0.8})).unwrap();
        assert_eq!(rest.len(), 1);
        let step = AdamWOverrides {
            beta1: Some(0.7),
            ..Default::default()
        };
        let options = settings.options(1, &step).unwrap();
        assert_eq!((options.learning_rate, options.beta1, options.beta2), (0.5, 0.7, 0.999));
    }

    #[test]
    fn a_steps_own_learning_rate_wins_over_the_schedule() {
        let (settings, _) = take(serde_json::json!({"learning_rate": 0.5, "warmup_steps": 5})).unwrap();
        let step = AdamWOverrides::default();
        assert_eq!(settings.options(1, &step).unwrap().learning_rate, 0.1);
        let step = AdamWOverrides {
            learning_rate: Some(0.25),
            ..step
        };
        assert_eq!(settings.options(1, &step).unwrap().learning_rate, 0.25);
    }

    #[test]
    fn bad_values_are_refused() {
        for config in [
            serde_json::json!({"beta1": "x"}),
            serde_json::json!({"learning_rate": -1}),
            serde_json::json!({"recompute": "some"}),
        ] {
            assert!(take(config).is_err());
        }
    }
}
