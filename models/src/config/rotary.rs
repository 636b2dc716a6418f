//! Rotary positions (RoFormer, arXiv:2104.09864) and the ways models stretch them to longer contexts.

use candle_kernels_cpu::RotaryLayout;
use serde_json::{Value, json};

/// How queries and keys are rotated.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Change of the frequencies for contexts longer than those of the pretraining.
    pub scaling: RotaryScaling,
    /// Elements of a head that are rotated, the first ones; where odd, one more is. The rest has no position.
    pub dim: usize,
    /// Which of them form pairs.
    pub layout: RotaryLayout,
}

/// Change of the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RotaryScaling {
    /// As they are.
    None,
    /// Every frequency divided by the factor (position interpolation, arXiv:2306.15595).
    Linear {
        /// The divisor, above 0.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by the factor, high ones kept, a smooth passage between.
    Llama3 {
        /// Divisor of the low frequencies, above 0.
        factor: f64,
        /// Wavelengths above `original_context / low_frequency_factor` are divided.
        low_frequency_factor: f64,
        /// Wavelengths below `original_context / high_frequency_factor` are kept.
        high_frequency_factor: f64,
        /// Context length of the pretraining, in tokens.
        original_context_length: usize,
    },
    /// One divisor for each frequency, as GGUF's `rope_freqs.weight` stores them: `[pairs]`.
    Factors(Vec<f32>),
}

impl RotaryScaling {
    /// As `rope_scaling` of a configuration says it, in transformers' words but for [`Factors`](Self::Factors), which only
    /// ours have; `None` where there is nothing to say.
    pub(crate) fn settings(&self) -> Option<Value> {
        match self {
            Self::None => None,
            Self::Linear { factor } => Some(json!({"rope_type": "linear", "factor": factor})),
            Self::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_context_length,
            } => Some(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_frequency_factor,
                "high_freq_factor": high_frequency_factor,
                "original_max_position_embeddings": original_context_length,
            })),
            Self::Factors(factors) => Some(json!({"rope_type": "factors", "factors": factors})),
        }
    }
}

impl RotaryConfig {
    /// Number of pairs of elements of a head.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.dim.div_ceil(2)
    }

    /// Angle per position of each pair, in radians, computed in f32 as transformers does.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let theta = self.theta as f32;
        (0..self.pairs())
            .map(|pair| {
                let frequency = 1.0 / theta.powf((2 * pair) as f32 / self.dim as f32);
                match &self.scaling {
                    RotaryScaling::None => frequency,
                    RotaryScaling::Linear { factor } => frequency / *factor as f32,
                    RotaryScaling::Factors(factors) => frequency / factors[pair],
                    RotaryScaling::Llama3 {
                        factor,
                        low_frequency_factor,
                        high_frequency_factor,
                        original_context_length,
                    } => {
                        let wavelength = 2.0 * std::f32::consts::PI / frequency;
                        let context = *original_context_length as f32;
                        let (factor, low, high) = (
                            *factor as f32,
                            *low_frequency_factor as f32,
                            *high_frequency_factor as f32,
                        );
                        if wavelength > context / low {
                            frequency / factor
                        } else if wavelength < context / high {
                            frequency
                        } else {
                            let smooth = (context / wavelength - low) / (high - low);
                            (1.0 - smooth) * frequency / factor + smooth * frequency
                        }
                    }
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotary(dim: usize, theta: f64, scaling: RotaryScaling) -> RotaryConfig {
        RotaryConfig {
            theta,
            scaling,
            dim,
            layout: RotaryLayout::HalfSplit,
        }
    }

    #[test]
    fn plain_frequencies_fall_geometrically() {
        let frequencies = rotary(8, 10_000.0, RotaryScaling::None).inverse_frequencies();
        for (frequency, expected) in frequencies.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((frequency - expected).abs() < 1e-6 * expected, "{frequency} {expected}");
        }
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RotaryScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_context_length: 8192,
        };
        let plain = rotary(128, 500_000.0, RotaryScaling::None).inverse_frequencies();
        let scaled = rotary(128, 500_000.0, scaling).inverse_frequencies();
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-5);
        assert!(scaled.iter().zip(&plain).all(|(scaled, plain)| scaled <= plain));
    }
}
