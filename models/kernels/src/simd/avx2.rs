//! AVX2 with FMA and F16C: two registers of eight lanes hold the sixteen.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{LANES, Level, Simd};

/// Evidence that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Calls `body` compiled with the level's instructions.
    ///
    /// Panics where the machine lacks them.
    #[inline]
    pub(crate) fn run<R>(body: impl FnOnce(Self) -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<R>(body: impl FnOnce(Avx2) -> R) -> R {
            body(Avx2(()))
        }
        assert!(Level::Avx2.is_available(), "this machine has no AVX2 with FMA and F16C");
        // SAFETY: the features were just found.
        unsafe { compiled(body) }
    }
}

/// Calls an intrinsic. It is safe because a value of `Avx2` exists only where the features were found.
macro_rules! intrinsic {
    ($($call:tt)*) => {
        // SAFETY: `Avx2` is built only by `run`, after detection; memory operands are references of the right size.
        unsafe { $($call)* }
    };
}

/// Lanes 0 to 7 and 8 to 15.
type Pair = [__m256; 2];

impl Avx2 {
    /// Largest or sum of eight lanes by halves.
    #[inline(always)]
    fn halves(self, eight: __m256, combine: impl Fn(__m128, __m128) -> __m128) -> f32 {
        intrinsic! {
            let four = combine(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = combine(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(combine(two, _mm_movehdup_ps(two)))
        }
    }

    /// `2^exponent` for integral exponents, by building the number's exponent bits.
    #[inline(always)]
    fn power_of_two(self, exponent: __m256) -> __m256 {
        intrinsic! {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    /// Eight lanes rounded to bfloat16, as 32-bit integers.
    #[inline(always)]
    fn bf16_bits(self, eight: __m256) -> __m256i {
        intrinsic! {
            let bits = _mm256_castps_si256(eight);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(eight, eight));
            _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan))
        }
    }

    /// The low and the high eight bytes as unsigned 32-bit integers.
    #[inline(always)]
    fn widen_u8(self, from: &[u8; LANES]) -> [__m256i; 2] {
        intrinsic! {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))]
        }
    }
}

impl Simd for Avx2 {
    type F32 = Pair;

    const ACCUMULATORS: usize = 4;

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        intrinsic!([_mm256_set1_ps(value); 2])
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Pair {
        intrinsic!([_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))])
    }

    #[inline(always)]
    fn store(self, value: Pair, to: &mut [f32; LANES]) {
        intrinsic! {
            _mm256_storeu_ps(to.as_mut_ptr(), value[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), value[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, c: Pair) -> Pair {
        intrinsic!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sqrt(self, a: Pair) -> Pair {
        intrinsic!([_mm256_sqrt_ps(a[0]), _mm256_sqrt_ps(a[1])])
    }

    #[inline(always)]
    fn round(self, a: Pair) -> Pair {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        intrinsic!([_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])])
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, a: Pair, exponent: Pair) -> Pair {
        self.mul(a, [self.power_of_two(exponent[0]), self.power_of_two(exponent[1])])
    }

    #[inline(always)]
    fn select_less(self, a: Pair, b: Pair, then: Pair, otherwise: Pair) -> Pair {
        intrinsic!([
            _mm256_blendv_ps(otherwise[0], then[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(otherwise[1], then[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
        ])
    }

    #[inline(always)]
    fn reduce_add(self, a: Pair) -> f32 {
        self.halves(
            intrinsic!(_mm256_add_ps(a[0], a[1])),
            #[inline(always)]
            |a, b| intrinsic!(_mm_add_ps(a, b)),
        )
    }

    #[inline(always)]
    fn reduce_max(self, a: Pair) -> f32 {
        self.halves(
            intrinsic!(_mm256_max_ps(a[0], a[1])),
            #[inline(always)]
            |a, b| intrinsic!(_mm_max_ps(a, b)),
        )
    }

    #[inline(always)]
    fn load_f32_bytes(self, from: &[u8; 64]) -> Pair {
        intrinsic!([
            _mm256_loadu_ps(from.as_ptr().cast()),
            _mm256_loadu_ps(from.as_ptr().add(32).cast())
        ])
    }

    #[inline(always)]
    fn load_f16_bytes(self, from: &[u8; 32]) -> Pair {
        intrinsic!([
            _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().add(16).cast())),
        ])
    }

    #[inline(always)]
    fn load_bf16_bytes(self, from: &[u8; 32]) -> Pair {
        intrinsic! {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().add(16).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }

    #[inline(always)]
    fn store_f16_bytes(self, value: Pair, to: &mut [u8; 32]) {
        intrinsic! {
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[0]));
            _mm_storeu_si128(to.as_mut_ptr().add(16).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[1]));
        }
    }

    #[inline(always)]
    fn store_bf16_bytes(self, value: Pair, to: &mut [u8; 32]) {
        let [low, high] = [self.bf16_bits(value[0]), self.bf16_bits(value[1])];
        intrinsic! {
            // Packing works within halves of registers: the middle quarters change places afterwards.
            let packed = _mm256_permute4x64_epi64::<0xD8>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), packed);
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Pair {
        let [low, high] = self.widen_u8(from);
        intrinsic!([_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)])
    }

    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> Pair {
        intrinsic! {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            ]
        }
    }

    #[inline(always)]
    fn affine_nibbles(self, from: &[u8; LANES], low: [Pair; 2], high: [Pair; 2]) -> [Pair; 2] {
        let [first, second] = self.widen_u8(from);
        let (lows, highs) = intrinsic! {
            let mask = _mm256_set1_epi32(15);
            (
                [
                    _mm256_cvtepi32_ps(_mm256_and_si256(first, mask)),
                    _mm256_cvtepi32_ps(_mm256_and_si256(second, mask)),
                ],
                [
                    _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(first)),
                    _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(second)),
                ],
            )
        };
        [
            self.mul_add(lows, low[0], low[1]),
            self.mul_add(highs, high[0], high[1]),
        ]
    }

    #[inline(always)]
    fn prefetch(self, from: &[u8], offset: usize) {
        intrinsic!(_mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(offset).cast()))
    }

    #[inline(always)]
    fn f16_quad(self, from: &[u8; 8]) -> [f32; 4] {
        let mut quad = [0.0; 4];
        intrinsic!(_mm_storeu_ps(
            quad.as_mut_ptr(),
            _mm_cvtph_ps(_mm_loadl_epi64(from.as_ptr().cast()))
        ));
        quad
    }

    #[inline(always)]
    fn f16(self, bits: [u8; 2]) -> f32 {
        intrinsic!(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(
            u16::from_le_bytes(bits)
        )))))
    }
}
