//! Training settings of a model: the fields of `models.config` that may change between steps.

use candle_compute_proto::v1;
use candle_models::config::TRAINING_FIELDS;
use candle_models::training::AdamWOptions;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Settings that the model's configuration gives; absent ones take PyTorch's defaults.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct TrainingSettings {
    values: Map<String, Value>,
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
            match config.remove(name) {
                None | Some(Value::Null) => {}
                Some(value) if value.is_number() => {
                    values.insert(name.to_owned(), value);
                }
                Some(value) => {
                    return Err(Error::invalid(format!(
                        "the configuration's {name} is {value}; it must be a number"
                    )));
                }
            }
        }
        let settings = Self { values };
        settings.options(&AdamWOverrides::default())?;
        Ok(settings)
    }

    /// The settings as fields of a configuration.
    pub(crate) fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// The options of a step.
    ///
    /// # Errors
    /// `InvalidArgument` for a value out of range.
    pub(crate) fn options(&self, step: &AdamWOverrides) -> Result<AdamWOptions> {
        let configured = |name: &str| self.values.get(name).and_then(Value::as_f64);
        let default = AdamWOptions::default();
        let options = AdamWOptions {
            learning_rate: step
                .learning_rate
                .or(configured("learning_rate"))
                .unwrap_or(default.learning_rate),
            beta1: step.beta1.or(configured("beta1")).unwrap_or(default.beta1),
            beta2: step.beta2.or(configured("beta2")).unwrap_or(default.beta2),
            epsilon: step.epsilon.or(configured("epsilon")).unwrap_or(default.epsilon),
            weight_decay: step
                .weight_decay
                .or(configured("weight_decay"))
                .unwrap_or(default.weight_decay),
            max_grad_norm: step.max_grad_norm.or(configured("max_grad_norm")),
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

    #[test]
    fn a_step_overrides_the_configuration_which_overrides_the_defaults() {
        let Value::Object(mut config) = serde_json::json!({"layers": 2, "learning_rate": 0.5, "beta1": 0.8}) else {
            unreachable!()
        };
        let settings = TrainingSettings::take(&mut config).unwrap();
        assert_eq!(config.len(), 1);
        let step = AdamWOverrides {
            beta1: Some(0.7),
            ..Default::default()
        };
        let options = settings.options(&step).unwrap();
        assert_eq!((options.learning_rate, options.beta1, options.beta2), (0.5, 0.7, 0.999));
    }

    #[test]
    fn values_that_are_no_numbers_or_out_of_range_are_refused() {
        for config in [
            serde_json::json!({"beta1": "x"}),
            serde_json::json!({"learning_rate": -1}),
        ] {
            let Value::Object(mut config) = config else {
                unreachable!()
            };
            assert!(TrainingSettings::take(&mut config).is_err());
        }
    }
}
