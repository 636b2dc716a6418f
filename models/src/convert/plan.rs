//! What a conversion will write, before it writes anything.

use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;

use super::gguf;
use crate::decoder::{ParameterInfo, ParameterRole, WeightType, check_source, stored_name};
use crate::error::{Error, Result};
use crate::formats::{Orientation, TensorSource};
use crate::opened::OpenedModel;

/// A format that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A Hugging Face directory with safetensors, in shards with an index where there are several.
    Safetensors,
    /// A directory with a manifest `model.jsonl` and its shards.
    Jsonl,
    /// One `.npz` archive, with configuration and tokenizer within.
    Npz,
    /// One GGUF file, as llama.cpp reads it.
    Gguf,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::Safetensors, Self::Jsonl, Self::Npz, Self::Gguf];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Jsonl => "jsonl",
            Self::Npz => "npz",
            Self::Gguf => "gguf",
        }
    }

    /// The format that a target's name asks for: `.gguf` and `.npz` are files, everything else is a Hugging Face directory.
    pub fn of_target(target: &Path) -> Self {
        match target.extension().and_then(|extension| extension.to_str()) {
            Some("gguf") => Self::Gguf,
            Some("npz") => Self::Npz,
            _ => Self::Safetensors,
        }
    }

    /// Whether a target is a folder.
    pub(super) fn is_folder(self) -> bool {
        matches!(self, Self::Safetensors | Self::Jsonl)
    }
}

/// How a model is converted.
#[derive(Debug, Clone)]
pub struct ConversionOptions {
    /// The format to write.
    pub format: Format,
    /// Type of the weights: f32, f16 or bf16, for GGUF also q8_0. Default: as stored, quantised ones as f32; for GGUF f16.
    pub dtype: Option<WeightType>,
    /// Most bytes of tensors in one shard of safetensors or of a manifest; a larger tensor has a shard to itself.
    pub shard_bytes: u64,
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// Its name in the target.
    pub name: String,
    /// Its shape in the target.
    pub shape: Vec<usize>,
    /// The type of its elements there.
    pub dtype: WeightType,
    /// Its bytes there.
    pub bytes: u64,
    pub(super) info: ParameterInfo,
    /// Which half of each expert's rows it has, where it does not have all.
    pub(super) half: Option<usize>,
}

/// A checked plan.
#[derive(Debug)]
pub struct Conversion {
    pub(super) model: OpenedModel,
    pub(super) source: PathBuf,
    pub(super) options: ConversionOptions,
    pub(super) tensors: Vec<PlannedTensor>,
}

impl Conversion {
    /// Opens `source` and plans its conversion. All headers are read and checked, no weights.
    ///
    /// # Errors
    /// As opening the model; `InvalidFile` for tensors that do not fit the configuration; `Unsupported` for a type or an
    /// architecture that the format does not have.
    pub fn plan(source: &Path, options: ConversionOptions) -> Result<Self> {
        let model = OpenedModel::open(source)?;
        let parameters = check_source(&model.config, &model.source())?;
        if options.format == Format::Gguf {
            gguf::check(&model)?;
        }
        let mut conversion = Self {
            model,
            source: source.to_owned(),
            options,
            tensors: Vec::new(),
        };
        for info in parameters {
            let planned = conversion.plan_tensors(info)?;
            conversion.tensors.extend(planned);
        }
        Ok(conversion)
    }

    /// The tensors in the order in which they are written.
    pub fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    /// Bytes of all tensors in the target.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The format that is written.
    pub fn format(&self) -> Format {
        self.options.format
    }

    /// What is written of a parameter: one tensor, but two of the experts' gate and up projections in GGUF, and none of
    /// switches of routers that the source does not have.
    fn plan_tensors(&self, info: ParameterInfo) -> Result<Vec<PlannedTensor>> {
        let config = &self.model.config;
        if !info.is_listed() && self.model.source().shape(&info.name).is_none() {
            return Ok(vec![]);
        }
        if self.options.format != Format::Gguf {
            let (name, shape) = (stored_name(config.architecture, &info.name), info.shape.clone());
            let dtype = match info.is_listed() {
                true => self.dense_type(&info)?,
                // Switches are f32, whatever the weights are.
                false => WeightType::F32,
            };
            return Ok(vec![planned(name, shape, dtype, None, &info)]);
        }
        if !info.is_listed() {
            return Err(Error::Unsupported(format!(
                "gguf has no place for `{}`, what UPDATE of routers has switched; undo that first",
                info.name
            )));
        }
        let dtype = self.gguf_type(&info)?;
        let name = |name: &str| gguf::tensor_name(config, name);
        if let (Some(layer), &[experts, rows, columns]) =
            (info.name.strip_suffix("gate_up_proj"), info.shape.as_slice())
        {
            let half = |half: usize, part: &str| -> Result<PlannedTensor> {
                let (name, shape) = (name(&format!("{layer}{part}"))?, vec![experts, rows / 2, columns]);
                Ok(planned(name, shape, dtype, Some(half), &info))
            };
            return Ok(vec![half(0, "gate_projs.weight")?, half(1, "up_projs.weight")?]);
        }
        Ok(vec![match info.shape.as_slice() {
            [_, _, _] => planned(
                name(&format!("{}s.weight", info.name))?,
                info.shape.clone(),
                dtype,
                None,
                &info,
            ),
            // The gate of the shared expert is a vector to llama.cpp.
            [1, width] if info.role == ParameterRole::Router && info.name.ends_with("_gate.weight") => {
                planned(name(&info.name)?, vec![*width], dtype, None, &info)
            }
            _ => planned(name(&info.name)?, info.held_shape(), dtype, None, &info),
        }])
    }

    /// The type of a tensor in the formats that hold dense ones.
    fn dense_type(&self, info: &ParameterInfo) -> Result<WeightType> {
        match self.options.dtype {
            None => Ok(match self.model.source().stored_type(&info.name) {
                Some(WeightType::Quantized(_)) | None => WeightType::F32,
                Some(dense) => dense,
            }),
            Some(dense @ (WeightType::F32 | WeightType::F16 | WeightType::Bf16)) => Ok(dense),
            Some(WeightType::Quantized(_)) => {
                let (format, asked) = (self.options.format.name(), name_of(self.options.dtype));
                Err(Error::Unsupported(format!(
                    "{format} is written in f32, f16 or bf16, not in {asked}; for quantised weights write gguf"
                )))
            }
        }
    }

    /// llama.cpp wants everything but matrices in f32. Rows that blocks of 32 do not divide stay f16.
    fn gguf_type(&self, info: &ParameterInfo) -> Result<WeightType> {
        const Q8_0: WeightType = WeightType::Quantized(GgmlDType::Q8_0);
        let row = info.held_shape().last().copied().unwrap_or(1);
        match self.options.dtype.unwrap_or(WeightType::F16) {
            WeightType::Quantized(kind) if kind != GgmlDType::Q8_0 => Err(Error::Unsupported(format!(
                "gguf is written in f32, f16, bf16 or q8_0, not in {}",
                name_of(self.options.dtype)
            ))),
            // llama.cpp keeps routers as f32.
            _ if !info.role.is_matrix() || info.role == ParameterRole::Router => Ok(WeightType::F32),
            Q8_0 if !row.is_multiple_of(GgmlDType::Q8_0.block_size()) => Ok(WeightType::F16),
            dtype => Ok(dtype),
        }
    }

    /// Whether matrices lie `[out, in]` in the source.
    pub(super) fn source_is_out_in(&self) -> bool {
        self.model.files.source().orientation() == Orientation::OutIn
    }
}

fn planned(
    name: String,
    shape: Vec<usize>,
    dtype: WeightType,
    half: Option<usize>,
    info: &ParameterInfo,
) -> PlannedTensor {
    let elements = shape.iter().map(|size| *size as u64).product::<u64>();
    let bytes = match dtype {
        WeightType::F32 => 4 * elements,
        WeightType::F16 | WeightType::Bf16 => 2 * elements,
        WeightType::Quantized(kind) => elements / kind.block_size() as u64 * kind.type_size() as u64,
    };
    PlannedTensor {
        name,
        shape,
        dtype,
        bytes,
        info: info.clone(),
        half,
    }
}

fn name_of(dtype: Option<WeightType>) -> &'static str {
    dtype.map_or("", WeightType::name)
}
