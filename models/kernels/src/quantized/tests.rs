//! Every format against candle's own decoding, at every level.

use candle_core::Device;
use candle_core::quantized::{QStorage, QTensor};

use super::*;
use crate::simd::available;
use crate::test_util::{ggml_type, random, stored};

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
