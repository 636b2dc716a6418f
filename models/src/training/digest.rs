//! A digest of what decides the outcome of the next optimizer step.

use sha2::{Digest as _, Sha256};

use super::AdamW;
use crate::decoder::{Decoder, ParameterId, Weight};
use crate::error::Result;
use crate::ops::storage::CpuSlice;
use candle_core::{Device, Tensor};

/// SHA-256, in hexadecimal, over names, shapes, trainability and elements of the parameters, attention layouts, and the
/// optimizer's moments and step. Decoders of one configuration with the same digest take the same step from the same gradient, at the
/// same number of threads.
///
/// # Errors
/// [`Error::Candle`](crate::Error::Candle) if a tensor cannot be read.
pub fn digest(decoder: &Decoder, optimizer: &AdamW) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(optimizer.steps().to_le_bytes());
    for (index, parameter) in decoder.parameters().iter().enumerate() {
        let (shape, trainable) = (&parameter.shape, parameter.trainable);
        hash.update(format!(
            "{} {shape:?} {} {trainable}\n",
            parameter.name, parameter.dtype
        ));
        match decoder.weight(ParameterId(index)) {
            Weight::Dense(tensor) => update(&mut hash, tensor)?,
            Weight::Quantized(tensor) => hash.update(tensor.data()?),
        }
    }
    if let Some(layouts) = decoder.attention_layouts().to_json() {
        hash.update(layouts);
    }
    for (index, moments) in optimizer.moments.iter().enumerate() {
        let Some(moments) = moments else { continue };
        hash.update((index as u64).to_le_bytes());
        update(&mut hash, &moments.first)?;
        update(&mut hash, &moments.second)?;
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn update(hash: &mut Sha256, tensor: &Tensor) -> Result<()> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    hash.update(CpuSlice::new(&tensor)?.bytes()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_settings;
    use serde_json::json;

    #[test]
    fn every_element_and_the_step_count() {
        let settings = json!({"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "context_length": 4,
            "vocabulary": 16});
        let config = || from_settings(settings.as_object().unwrap(), None).unwrap();
        let mut decoder = Decoder::initialize(config(), &Device::Cpu, None, 1).unwrap();
        let same = Decoder::initialize(config(), &Device::Cpu, None, 1).unwrap();
        let first = digest(&decoder, &AdamW::new()).unwrap();
        assert_eq!(first, digest(&same, &AdamW::new()).unwrap());
        let name = decoder.parameters()[3].name.clone();
        decoder.write_parameter(&name, 1, &[0.125]).unwrap();
        let changed = digest(&decoder, &AdamW::new()).unwrap();
        assert_ne!(first, changed);
        let mut stepped = AdamW::new();
        stepped.step = 1;
        assert_ne!(changed, digest(&decoder, &stepped).unwrap());
    }
}
