//! Seeded initial weights.

use super::build::dense;
use super::{Decoder, ParameterInfo, ParameterRole, WeightType, check_memory};
use crate::config::DecoderConfig;
use crate::error::Result;
use candle_core::Device;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Standard deviation of the initial weights, GPT-2's.
const STANDARD_DEVIATION: f64 = 0.02;
/// Elements drawn from one stream of the generator: what makes the values independent of the number of threads.
const BLOCK: usize = 1 << 16;

impl Decoder {
    /// A decoder with GPT-2's initial weights: matrices and embeddings normal with deviation 0.02, the projections
    /// into the residual stream with 0.02 / sqrt(2 * layers), norms 1, biases 0. The same seed gives the same weights
    /// on every machine and number of threads.
    pub fn initialize(config: DecoderConfig, device: &Device, kind: Option<WeightType>, seed: u64) -> Result<Self> {
        config.validate()?;
        let bytes_per_parameter = 4;
        check_memory(
            "the model",
            config.parameter_count().saturating_mul(bytes_per_parameter),
        )?;
        let residual_deviation = STANDARD_DEVIATION / (2.0 * config.layers as f64).sqrt();
        let mut index = 0u64;
        Self::build(config, device, kind, |info| {
            index += 1;
            let values = match info.role {
                ParameterRole::NormWeight => vec![1.0; info.elements()],
                ParameterRole::Bias => vec![0.0; info.elements()],
                ParameterRole::Switches => default_switches(info),
                ParameterRole::ResidualMatrix => normal(info, residual_deviation, seed, index),
                _ => normal(info, STANDARD_DEVIATION, seed, index),
            };
            dense(values, info.held_shape())
        })
    }
}

/// No biases, every expert enabled.
pub(super) fn default_switches(info: &ParameterInfo) -> Vec<f32> {
    let experts = info.elements() / 2;
    let mut values = vec![0.0; experts];
    values.resize(2 * experts, 1.0);
    values
}

/// Normal values; block `b` of parameter `index` is drawn from stream `index * 2^32 + b` of ChaCha8 on `seed`.
fn normal(info: &ParameterInfo, deviation: f64, seed: u64, index: u64) -> Vec<f32> {
    let mut values = vec![0.0f32; info.elements()];
    values.par_chunks_mut(BLOCK).enumerate().for_each(|(block, chunk)| {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream((index << 32) + block as u64);
        for pair in chunk.chunks_mut(2) {
            let (first, second) = normal_pair(&mut generator);
            pair[0] = (first * deviation) as f32;
            if let Some(value) = pair.get_mut(1) {
                *value = (second * deviation) as f32;
            }
        }
    });
    values
}

/// Two standard normal values by the transform of Box and Muller.
fn normal_pair(generator: &mut ChaCha8Rng) -> (f64, f64) {
    // 53 bits in (0, 1]: the logarithm of 0 must not occur.
    let mut uniform = || ((generator.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    let radius = (-2.0 * uniform().ln()).sqrt();
    let (sine, cosine) = (std::f64::consts::TAU * uniform()).sin_cos();
    (radius * cosine, radius * sine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_settings;
    use serde_json::json;

    fn tiny(seed: u64) -> Decoder {
        let settings = json!({"architecture": "gpt2", "layers": 2, "width": 64, "heads": 4, "context_length": 16,
            "vocabulary": 1100});
        let config = from_settings(settings.as_object().unwrap(), None).unwrap();
        Decoder::initialize(config, &Device::Cpu, None, seed).unwrap()
    }

    fn values(decoder: &Decoder, name: &str) -> Vec<f32> {
        let id = decoder.parameter_id(name).unwrap();
        decoder
            .weight(id)
            .as_f32()
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    #[test]
    fn deviation_and_mean_are_as_said() {
        let values = values(&tiny(1), "transformer.wte.weight");
        let mean: f64 = values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64;
        let square: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 3e-4, "{mean}");
        assert!((square.sqrt() - 0.02).abs() < 3e-4, "{square}");
    }

    #[test]
    fn seed_decides_and_threads_do_not() {
        let name = "transformer.wte.weight";
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(values(&tiny(7), name), one_thread.install(|| values(&tiny(7), name)));
        assert_ne!(values(&tiny(7), name), values(&tiny(8), name));
        assert!(
            values(&tiny(7), "transformer.h.1.ln_2.weight")
                .iter()
                .all(|value| *value == 1.0)
        );
    }
}
