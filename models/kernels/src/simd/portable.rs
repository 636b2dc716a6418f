//! The level that every target has: arrays and loops, left to the compiler to vectorise.

use half::{bf16, f16};

use super::{LANES, Simd};

/// The portable level.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type Lanes = [f32; LANES];

#[inline(always)]
fn zip(a: Lanes, b: Lanes, operation: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(
        #[inline(always)]
        |i| operation(a[i], b[i]),
    )
}

impl Simd for Portable {
    type F32 = Lanes;

    const ACCUMULATORS: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> Lanes {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Lanes {
        *from
    }

    #[inline(always)]
    fn store(self, value: Lanes, to: &mut [f32; LANES]) {
        *to = value;
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        // Not f32::mul_add: without the instruction that is a slow library call.
        std::array::from_fn(
            #[inline(always)]
            |i| a[i] * b[i] + c[i],
        )
    }

    #[inline(always)]
    fn min(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sqrt(self, a: Lanes) -> Lanes {
        a.map(f32::sqrt)
    }

    #[inline(always)]
    fn round(self, a: Lanes) -> Lanes {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even, below 2^22.
        const SHIFT: f32 = 12_582_912.0;
        a.map(|a| {
            if a.abs() < 4_194_304.0 {
                (a + SHIFT) - SHIFT
            } else {
                a.round_ties_even()
            }
        })
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, a: Lanes, exponent: Lanes) -> Lanes {
        zip(a, exponent, |a, exponent| {
            a * f32::from_bits(((exponent as i32 + 127) << 23) as u32)
        })
    }

    #[inline(always)]
    fn select_less(self, a: Lanes, b: Lanes, then: Lanes, otherwise: Lanes) -> Lanes {
        std::array::from_fn(|i| if a[i] < b[i] { then[i] } else { otherwise[i] })
    }

    #[inline(always)]
    fn reduce_add(self, a: Lanes) -> f32 {
        let eight: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }

    #[inline(always)]
    fn reduce_max(self, a: Lanes) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn load_f32_bytes(self, from: &[u8; 64]) -> Lanes {
        std::array::from_fn(|i| f32::from_le_bytes([from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]]))
    }

    #[inline(always)]
    fn load_f16_bytes(self, from: &[u8; 32]) -> Lanes {
        std::array::from_fn(|i| self.f16([from[2 * i], from[2 * i + 1]]))
    }

    #[inline(always)]
    fn load_bf16_bytes(self, from: &[u8; 32]) -> Lanes {
        std::array::from_fn(|i| bf16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn store_f16_bytes(self, value: Lanes, to: &mut [u8; 32]) {
        for (value, to) in value.into_iter().zip(to.as_chunks_mut().0) {
            *to = f16::from_f32(value).to_le_bytes();
        }
    }

    #[inline(always)]
    fn store_bf16_bytes(self, value: Lanes, to: &mut [u8; 32]) {
        for (value, to) in value.into_iter().zip(to.as_chunks_mut().0) {
            *to = bf16::from_f32(value).to_le_bytes();
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Lanes {
        from.map(f32::from)
    }

    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> Lanes {
        from.map(|byte| f32::from(byte as i8))
    }

    #[inline(always)]
    fn affine_nibbles(self, from: &[u8; LANES], low: [Lanes; 2], high: [Lanes; 2]) -> [Lanes; 2] {
        let lows = from.map(|byte| f32::from(byte & 15));
        let highs = from.map(|byte| f32::from(byte >> 4));
        [
            self.mul_add(lows, low[0], low[1]),
            self.mul_add(highs, high[0], high[1]),
        ]
    }

    #[inline(always)]
    fn f16(self, bits: [u8; 2]) -> f32 {
        f16::from_le_bytes(bits).to_f32_const()
    }
}
