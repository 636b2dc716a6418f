//! Reading and writing parameters in transformers' layout, a range of elements at a time.

use super::{Decoder, ParameterId, Weight};
use crate::error::{Error, Result};
use crate::training::change_range;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// A run of a parameter's elements in the row-major order of transformers' shape.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterData {
    /// Type of the elements: that of the weight, f32 for quantised ones.
    pub dtype: DType,
    /// Little-endian elements.
    pub data: Vec<u8>,
    /// Euclidean norm of the elements.
    pub norm: f64,
}

impl Decoder {
    /// Reads elements of the parameter of that name. Quantised values arrive as f32.
    ///
    /// Fails with [`Error::NotFound`] for an unknown name and [`Error::InvalidArgument`] for a range outside of it.
    pub fn read_parameter(&self, name: &str, range: Range<usize>) -> Result<ParameterData> {
        let id = self.checked_range(name, &range)?;
        let values = self.elements(id, range)?;
        let dtype = values.dtype();
        let data = match dtype {
            DType::F16 => little_endian(&values.to_vec1::<half::f16>()?, |value| value.to_le_bytes()),
            DType::BF16 => little_endian(&values.to_vec1::<half::bf16>()?, |value| value.to_le_bytes()),
            _ => little_endian(&values.to_vec1::<f32>()?, |value| value.to_le_bytes()),
        };
        let norm = match dtype {
            DType::F32 => euclidean_norm(&values.to_vec1()?),
            _ => euclidean_norm(&values.to_dtype(DType::F32)?.to_vec1()?),
        };
        Ok(ParameterData { dtype, data, norm })
    }

    /// Elements of the parameter of that name as f32, whatever it is held as.
    ///
    /// Fails as [`read_parameter`](Self::read_parameter).
    pub fn read_elements(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let id = self.checked_range(name, &range)?;
        Ok(self.elements(id, range)?.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// The parameter of that name, which has these elements.
    fn checked_range(&self, name: &str, range: &Range<usize>) -> Result<ParameterId> {
        let id = self.parameter_id(name)?;
        let elements = self.parameters[id.0].elements();
        match range.start > range.end || range.end > elements {
            false => Ok(id),
            true => Err(Error::InvalidArgument(format!(
                "elements {range:?} are outside of parameter `{name}`, which has {elements}"
            ))),
        }
    }

    /// Replaces the elements `start..start + values.len()` of the parameter of that name, which keeps its type: values are
    /// rounded to it. Weights may be changed in place: clones that share their storage see the change.
    ///
    /// Fails with [`Error::NotFound`] for an unknown name, [`Error::InvalidArgument`] for a range outside of it, and
    /// [`Error::Unsupported`] for a quantised parameter. Nothing is changed then.
    pub fn write_parameter(&mut self, name: &str, start: usize, values: &[f32]) -> Result<()> {
        self.weights_change();
        let id = self.parameter_id(name)?;
        let info = &self.parameters[id.0];
        let elements = info.elements();
        if start.checked_add(values.len()).is_none_or(|end| end > elements) {
            return Err(Error::InvalidArgument(format!(
                "{} elements from {start} on are outside of parameter `{name}`, which has {elements}",
                values.len()
            )));
        }
        let Weight::Dense(tensor) = &self.weights[id.0] else {
            return Err(Error::Unsupported(format!(
                "parameter `{name}` is held as {} and cannot be written; load the model with dtype f32",
                info.dtype
            )));
        };
        let replace = |element: &mut f32, value| *element = value;
        if tensor.dtype() == DType::F32 {
            return change_range(tensor, info, start, values, replace);
        }
        let expanded = tensor.to_dtype(DType::F32)?;
        change_range(&expanded, info, start, values, replace)?;
        self.weights[id.0] = Weight::Dense(expanded.to_dtype(tensor.dtype())?);
        Ok(())
    }

    /// The elements of a range in transformers' order, `[range.len()]`, on the CPU.
    fn elements(&self, id: ParameterId, range: Range<usize>) -> Result<Tensor> {
        let info = &self.parameters[id.0];
        if info.shape.len() < 2 || range.is_empty() {
            let flat = match self.weight(id) {
                Weight::Dense(tensor) => tensor.flatten_all()?,
                Weight::Quantized(tensor) => tensor.dequantize(&Device::Cpu)?.flatten_all()?,
            };
            return Ok(flat.narrow(0, range.start, range.len())?.to_device(&Device::Cpu)?);
        }
        // Whole rows of transformers' shape that cover the range, then the range of them.
        let columns = info.shape.last().copied().unwrap_or(1);
        let rows = range.start / columns..range.end.div_ceil(columns);
        let covering = match (self.weight(id), info.transposed) {
            (Weight::Dense(tensor), false) => tensor.narrow(0, rows.start, rows.len())?,
            (Weight::Dense(tensor), true) => tensor.narrow(1, rows.start, rows.len())?.t()?,
            (Weight::Quantized(tensor), false) => crate::ops::embedding::dequantize_rows(tensor, rows.clone())?,
            (Weight::Quantized(tensor), true) => tensor
                .dequantize(&Device::Cpu)?
                .narrow(1, rows.start, rows.len())?
                .t()?,
        };
        let flat = covering.to_device(&Device::Cpu)?.contiguous()?.flatten_all()?;
        Ok(flat.narrow(0, range.start - rows.start * columns, range.len())?)
    }
}

fn little_endian<T, const N: usize>(values: &[T], bytes: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    let mut data = Vec::with_capacity(values.len() * N);
    for value in values {
        data.extend_from_slice(&bytes(value));
    }
    data
}

fn euclidean_norm(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|value| f64::from(*value) * f64::from(*value))
        .sum::<f64>()
        .sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::WeightType;
    use super::*;
    use crate::config::from_settings;
    use serde_json::json;

    fn tiny(kind: &str) -> Decoder {
        let settings = json!({"architecture": "gpt2", "layers": 1, "width": 32, "heads": 4, "context_length": 16,
            "vocabulary": 50});
        let config = from_settings(settings.as_object().unwrap(), None).unwrap();
        let kind = Some(WeightType::from_name(kind).unwrap());
        Decoder::initialize(config, &Device::Cpu, kind, 3).unwrap()
    }

    fn floats(data: &ParameterData) -> Vec<f32> {
        data.data
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect()
    }

    #[test]
    fn chunks_join_to_transformers_layout() {
        for kind in ["f32", "q8_0"] {
            let decoder = tiny(kind);
            for name in [
                "transformer.h.0.mlp.c_fc.weight",
                "transformer.wte.weight",
                "transformer.h.0.mlp.c_fc.bias",
            ] {
                let id = decoder.parameter_id(name).unwrap();
                let info = &decoder.parameters()[id.0];
                let held = decoder.weight(id).to_f32().unwrap();
                let whole = if info.transposed {
                    held.t().unwrap().contiguous().unwrap()
                } else {
                    held
                };
                assert_eq!(whole.dims(), info.shape);
                let whole: Vec<f32> = whole.flatten_all().unwrap().to_vec1().unwrap();
                let chunks = (0..info.elements())
                    .step_by(37)
                    .map(|start| start..(start + 37).min(info.elements()));
                let joined: Vec<f32> = chunks
                    .flat_map(|range| floats(&decoder.read_parameter(name, range).unwrap()))
                    .collect();
                assert_eq!(joined, whole, "{name} {kind}");
            }
        }
    }

    #[test]
    fn bad_ranges_and_names_are_refused() {
        let decoder = tiny("f32");
        assert!(matches!(
            decoder.read_parameter("nothing", 0..1),
            Err(Error::NotFound(_))
        ));
        let beyond = decoder.read_parameter("transformer.wte.weight", 0..50 * 32 + 1);
        assert!(matches!(beyond, Err(Error::InvalidArgument(_))));
        assert!(
            decoder
                .read_parameter("transformer.wte.weight", 7..7)
                .unwrap()
                .data
                .is_empty()
        );
    }

    #[test]
    fn what_is_written_is_read_and_the_rest_stays() {
        for (kind, name) in [
            ("f32", "transformer.h.0.mlp.c_fc.weight"),
            ("bf16", "transformer.h.0.mlp.c_fc.weight"),
            ("f32", "transformer.wte.weight"),
            ("bf16", "transformer.h.0.mlp.c_fc.bias"),
        ] {
            let mut decoder = tiny(kind);
            let elements = decoder.parameters()[decoder.parameter_id(name).unwrap().0].elements();
            let before = decoder.read_parameter(name, 0..elements).unwrap();
            // Of whole numbers up to 256 all are exact in bf16.
            let values: Vec<f32> = (0..70).map(|n| n as f32).collect();
            decoder.write_parameter(name, 41, &values).unwrap();
            let after = decoder.read_parameter(name, 0..elements).unwrap();
            let size = after.dtype.size_in_bytes();
            assert_eq!(before.dtype, after.dtype);
            assert_eq!(before.data[..41 * size], after.data[..41 * size], "{name} {kind}");
            assert_eq!(before.data[111 * size..], after.data[111 * size..], "{name} {kind}");
            let written = decoder.elements(decoder.parameter_id(name).unwrap(), 41..111).unwrap();
            assert_eq!(
                written.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(),
                values,
                "{name} {kind}"
            );
            let beyond = decoder.write_parameter(name, elements - 1, &values);
            assert!(matches!(beyond, Err(Error::InvalidArgument(_))));
        }
        let quantised = tiny("q8_0").write_parameter("transformer.wte.weight", 0, &[1.0]);
        assert!(matches!(quantised, Err(Error::Unsupported(_))));
    }

    #[test]
    fn half_precision_is_read_as_held() {
        let data = tiny("bf16").read_parameter("transformer.wte.weight", 0..32).unwrap();
        assert_eq!((data.dtype, data.data.len()), (DType::BF16, 64));
        assert!(data.norm > 0.0);
    }
}
