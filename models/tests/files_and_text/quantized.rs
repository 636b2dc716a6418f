//! Every GGUF element type against the values that llama.cpp's own Python package reads.

use candle_models::formats::{Orientation, TensorData, TensorSource, open_gguf};
use candle_models::{Device, Tensor};

use crate::golden;

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor
        .to_dtype(candle_models::DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

#[test]
fn all_element_types_are_read_as_the_reference_reads_them() {
    let source = open_gguf(&golden("quantized.gguf")).unwrap();
    let expected = candle_core::safetensors::load(golden("quantized.safetensors"), &Device::Cpu).unwrap();
    let mut names: Vec<&str> = expected.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(source.names(), names);
    assert_eq!(source.orientation(), Orientation::OutIn);
    let mut quantized = 0;
    for name in names {
        let stored = source.load(name).unwrap();
        assert_eq!(stored.shape(), expected[name].dims());
        assert_eq!(source.shape(name), Some(expected[name].dims()));
        let ours = match &stored.data {
            TensorData::Dense(tensor) => values(tensor),
            TensorData::Quantized(tensor) => {
                quantized += 1;
                assert_eq!(tensor.storage_size_in_bytes() as u64, source.bytes(name));
                values(&tensor.dequantize(&Device::Cpu).unwrap())
            }
        };
        for (index, (ours, reference)) in ours.iter().zip(values(&expected[name])).enumerate() {
            // The order of a few f32 operations differs between the implementations.
            let tolerance = 1e-6 * reference.abs().max(1e-3);
            assert!(
                (ours - reference).abs() <= tolerance,
                "{name}[{index}]: {ours} instead of {reference}"
            );
        }
    }
    assert_eq!(quantized, 5 + 5 + 4);
}
