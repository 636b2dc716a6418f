//! The element types of GGUF that can be served.

use std::path::Path;

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use half::f16;

use crate::error::{Error, Result};

/// An element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ElementType {
    Dense(DType),
    Quantized(GgmlDType),
}

/// Names of ggml's type codes, for messages.
const NAMES: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl ElementType {
    /// The type of a code of ggml.
    ///
    /// # Errors
    /// `Unsupported` for a type that is not served, `InvalidFile` for an unknown code.
    pub(super) fn from_code(code: u32, tensor: &str, path: &Path) -> Result<Self> {
        Ok(match code {
            0 => Self::Dense(DType::F32),
            1 => Self::Dense(DType::F16),
            30 => Self::Dense(DType::BF16),
            2 => Self::Quantized(GgmlDType::Q4_0),
            3 => Self::Quantized(GgmlDType::Q4_1),
            6 => Self::Quantized(GgmlDType::Q5_0),
            7 => Self::Quantized(GgmlDType::Q5_1),
            8 => Self::Quantized(GgmlDType::Q8_0),
            10 => Self::Quantized(GgmlDType::Q2K),
            11 => Self::Quantized(GgmlDType::Q3K),
            12 => Self::Quantized(GgmlDType::Q4K),
            13 => Self::Quantized(GgmlDType::Q5K),
            14 => Self::Quantized(GgmlDType::Q6K),
            _ => {
                let Some((_, name)) = NAMES.iter().find(|&&(known, _)| known == code) else {
                    return Err(crate::formats::files::invalid(
                        path,
                        format!("tensor {tensor} is of unknown type {code}"),
                    ));
                };
                return Err(Error::Unsupported(format!(
                    "tensor {tensor} in {} is stored as {name}; weights must be F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, \
                     Q8_0 or Q2_K to Q6_K: convert them first",
                    path.display()
                )));
            }
        })
    }

    /// Elements of a block.
    pub(super) fn block_elements(self) -> usize {
        match self {
            Self::Dense(_) => 1,
            Self::Quantized(dtype) => dtype.block_size(),
        }
    }

    /// Bytes of a block.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::Dense(dtype) => dtype.size_in_bytes(),
            Self::Quantized(dtype) => dtype.type_size(),
        }
    }
}

/// The first block of `bytes` whose f16 scale or minimum is NaN or infinite; all other fields are integers.
pub(super) fn first_damaged_block(dtype: GgmlDType, bytes: &[u8]) -> Option<usize> {
    // Offsets of the f16 fields in a block, as in ggml-common.h.
    let fields: &[usize] = match dtype {
        GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
        GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q2K => &[80, 82],
        GgmlDType::Q3K => &[108],
        GgmlDType::Q6K => &[208],
        _ => &[],
    };
    let damaged = |block: &[u8]| {
        fields
            .iter()
            .any(|&at| !f16::from_le_bytes([block[at], block[at + 1]]).is_finite())
    };
    bytes.chunks_exact(dtype.type_size()).position(damaged)
}
