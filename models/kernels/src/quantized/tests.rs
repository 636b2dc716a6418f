//! Every format against candle's own decoding, at every level.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};

use super::*;
use crate::simd::available;
use crate::test_util::random;

fn ggml_type(format: WeightFormat) -> GgmlDType {
    match format {
        WeightFormat::F32 => GgmlDType::F32,
        WeightFormat::F16 => GgmlDType::F16,
        WeightFormat::BF16 => GgmlDType::BF16,
        WeightFormat::Q4_0 => GgmlDType::Q4_0,
        WeightFormat::Q4_1 => GgmlDType::Q4_1,
        WeightFormat::Q5_0 => GgmlDType::Q5_0,
        WeightFormat::Q5_1 => GgmlDType::Q5_1,
        WeightFormat::Q8_0 => GgmlDType::Q8_0,
        WeightFormat::Q2K => GgmlDType::Q2K,
        WeightFormat::Q3K => GgmlDType::Q3K,
        WeightFormat::Q4K => GgmlDType::Q4K,
        WeightFormat::Q5K => GgmlDType::Q5K,
        WeightFormat::Q6K => GgmlDType::Q6K,
    }
}

/// Random weights stored by candle, and what candle reads back.
fn stored(format: WeightFormat, elements: usize) -> (Vec<u8>, Vec<f32>) {
    let values = Tensor::from_vec(random(elements, 5), elements, &Device::Cpu).unwrap();
    let quantized = QTensor::quantize(&values, ggml_type(format)).unwrap();
    let read = quantized.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
    (quantized.data().unwrap().into_owned(), read)
}

#[test]
fn blocks_have_ggmls_sizes() {
    for format in WeightFormat::ALL {
        assert_eq!(format.block_bytes(), ggml_type(format).type_size(), "{format:?}");
        assert_eq!(format.block_elements(), ggml_type(format).block_size(), "{format:?}");
        with_format!(format, F => {
            assert_eq!(F::CHUNKS * LANES * format.block_bytes(), F::BYTES * format.block_elements(), "{format:?}");
        });
    }
}

#[test]
fn every_format_decodes_like_candle() {
    for format in WeightFormat::ALL {
        for blocks in [1, 7, 300] {
            let (data, want) = stored(format, blocks * format.block_elements());
            for level in available() {
                let mut got = vec![0.0; want.len()];
                dequantize_with(level, format, &data, &mut got);
                assert_eq!(got, want, "{format:?} at {level}");
            }
        }
    }
}

#[test]
fn arbitrary_bytes_decode_like_candle() {
    // Random bytes reach every bit of the packed scales, which quantised random weights do not.
    for format in WeightFormat::ALL
        .into_iter()
        .filter(|format| format.block_elements() > 1)
    {
        let data: Vec<u8> = random(40 * format.block_bytes(), 9)
            .iter()
            .map(|x| (x * 1e4) as i32 as u8)
            .collect();
        let elements = 40 * format.block_elements();
        let storage = QStorage::from_data(data.clone().into(), &Device::Cpu, ggml_type(format)).unwrap();
        let tensor = QTensor::new(storage, elements).unwrap();
        let want: Vec<f32> = tensor.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
        for level in available() {
            let mut got = vec![0.0; elements];
            dequantize_with(level, format, &data, &mut got);
            for (got, want) in got.iter().zip(&want) {
                // Random scales are sometimes NaN or infinite.
                assert!(
                    got == want || !want.is_finite(),
                    "{format:?} at {level}: {got}, not {want}"
                );
            }
        }
    }
}

#[test]
fn half_precision_of_every_bit_pattern() {
    let data: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for level in available() {
        for (format, convert) in [
            (
                WeightFormat::F16,
                (|bits| half::f16::from_bits(bits).to_f32()) as fn(u16) -> f32,
            ),
            (WeightFormat::BF16, |bits| half::bf16::from_bits(bits).to_f32()),
        ] {
            let mut got = vec![0.0; 1 << 16];
            dequantize_with(level, format, &data, &mut got);
            for (bits, got) in got.into_iter().enumerate() {
                let want = convert(bits as u16);
                assert!(
                    got == want || got.is_nan() && want.is_nan(),
                    "{format:?} at {level}: {bits:#06x}"
                );
            }
        }
    }
}
