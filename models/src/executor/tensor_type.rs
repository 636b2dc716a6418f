//! What is known of a tensor before it is computed.

use std::fmt;

use candle_core::DType;

use crate::error::{Error, Result};

/// Most dimensions of a tensor.
pub const MAX_DIMENSIONS: usize = 8;

/// Type of the elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Two's complement 32-bit integer.
    I32,
}

impl ElementType {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::I32];

    /// The type called `name`: `f32`, `f16`, `bf16`, `i32`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|element| element.name() == name)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I32 => "i32",
        }
    }

    /// Bytes of an element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Whether its values are floating-point numbers.
    #[must_use]
    pub fn is_floating(self) -> bool {
        self != Self::I32
    }

    /// candle's name of it.
    #[must_use]
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::I32 => DType::I32,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Element type and shape of a tensor. Shown as `f32 [2, 3]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorType {
    element: ElementType,
    shape: Vec<usize>,
}

impl TensorType {
    /// A type. An empty shape is that of a scalar, and sizes may be 0.
    ///
    /// # Errors
    /// `InvalidArgument` for more than [`MAX_DIMENSIONS`] dimensions, and for more bytes than can be addressed.
    pub fn new(element: ElementType, shape: &[usize]) -> Result<Self> {
        if shape.len() > MAX_DIMENSIONS {
            return Err(Error::invalid_argument(format!(
                "the shape {shape:?} has {} dimensions; at most {MAX_DIMENSIONS} are possible",
                shape.len()
            )));
        }
        // Zeros are left out, so that a tensor without elements has strides that can be computed, too.
        let mut sizes = shape.iter().filter(|size| **size > 0);
        let bytes = sizes.try_fold(element.size(), |bytes, size| bytes.checked_mul(*size));
        match bytes.filter(|bytes| isize::try_from(*bytes).is_ok()) {
            Some(_) => Ok(Self {
                element,
                shape: shape.to_vec(),
            }),
            None => Err(Error::invalid_argument(format!(
                "a tensor of the shape {shape:?} is too large to be addressed"
            ))),
        }
    }

    /// Type of the elements.
    #[must_use]
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// The shape, outermost dimension first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of dimensions.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements; 1 for a scalar.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the elements.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.elements() * self.element.size()) as u64
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {:?}", self.element, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_counted_without_overflow() {
        let of = |shape: &[usize]| TensorType::new(ElementType::Bf16, shape);
        assert_eq!(of(&[]).unwrap().elements(), 1);
        assert_eq!(of(&[2, 0, 3]).unwrap().bytes(), 0);
        assert_eq!(of(&[2, 3]).unwrap().to_string(), "bf16 [2, 3]");
        assert!(of(&[usize::MAX, 2]).is_err());
        assert!(of(&[usize::MAX, 0, usize::MAX]).is_err());
        assert!(of(&[1; 9]).unwrap_err().to_string().contains("9 dimensions"));
    }
}
