//! AVX-512 (F, BW, VL, DQ): one register holds the sixteen lanes.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{LANES, Level, Simd};

/// Evidence that the machine has AVX-512 F, BW, VL and DQ with AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// Calls `body` compiled with the level's instructions.
    ///
    /// Panics where the machine lacks them.
    #[inline]
    pub(crate) fn run<R>(body: impl FnOnce(Self) -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
        fn compiled<R>(body: impl FnOnce(Avx512) -> R) -> R {
            body(Avx512(()))
        }
        assert!(Level::Avx512.is_available(), "this machine has no AVX-512");
        // SAFETY: the features were just found.
        unsafe { compiled(body) }
    }
}

/// Calls an intrinsic. It is safe because a value of `Avx512` exists only where the features were found.
macro_rules! intrinsic {
    ($($call:tt)*) => {
        // SAFETY: `Avx512` is built only by `run`, after detection; memory operands are references of the right size.
        unsafe { $($call)* }
    };
}

impl Avx512 {
    /// The elements of the two tables that the low and the high halves of the bytes name.
    #[inline(always)]
    fn look_up_nibbles(self, from: &[u8; LANES], tables: [__m512; 2]) -> [__m512; 2] {
        intrinsic! {
            // The permutation reads only the low four bits of each index.
            let low = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            let high = _mm512_srli_epi32::<4>(low);
            [_mm512_permutexvar_ps(low, tables[0]), _mm512_permutexvar_ps(high, tables[1])]
        }
    }
}

impl Simd for Avx512 {
    type F32 = __m512;

    const ACCUMULATORS: usize = 24;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        intrinsic!(_mm512_loadu_ps(from.as_ptr()))
    }

    #[inline(always)]
    fn store(self, value: __m512, to: &mut [f32; LANES]) {
        intrinsic!(_mm512_storeu_ps(to.as_mut_ptr(), value))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        intrinsic!(_mm512_sqrt_ps(a))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        intrinsic!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, a: __m512, exponent: __m512) -> __m512 {
        intrinsic!(_mm512_scalef_ps(a, exponent))
    }

    #[inline(always)]
    fn select_less(self, a: __m512, b: __m512, then: __m512, otherwise: __m512) -> __m512 {
        intrinsic!(_mm512_mask_blend_ps(
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b),
            otherwise,
            then
        ))
    }

    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        intrinsic! {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    fn reduce_add_each(self, vectors: [__m512; LANES]) -> [f32; LANES] {
        intrinsic! {
            // Halves of pairs of vectors are added until one vector holds all sums: lane i with i + 8, as in reduce_add.
            let mut eight = [_mm512_setzero_ps(); 8];
            for i in 0..8 {
                let (a, b) = (vectors[i], vectors[i + 8]);
                // [a.lo, b.lo] + [a.hi, b.hi], in units of 256 bits
                eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b));
            }
            let mut four = [_mm512_setzero_ps(); 4];
            for i in 0..4 {
                let (a, b) = (eight[i], eight[i + 4]);
                // 128-bit units: [a0, a2, b0, b2] + [a1, a3, b1, b3]
                four[i] = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b));
            }
            // Units now belong to vectors i, i+8, i+4, i+12; within each unit of four lanes the same twice more.
            let mut two = [_mm512_setzero_ps(); 2];
            for i in 0..2 {
                let (a, b) = (four[i], four[i + 2]);
                two[i] = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xEE>(a, b));
            }
            let one = {
                let (a, b) = (two[0], two[1]);
                // lanes [a0, a2, b0, b2] + [a1, a3, b1, b3]
                _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b))
            };
            // Lane 4u + l holds vector UNIT[u] + LANE[l] with UNIT = [0, 8, 4, 12] and LANE = [0, 2, 1, 3].
            let order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
            let mut sums = [0.0; LANES];
            _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_permutexvar_ps(order, one));
            sums
        }
    }

    #[inline(always)]
    fn transpose(self, vectors: [__m512; LANES]) -> [__m512; LANES] {
        intrinsic! {
            // Within each unit of four lanes first: fours[4q + i] holds in unit u the lanes 4u + i of rows 4q..4q + 4.
            let mut fours = [_mm512_setzero_ps(); LANES];
            for q in 0..4 {
                let [a, b, c, d] = [vectors[4 * q], vectors[4 * q + 1], vectors[4 * q + 2], vectors[4 * q + 3]];
                let (ab_low, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                fours[4 * q] = _mm512_shuffle_ps::<0x44>(ab_low, cd_low);
                fours[4 * q + 1] = _mm512_shuffle_ps::<0xEE>(ab_low, cd_low);
                fours[4 * q + 2] = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
                fours[4 * q + 3] = _mm512_shuffle_ps::<0xEE>(ab_high, cd_high);
            }
            // Then the units: row 4u + i of the result takes unit u of fours[i], fours[4 + i], fours[8 + i], fours[12 + i].
            let mut rows = [_mm512_setzero_ps(); LANES];
            for i in 0..4 {
                let [a, b, c, d] = [fours[i], fours[4 + i], fours[8 + i], fours[12 + i]];
                let (ab_even, ab_odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b));
                let (cd_even, cd_odd) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xDD>(c, d));
                rows[i] = _mm512_shuffle_f32x4::<0x88>(ab_even, cd_even);
                rows[8 + i] = _mm512_shuffle_f32x4::<0xDD>(ab_even, cd_even);
                rows[4 + i] = _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd);
                rows[12 + i] = _mm512_shuffle_f32x4::<0xDD>(ab_odd, cd_odd);
            }
            rows
        }
    }

    #[inline(always)]
    fn load_f32_bytes(self, from: &[u8; 64]) -> __m512 {
        intrinsic!(_mm512_loadu_ps(from.as_ptr().cast()))
    }

    #[inline(always)]
    fn load_f16_bytes(self, from: &[u8; 32]) -> __m512 {
        intrinsic!(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))
    }

    #[inline(always)]
    fn load_bf16_bytes(self, from: &[u8; 32]) -> __m512 {
        intrinsic! {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    fn store_f16_bytes(self, value: __m512, to: &mut [u8; 32]) {
        intrinsic!(_mm256_storeu_si256(
            to.as_mut_ptr().cast(),
            _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)
        ));
    }

    #[inline(always)]
    fn store_bf16_bytes(self, value: __m512, to: &mut [u8; 32]) {
        intrinsic! {
            // The processors' own conversion takes denormal numbers for zero; this one does not.
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let upper = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(is_nan, rounded, quiet));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(upper));
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
            from.as_ptr().cast()
        ))))
    }

    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
            from.as_ptr().cast()
        ))))
    }

    #[inline(always)]
    fn affine_nibbles(self, from: &[u8; LANES], low: [__m512; 2], high: [__m512; 2]) -> [__m512; 2] {
        intrinsic! {
            // The sixteen possible values in one register; a permutation by the nibbles looks them up.
            let steps = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
            let tables = [_mm512_fmadd_ps(steps, low[0], low[1]), _mm512_fmadd_ps(steps, high[0], high[1])];
            self.look_up_nibbles(from, tables)
        }
    }

    #[inline(always)]
    fn centred_nibbles(self, from: &[u8; LANES], scale: __m512) -> [__m512; 2] {
        intrinsic! {
            let steps = _mm512_setr_ps(-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.);
            self.look_up_nibbles(from, [_mm512_mul_ps(steps, scale); 2])
        }
    }

    #[inline(always)]
    fn apart<R>(self, body: impl FnOnce(Self) -> R) -> R {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
        fn compiled<R>(s: Avx512, body: impl FnOnce(Avx512) -> R) -> R {
            body(s)
        }
        intrinsic!(compiled(self, body))
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
