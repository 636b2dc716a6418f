//! Products of two half operands by the processor's instructions for sums of two products (AVX-512 VNNI and BF16).
//!
//! Which one is chosen follows measurements. A Xeon of the Sapphire Rapids family starts a VDPBF16PS every second cycle:
//! half the products of its f32 operations. AMD's cores since Zen 4 start one every cycle, twice the products. VPDPWSSD,
//! on 16-bit integers, has twice the products on all of them. So bf16 operands are multiplied by VDPBF16PS on AMD's
//! processors. On others, and for f16, each lane of an operand becomes integers of 12 bits and sign in groups of 128
//! along the common dimension, with a power of two as the group's scale: sums within a group are exact, those of groups
//! in f32. An element keeps its 8 (bf16) or 11 (f16) significant bits unless it is less than a sixteenth (or half) of its
//! group's largest; the error of smaller ones is at most 2^-12 of the largest, less than what rounding the largest to
//! bf16 may have cost. What is not finite makes the sums that it takes part in NaN.

use super::blocks;
use super::matrix::MatrixRef;
#[cfg(target_arch = "x86_64")]
use super::pair_kernels::{Bf16Dots, Integers, is_amd};
use crate::simd::Level;

/// An instruction for sums of two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pairs {
    /// VPDPWSSD on scaled integers.
    Vnni,
    /// VDPBF16PS.
    Bf16,
}

impl Pairs {
    /// The name of products by it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pairs::Vnni => "avx512_vnni",
            Pairs::Bf16 => "avx512_bf16",
        }
    }

    /// The instructions that this machine has for operands of a type.
    pub(crate) fn available(dtype: &str) -> Vec<Self> {
        let takes = |pairs: &Pairs| match pairs {
            Pairs::Vnni => matches!(dtype, "bf16" | "f16"),
            Pairs::Bf16 => dtype == "bf16",
        };
        let all = [Pairs::Vnni, Pairs::Bf16];
        all.into_iter()
            .filter(|pairs| takes(pairs) && pairs.is_available())
            .collect()
    }

    /// What multiplies two operands fastest, if it is one of these.
    pub(super) fn choose(level: Level, a: MatrixRef<'_>, b: MatrixRef<'_>) -> Option<Self> {
        if level != Level::Avx512 || !a.is_half() || !b.is_half() {
            return None;
        }
        let preferred = match is_amd() && a.is_bf16() && b.is_bf16() && Pairs::Bf16.is_available() {
            true => Pairs::Bf16,
            false => Pairs::Vnni,
        };
        preferred.is_available().then_some(preferred)
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        match self {
            Pairs::Vnni => Integers::new().is_some(),
            Pairs::Bf16 => Bf16Dots::new().is_some(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        false
    }

    /// `out (+)= a * b`, none of them empty.
    ///
    /// # Panics
    /// Where the machine lacks the instruction.
    pub(crate) fn product(self, a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        match self {
            Pairs::Vnni => {
                if let Some(kernel) = Integers::new() {
                    return blocks::product(kernel, a, b, accumulate, out);
                }
            }
            Pairs::Bf16 => {
                if let Some(kernel) = Bf16Dots::new() {
                    return blocks::product(kernel, a, b, accumulate, out);
                }
            }
        }
        panic!("this machine cannot multiply by {}", self.name());
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn is_amd() -> bool {
    false
}
