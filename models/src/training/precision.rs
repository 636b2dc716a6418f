//! Mixed precision (Micikevicius et al., "Mixed precision training", 2018): products read half-precision copies of
//! weights and activations and add up in f32; everything else is f32. And the loss scale that keeps small gradients from
//! becoming 0 on the way.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::settings::choice;
use crate::config::{Fields, shortened};
use crate::error::{Error, Result};

/// The type of what products read in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32: no copies, no rounding.
    #[default]
    F32,
    /// bfloat16: the range of f32 with 8 bits of precision.
    Bf16,
    /// IEEE 754 binary16: 11 bits of precision, from 6e-8 to 65504.
    F16,
}

impl Precision {
    /// Every precision.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// Its name in a model's settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.dtype().as_str()
    }

    /// Type of what products read.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// In what precision a model is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PrecisionSettings {
    /// Type of what products read.
    pub precision: Precision,
    /// Factor on the loss.
    pub loss_scaling: LossScaling,
}

/// How the loss is scaled in backward. Gradients are given unscaled everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum LossScaling {
    /// Not at all.
    #[default]
    None,
    /// By the same scale always; finite, above 0.
    Static(f64),
    /// By the largest power of two that works, found as torch.amp.GradScaler does: a step whose gradient is not finite is
    /// skipped and halves the scale, `growth_interval` good steps in a row double it.
    Dynamic {
        /// At least 1. Default 2000.
        growth_interval: u64,
    },
}

/// The dynamic scale, a part of the training state.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// The scale. At first 65536.
    pub scale: f64,
    /// Steps since it changed or a step was skipped.
    pub good_steps: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        Self {
            scale: 65536.0,
            good_steps: 0,
        }
    }
}

impl LossScaling {
    /// As in torch.amp.GradScaler.
    const DEFAULT_GROWTH_INTERVAL: u64 = 2000;
    /// How many targets the scaled loss is the mean over, as far as its magnitude goes: backward differentiates a sum,
    /// whose number of targets is not known before the step.
    const TARGETS: f64 = 1024.0;

    /// The scale.
    #[must_use]
    pub fn scale(self, state: LossScale) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Static(scale) => scale,
            Self::Dynamic { .. } => state.scale,
        }
    }

    /// The factor on the loss of each target in backward: the scale over 1024, so that the gradients that are rounded have
    /// the magnitude that they would have in PyTorch for the mean over 1024 targets; 1 without scaling.
    #[must_use]
    pub fn factor(self, state: LossScale) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Static(_) | Self::Dynamic { .. } => self.scale(state) / Self::TARGETS,
        }
    }

    /// The dynamic scale after a step, which was `skipped` if its gradient was not finite.
    #[must_use]
    pub fn after_step(self, state: LossScale, skipped: bool) -> LossScale {
        let Self::Dynamic { growth_interval } = self else {
            return state;
        };
        if skipped {
            return LossScale {
                // A scale of 0 would end the training.
                scale: (state.scale / 2.0).max(f64::from(f32::MIN_POSITIVE)),
                good_steps: 0,
            };
        }
        let good_steps = state.good_steps + 1;
        if good_steps < growth_interval {
            return LossScale { good_steps, ..state };
        }
        // A scale must be finite as f32.
        let grown = state.scale * 2.0;
        let scale = if grown <= f64::from(f32::MAX) {
            grown
        } else {
            state.scale
        };
        LossScale { scale, good_steps: 0 }
    }
}

impl PrecisionSettings {
    /// Reads `precision`, `loss_scale` and `loss_scale_growth_interval`.
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        let precision = choice(
            fields,
            "precision",
            &Precision::ALL.map(|precision| (precision.name(), precision)),
        )?;
        let growth_interval = match fields.size("loss_scale_growth_interval")? {
            Some(0) => {
                return Err(Error::invalid_config(
                    "loss_scale_growth_interval",
                    "0; it must be at least 1",
                ));
            }
            given => given.map(|steps| steps as u64),
        };
        let dynamic = LossScaling::Dynamic {
            growth_interval: growth_interval.unwrap_or(LossScaling::DEFAULT_GROWTH_INTERVAL),
        };
        let loss_scaling = match (fields.get("loss_scale"), precision) {
            (Some(_), Precision::F32) => {
                return Err(Error::invalid_config(
                    "loss_scale",
                    "it needs precision \"bf16\" or \"f16\"; leave it out or null for \"f32\"",
                ));
            }
            (None, Precision::F16) => dynamic,
            (None, _) => LossScaling::None,
            (Some(value), _) if value.as_str() == Some("dynamic") => dynamic,
            (Some(value), _) => {
                // What is multiplied by it is f32.
                let valid = |factor: &f64| *factor >= f64::from(f32::MIN_POSITIVE) && *factor <= f64::from(f32::MAX);
                let factor = value.as_f64().filter(valid).ok_or_else(|| {
                    let reason = format!(
                        "`{}`; it must be \"dynamic\" or a number above 0 in the range of f32",
                        shortened(value)
                    );
                    Error::invalid_config("loss_scale", reason)
                })?;
                LossScaling::Static(factor)
            }
        };
        if growth_interval.is_some() && !matches!(loss_scaling, LossScaling::Dynamic { .. }) {
            let reason = "only a dynamic loss_scale grows; set loss_scale to \"dynamic\" or leave this out";
            return Err(Error::invalid_config("loss_scale_growth_interval", reason));
        }
        Ok(Self {
            precision,
            loss_scaling,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(settings: Value) -> Result<PrecisionSettings> {
        PrecisionSettings::read(&Fields(settings.as_object().unwrap()))
    }

    #[test]
    fn the_scale_moves_as_gradscalers_does() {
        let scaling = LossScaling::Dynamic { growth_interval: 3 };
        let mut state = LossScale::default();
        let mut scales = vec![];
        for skipped in [false, false, true, false, false, false, false] {
            scales.push(scaling.scale(state));
            state = scaling.after_step(state, skipped);
        }
        // torch.amp.GradScaler("cpu", growth_interval=3) with the same overflows.
        assert_eq!(scales, [65536.0, 65536.0, 65536.0, 32768.0, 32768.0, 32768.0, 65536.0]);
        assert_eq!(
            state,
            LossScale {
                scale: 65536.0,
                good_steps: 1
            }
        );
        for scaling in [LossScaling::None, LossScaling::Static(8.0)] {
            assert_eq!(scaling.after_step(state, true), state);
        }
        let static_scale = LossScaling::Static(8.0);
        assert_eq!(
            (static_scale.scale(state), static_scale.factor(state)),
            (8.0, 2f64.powi(-7))
        );
        assert_eq!(
            (LossScaling::None.scale(state), LossScaling::None.factor(state)),
            (1.0, 1.0)
        );
    }

    #[test]
    fn the_scale_stays_in_the_range_of_f32() {
        let scaling = LossScaling::Dynamic { growth_interval: 1 };
        let run = |skipped| {
            (0..400)
                .fold(LossScale::default(), |state, _| scaling.after_step(state, skipped))
                .scale
        };
        assert_eq!((run(false), run(true)), (2f64.powi(127), 2f64.powi(-126)));
    }

    #[test]
    fn defaults_depend_on_the_precision() {
        let scaling = |settings| read(settings).unwrap().loss_scaling;
        assert_eq!(read(json!({})).unwrap(), PrecisionSettings::default());
        assert_eq!(scaling(json!({"precision": "bf16"})), LossScaling::None);
        let dynamic = |growth_interval| LossScaling::Dynamic { growth_interval };
        assert_eq!(scaling(json!({"precision": "f16"})), dynamic(2000));
        assert_eq!(
            scaling(json!({"precision": "f16", "loss_scale_growth_interval": 5})),
            dynamic(5)
        );
        assert_eq!(
            scaling(json!({"precision": "bf16", "loss_scale": 8})),
            LossScaling::Static(8.0)
        );
        assert_eq!(
            scaling(json!({"precision": "bf16", "loss_scale": "dynamic"})),
            dynamic(2000)
        );
    }

    #[test]
    fn bad_values_are_refused() {
        for (settings, expected) in [
            (
                json!({"precision": "fp8"}),
                ["`precision`", "\"f32\", \"bf16\", \"f16\""],
            ),
            (json!({"precision": 16}), ["`precision`", "`16`"]),
            (json!({"loss_scale": 2}), ["`loss_scale`", "needs precision"]),
            (json!({"precision": "f16", "loss_scale": 0}), ["`loss_scale`", "`0`"]),
            (
                json!({"precision": "f16", "loss_scale": -1}),
                ["`loss_scale`", "above 0"],
            ),
            (
                json!({"precision": "f16", "loss_scale": 1e300}),
                ["`loss_scale`", "range of f32"],
            ),
            (
                json!({"precision": "f16", "loss_scale": "NaN"}),
                ["`loss_scale`", "`\"NaN\"`"],
            ),
            (
                json!({"precision": "f16", "loss_scale_growth_interval": 0}),
                ["`loss_scale_growth_interval`", "at least 1"],
            ),
            (
                json!({"precision": "f16", "loss_scale": 8, "loss_scale_growth_interval": 9}),
                ["`loss_scale_growth_interval`", "dynamic"],
            ),
        ] {
            let message = read(settings.clone()).unwrap_err().to_string();
            for part in expected {
                assert!(message.contains(part), "{settings}: {message}");
            }
        }
    }
}
