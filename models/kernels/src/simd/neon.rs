//! NEON: four registers of four lanes hold the sixteen. Checked by the compiler for aarch64, but never run: no such machine was at hand.
#![allow(unsafe_code)]

use std::arch::aarch64::*;

use super::{LANES, Level, Portable, Simd};

/// Evidence that the machine has NEON.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    /// Calls `body` compiled with the level's instructions.
    ///
    /// Panics where the machine lacks them.
    #[inline]
    pub(crate) fn run<R>(body: impl FnOnce(Self) -> R) -> R {
        #[target_feature(enable = "neon")]
        fn compiled<R>(body: impl FnOnce(Neon) -> R) -> R {
            body(Neon(()))
        }
        assert!(Level::Neon.is_available(), "this machine has no NEON");
        // SAFETY: the feature was just found.
        unsafe { compiled(body) }
    }
}

/// Calls an intrinsic. It is safe because a value of `Neon` exists only where the feature was found.
macro_rules! intrinsic {
    ($($call:tt)*) => {
        // SAFETY: `Neon` is built only by `run`, after detection; memory operands are references of the right size.
        unsafe { $($call)* }
    };
}

/// Lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15.
type Quad = [float32x4_t; 4];

/// Applies an intrinsic to each register of its operands.
macro_rules! each {
    ($function:ident($($operand:ident),+)) => {
        intrinsic!([
            $function($($operand[0]),+),
            $function($($operand[1]),+),
            $function($($operand[2]),+),
            $function($($operand[3]),+),
        ])
    };
}

impl Neon {
    /// Sixteen unsigned bytes as `f32`.
    #[inline(always)]
    fn widen_u8(self, bytes: uint8x16_t) -> Quad {
        intrinsic! {
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes)));
            [
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                vcvtq_f32_u32(vmovl_u16(vget_high_u16(high))),
            ]
        }
    }
}

impl Simd for Neon {
    type F32 = Quad;

    const ACCUMULATORS: usize = 4;

    #[inline(always)]
    fn splat(self, value: f32) -> Quad {
        intrinsic!([vdupq_n_f32(value); 4])
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Quad {
        let from = from.as_ptr();
        intrinsic!([
            vld1q_f32(from),
            vld1q_f32(from.add(4)),
            vld1q_f32(from.add(8)),
            vld1q_f32(from.add(12))
        ])
    }

    #[inline(always)]
    fn store(self, value: Quad, to: &mut [f32; LANES]) {
        let to = to.as_mut_ptr();
        intrinsic! {
            vst1q_f32(to, value[0]);
            vst1q_f32(to.add(4), value[1]);
            vst1q_f32(to.add(8), value[2]);
            vst1q_f32(to.add(12), value[3]);
        }
    }

    #[inline(always)]
    fn add(self, a: Quad, b: Quad) -> Quad {
        each!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Quad, b: Quad) -> Quad {
        each!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Quad, b: Quad) -> Quad {
        each!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: Quad, b: Quad) -> Quad {
        each!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: Quad, b: Quad, c: Quad) -> Quad {
        // The intrinsic's first operand is the addend.
        each!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn min(self, a: Quad, b: Quad) -> Quad {
        // vminq would give NaN for either operand; the contract is `b`.
        let less = each!(vcltq_f32(a, b));
        each!(vbslq_f32(less, a, b))
    }

    #[inline(always)]
    fn max(self, a: Quad, b: Quad) -> Quad {
        let greater = each!(vcgtq_f32(a, b));
        each!(vbslq_f32(greater, a, b))
    }

    #[inline(always)]
    fn sqrt(self, a: Quad) -> Quad {
        each!(vsqrtq_f32(a))
    }

    #[inline(always)]
    fn round(self, a: Quad) -> Quad {
        each!(vrndnq_f32(a))
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, a: Quad, exponent: Quad) -> Quad {
        intrinsic! {
            let bias = vdupq_n_s32(127);
            let power = exponent.map(#[inline(always)] |exponent| {
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtnq_s32_f32(exponent), bias)))
            });
            self.mul(a, power)
        }
    }

    #[inline(always)]
    fn select_less(self, a: Quad, b: Quad, then: Quad, otherwise: Quad) -> Quad {
        let less = each!(vcltq_f32(a, b));
        each!(vbslq_f32(less, then, otherwise))
    }

    #[inline(always)]
    fn reduce_add(self, a: Quad) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(a, &mut lanes);
        Portable.reduce_add(lanes)
    }

    #[inline(always)]
    fn reduce_max(self, a: Quad) -> f32 {
        intrinsic!(vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(a[2], a[3]))))
    }

    #[inline(always)]
    fn load_f32_bytes(self, from: &[u8; 64]) -> Quad {
        // Loads of bytes have no alignment.
        let from = from.as_ptr();
        intrinsic!([
            vreinterpretq_f32_u8(vld1q_u8(from)),
            vreinterpretq_f32_u8(vld1q_u8(from.add(16))),
            vreinterpretq_f32_u8(vld1q_u8(from.add(32))),
            vreinterpretq_f32_u8(vld1q_u8(from.add(48))),
        ])
    }

    #[inline(always)]
    fn load_f16_bytes(self, from: &[u8; 32]) -> Quad {
        // The conversion's intrinsics need the unstable type f16.
        self.load(&Portable.load_f16_bytes(from))
    }

    #[inline(always)]
    fn load_bf16_bytes(self, from: &[u8; 32]) -> Quad {
        self.load(&Portable.load_bf16_bytes(from))
    }

    #[inline(always)]
    fn store_f16_bytes(self, value: Quad, to: &mut [u8; 32]) {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        Portable.store_f16_bytes(lanes, to);
    }

    #[inline(always)]
    fn store_bf16_bytes(self, value: Quad, to: &mut [u8; 32]) {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        Portable.store_bf16_bytes(lanes, to);
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Quad {
        self.widen_u8(intrinsic!(vld1q_u8(from.as_ptr())))
    }

    #[inline(always)]
    fn load_i8(self, from: &[u8; LANES]) -> Quad {
        // The bytes with the sign bit flipped are the values plus 128.
        let shifted = self.widen_u8(intrinsic!(veorq_u8(vld1q_u8(from.as_ptr()), vdupq_n_u8(128))));
        self.sub(shifted, self.splat(128.0))
    }

    #[inline(always)]
    fn affine_nibbles(self, from: &[u8; LANES], low: [Quad; 2], high: [Quad; 2]) -> [Quad; 2] {
        let bytes = intrinsic!(vld1q_u8(from.as_ptr()));
        let lows = self.widen_u8(intrinsic!(vandq_u8(bytes, vdupq_n_u8(15))));
        let highs = self.widen_u8(intrinsic!(vshrq_n_u8::<4>(bytes)));
        [
            self.mul_add(lows, low[0], low[1]),
            self.mul_add(highs, high[0], high[1]),
        ]
    }

    #[inline(always)]
    fn f16(self, bits: [u8; 2]) -> f32 {
        Portable.f16(bits)
    }
}
