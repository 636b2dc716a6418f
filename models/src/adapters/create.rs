//! Making an adapter from nothing, and a decoder from an adapter's factors.

use candle_core::{Device, Tensor};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::LoraConfig;
use super::config::module_of;
use crate::decoder::{Decoder, Factors, Weight};
use crate::error::Result;

/// Makes an adapter of `base` with PEFT's initial weights: every `A` uniform in `±1 / sqrt(in)` (He's initialisation
/// with a slope of sqrt(5)), every `B` zeros, so that the adapted model is the base at first. The same seed gives the
/// same weights everywhere.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a bad value or an unknown module,
/// [`Error::Unsupported`](crate::Error::Unsupported) for a base that is an adapted model itself.
pub fn create(base: &Decoder, config: &LoraConfig, seed: u64) -> Result<Decoder> {
    let mut stream = 0;
    assemble(base, config, |factor, _, [rows, columns]| {
        let values = match factor {
            Factor::A => {
                stream += 1;
                uniform(rows * columns, columns, seed, stream)
            }
            Factor::B => vec![0.0; rows * columns],
        };
        Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
    })
}

/// Which of the two factors of a low-rank matrix.
pub(super) enum Factor {
    /// `[rank, in]`.
    A,
    /// `[out, rank]`.
    B,
}

/// Puts an adapter over `base`. `load` gives the factors, f32, by name and shape: each matrix' `A`, then its `B`.
pub(super) fn assemble(
    base: &Decoder,
    config: &LoraConfig,
    mut load: impl FnMut(Factor, &str, [usize; 2]) -> Result<Tensor>,
) -> Result<Decoder> {
    let matrices = config.target_modules.find(base)?;
    config.validate(base, &matrices)?;
    let mut factors = Vec::with_capacity(matrices.len());
    for matrix in matrices {
        let info = &base.parameters()[matrix.0];
        let (Some(module), &[outputs, inputs]) = (module_of(info), info.held_shape().as_slice()) else {
            continue;
        };
        let [a_name, b_name] = factor_names(module);
        let mut load = |factor, name: &str, shape| {
            let tensor = load(factor, name, shape)?.to_device(base.device())?;
            Weight::dense(&tensor)
        };
        let a = load(Factor::A, &a_name, [config.rank, inputs])?;
        let b = load(Factor::B, &b_name, [outputs, config.rank])?;
        factors.push(Factors {
            matrix,
            a_name,
            a,
            b_name,
            b,
        });
    }
    base.with_low_rank(factors, config.clone())
}

/// PEFT's names of the factors of a module.
fn factor_names(module: &str) -> [String; 2] {
    ["lora_A", "lora_B"].map(|factor| format!("base_model.model.{module}.{factor}.weight"))
}

/// Values uniform in `±1 / sqrt(inputs)` from stream `stream` of ChaCha8 on `seed`.
fn uniform(elements: usize, inputs: usize, seed: u64, stream: u64) -> Vec<f32> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    let bound = 1.0 / (inputs as f64).sqrt();
    let mut next = || ((generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0) * bound;
    (0..elements).map(|_| next() as f32).collect()
}
