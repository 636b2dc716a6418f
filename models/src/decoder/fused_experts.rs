//! Files that hold the matrices of each expert by themselves, as a source that has those of a layer in one tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};

use super::WeightType;
use crate::error::{Error, Result};
use crate::formats::{Orientation, StoredTensor, TensorData, TensorSource};

/// A file of a model, with experts as transformers 5 has them: `mlp.experts.gate_up_proj` `[experts, 2 inner, width]` and
/// `mlp.experts.down_proj` `[experts, width, inner]`, from a source whose matrices lie `[out, in]` with the experts' rows one
/// after another. Published files have `block_sparse_moe.experts.0.w1.weight` (Mixtral) or
/// `mlp.experts.0.gate_proj.weight`; GGUF has all gate projections of a layer in one tensor and all up projections in another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FusedExperts<'a> {
    source: &'a dyn TensorSource,
    tensors: Option<&'a ExpertTensors>,
}

/// Where a file has the experts of its layers.
#[derive(Debug)]
pub(crate) struct ExpertTensors(BTreeMap<String, Stored>);

#[derive(Debug)]
enum Stored {
    /// The tensor of that name.
    Whole(String),
    /// Matrices of one shape, to be laid one after another.
    Parts { names: Vec<String>, shape: [usize; 3] },
    /// The tensor of that name in another shape.
    Reshaped { name: String, shape: Vec<usize> },
    /// The gate and the up projections `[experts, inner, width]`, of which those of each expert are laid one after the other.
    Halves {
        names: [String; 2],
        experts: usize,
        shape: Vec<usize>,
    },
}

/// What our table of GGUF's names calls the projections of all experts of a layer; and the gate of the shared expert.
const GGUF_GATES: &str = ".mlp.experts.gate_projs.weight";
const GGUF_UPS: &str = ".mlp.experts.up_projs.weight";
const GGUF_DOWNS: &str = ".mlp.experts.down_projs.weight";
const SHARED_GATE: &str = ".mlp.shared_expert_gate.weight";

/// The matrices of an expert in the order in which they are laid, by both families' names.
const GATE_UP: [[&str; 2]; 2] = [["w1", "w3"], ["gate_proj", "up_proj"]];
const DOWN: [[&str; 1]; 2] = [["w2"], ["down_proj"]];

impl ExpertTensors {
    /// Reads names and shapes. Fails with [`Error::InvalidFile`] when an expert lacks a matrix, or has one of another shape
    /// than the others.
    pub(crate) fn new(source: &dyn TensorSource, experts: usize) -> Result<Self> {
        let mut fused = Self(BTreeMap::new());
        let mut groups = BTreeMap::new();
        for stored in source.names() {
            let name = stored.replacen(".block_sparse_moe.", ".mlp.", 1);
            match expert_of(&name) {
                // An expert that the configuration does not have keeps its name, under which it is refused.
                Some((prefix, expert, matrix)) if expert < experts => {
                    let layer: &mut BTreeMap<(usize, String), String> = groups.entry(prefix.to_owned()).or_default();
                    layer.insert((expert, matrix.to_owned()), stored.to_owned());
                }
                _ => match in_gguf(source, stored)? {
                    InGguf::Tensor(name, stored) => fused.insert(source, name, stored)?,
                    InGguf::Told => {}
                    InGguf::Other => fused.insert(source, name, Stored::Whole(stored.to_owned()))?,
                },
            }
        }
        for (prefix, layer) in groups {
            let has = |matrix: &str| layer.keys().any(|(_, name)| name == matrix);
            let family = usize::from(!has("w1") && !has("w2") && !has("w3"));
            fused.insert_parts(
                source,
                &format!("{prefix}.gate_up_proj"),
                &layer,
                (experts, &GATE_UP[family]),
            )?;
            fused.insert_parts(source, &format!("{prefix}.down_proj"), &layer, (experts, &DOWN[family]))?;
            let matrices = GATE_UP[family].iter().chain(&DOWN[family]);
            let known: Vec<&str> = matrices.copied().collect();
            if let Some(((_, _), stored)) = layer.iter().find(|((_, name), _)| !known.contains(&name.as_str())) {
                let reason = format!("tensor `{stored}` is not a matrix of an expert");
                return Err(Error::invalid_file(source.path(), reason));
            }
        }
        Ok(fused)
    }

    fn insert(&mut self, source: &dyn TensorSource, name: String, stored: Stored) -> Result<()> {
        match self.0.insert(name.clone(), stored) {
            None => Ok(()),
            Some(_) => {
                let reason = format!("tensor `{name}` is there twice, under two names");
                Err(Error::invalid_file(source.path(), reason))
            }
        }
    }

    fn insert_parts(
        &mut self,
        source: &dyn TensorSource,
        fused: &str,
        layer: &BTreeMap<(usize, String), String>,
        (experts, matrices): (usize, &[&str]),
    ) -> Result<()> {
        let refuse = |reason: String| Err(Error::invalid_file(source.path(), reason));
        let prefix = fused.rsplit_once('.').map_or(fused, |(prefix, _)| prefix);
        let mut names = Vec::with_capacity(experts * matrices.len());
        let mut shape: Option<&[usize]> = None;
        for expert in 0..experts {
            for matrix in matrices {
                let Some(stored) = layer.get(&(expert, (*matrix).to_owned())) else {
                    return refuse(format!("tensor `{prefix}.{expert}.{matrix}.weight` is missing"));
                };
                let found = source.shape(stored).unwrap_or_default();
                if shape.is_some_and(|shape| shape != found) || found.len() != 2 {
                    return refuse(format!(
                        "tensor `{stored}` has shape {found:?}, another one than those of the other experts"
                    ));
                }
                shape = Some(found);
                names.push(stored.clone());
            }
        }
        let &[rows, columns] = shape.unwrap_or_default() else {
            return Ok(());
        };
        let shape = [experts, matrices.len() * rows, columns];
        self.insert(source, fused.to_owned(), Stored::Parts { names, shape })
    }
}

/// The parts of `PREFIX.experts.NUMBER.MATRIX.weight`, the prefix with `experts`.
fn expert_of(name: &str) -> Option<(&str, usize, &str)> {
    let (layer, rest) = name.split_once(".mlp.experts.")?;
    let (number, matrix) = rest.strip_suffix(".weight")?.split_once('.')?;
    let prefix = &name[..layer.len() + ".mlp.experts".len()];
    Some((prefix, number.parse().ok()?, matrix))
}

/// What a tensor is in the way in which GGUF lays experts.
enum InGguf {
    /// Nothing of experts.
    Other,
    /// A part of what another tensor is told under.
    Told,
    /// The tensor of that name.
    Tensor(String, Stored),
}

fn in_gguf(source: &dyn TensorSource, stored: &str) -> Result<InGguf> {
    let shape = source.shape(stored).unwrap_or_default();
    let refuse = |reason: String| Err(Error::invalid_file(source.path(), reason));
    let reshaped = |name: String, shape: Vec<usize>| {
        let stored = stored.to_owned();
        Ok(InGguf::Tensor(name, Stored::Reshaped { name: stored, shape }))
    };
    if let (Some(_), [width]) = (stored.strip_suffix(SHARED_GATE), shape) {
        return reshaped(stored.to_owned(), vec![1, *width]);
    }
    if let Some(prefix) = stored.strip_suffix(GGUF_DOWNS) {
        return match shape {
            [experts, rows, columns] => reshaped(
                format!("{prefix}.mlp.experts.down_proj"),
                vec![experts * rows, *columns],
            ),
            _ => refuse(format!(
                "tensor {stored} has shape {shape:?}, not one of three dimensions"
            )),
        };
    }
    let (prefix, other) = match (stored.strip_suffix(GGUF_GATES), stored.strip_suffix(GGUF_UPS)) {
        (Some(prefix), _) => (prefix, format!("{prefix}{GGUF_UPS}")),
        (_, Some(prefix)) => (prefix, format!("{prefix}{GGUF_GATES}")),
        (None, None) => return Ok(InGguf::Other),
    };
    match (shape, source.shape(&other)) {
        (_, None) => refuse(format!("tensor {other} is missing beside {stored}")),
        (&[experts, rows, columns], Some(found)) if found == shape => match stored.ends_with(GGUF_GATES) {
            false => Ok(InGguf::Told),
            true => {
                let halves = Stored::Halves {
                    names: [stored.to_owned(), other],
                    experts,
                    shape: vec![experts * 2 * rows, columns],
                };
                Ok(InGguf::Tensor(format!("{prefix}.mlp.experts.gate_up_proj"), halves))
            }
        },
        (shape, Some(found)) => refuse(format!(
            "tensor {stored} has shape {shape:?}, but {other} has {found:?}"
        )),
    }
}

impl FusedExperts<'_> {
    /// The tensors of `source`, as they are where `tensors` does not say otherwise.
    pub(crate) fn new<'a>(source: &'a dyn TensorSource, tensors: Option<&'a ExpertTensors>) -> FusedExperts<'a> {
        FusedExperts { source, tensors }
    }

    fn stored(&self, name: &str) -> Option<&Stored> {
        self.tensors?.0.get(name)
    }
}

impl TensorSource for FusedExperts<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn names(&self) -> Vec<&str> {
        match self.tensors {
            None => self.source.names(),
            Some(tensors) => tensors.0.keys().map(String::as_str).collect(),
        }
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        if self.tensors.is_none() {
            return self.source.shape(name);
        }
        match self.stored(name)? {
            Stored::Whole(stored) => self.source.shape(stored),
            Stored::Parts { shape, .. } => Some(shape),
            Stored::Reshaped { shape, .. } | Stored::Halves { shape, .. } => Some(shape),
        }
    }

    fn orientation(&self) -> Orientation {
        self.source.orientation()
    }

    fn bytes(&self, name: &str) -> u64 {
        if self.tensors.is_none() {
            return self.source.bytes(name);
        }
        let sum = |names: &[String]| names.iter().map(|name| self.source.bytes(name)).sum();
        match self.stored(name) {
            None => 0,
            Some(Stored::Whole(name) | Stored::Reshaped { name, .. }) => self.source.bytes(name),
            Some(Stored::Parts { names, .. }) => sum(names),
            Some(Stored::Halves { names, .. }) => sum(names),
        }
    }

    fn stored_type(&self, name: &str) -> Option<WeightType> {
        if self.tensors.is_none() {
            return self.source.stored_type(name);
        }
        match self.stored(name)? {
            Stored::Whole(name) | Stored::Reshaped { name, .. } => self.source.stored_type(name),
            Stored::Parts { names, .. } => self.source.stored_type(names.first()?),
            Stored::Halves { names: [gate, up], .. } => {
                let (gate, up) = (self.source.stored_type(gate)?, self.source.stored_type(up)?);
                Some(if gate == up { gate } else { WeightType::F32 })
            }
        }
    }

    fn load(&self, name: &str) -> Result<StoredTensor> {
        if self.tensors.is_none() {
            return self.source.load(name);
        }
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", self.path().display()));
        let data = match self.stored(name).ok_or_else(missing)? {
            Stored::Whole(stored) => return self.source.load(stored),
            Stored::Parts { names, shape } => self.load_parts(names, shape)?,
            Stored::Reshaped { name, shape } => match self.source.load(name)?.data {
                TensorData::Dense(tensor) => TensorData::Dense(tensor.reshape(shape.as_slice())?),
                TensorData::Quantized(tensor) => quantized(words(&tensor)?, tensor.dtype(), shape)?,
            },
            Stored::Halves { names, experts, shape } => {
                let [gate, up] = [self.source.load(&names[0])?.data, self.source.load(&names[1])?.data];
                halves(gate, up, *experts, shape)?
            }
        };
        Ok(StoredTensor {
            data,
            orientation: self.source.orientation(),
        })
    }
}

impl FusedExperts<'_> {
    fn load_parts(&self, names: &[String], shape: &[usize; 3]) -> Result<TensorData> {
        let mut parts = Vec::with_capacity(names.len());
        for stored in names {
            match self.source.load(stored)?.data {
                TensorData::Dense(tensor) => parts.push(tensor),
                TensorData::Quantized(_) => {
                    let message = format!("`{stored}`: experts that are quantised one by one are not supported");
                    return Err(Error::Unsupported(message));
                }
            }
        }
        let mixed = parts.iter().position(|part| part.dtype() != parts[0].dtype());
        if let Some(index) = mixed {
            let (other, dtype) = (parts[index].dtype(), parts[0].dtype());
            let reason = format!(
                "tensor `{}` is {other:?} where `{}` is {dtype:?}",
                names[index], names[0]
            );
            return Err(Error::invalid_file(self.path(), reason));
        }
        Ok(TensorData::Dense(Tensor::cat(&parts, 0)?.reshape(shape)?))
    }
}

/// Gate and up projections `[experts, inner, width]` as `shape`, an expert's gate projection before its up projection:
/// in blocks where both are of the same, as f32 where they are of different types.
fn halves(gate: TensorData, up: TensorData, experts: usize, shape: &[usize]) -> Result<TensorData> {
    if let (TensorData::Quantized(gate), TensorData::Quantized(up)) = (&gate, &up)
        && gate.dtype() == up.dtype()
    {
        let (gate_words, up_words) = (words(gate)?, words(up)?);
        let matrix = gate_words.len() / experts.max(1);
        let mut all = Vec::with_capacity(2 * gate_words.len());
        let pairs = gate_words.chunks(matrix.max(1)).zip(up_words.chunks(matrix.max(1)));
        pairs.for_each(|(gate, up)| {
            all.extend_from_slice(gate);
            all.extend_from_slice(up);
        });
        return quantized(all, gate.dtype(), shape);
    }
    let dense = |data: TensorData| -> Result<Tensor> {
        match data {
            TensorData::Dense(tensor) => Ok(tensor),
            TensorData::Quantized(tensor) => Ok(tensor.dequantize(&Device::Cpu)?),
        }
    };
    let (mut gate, mut up) = (dense(gate)?, dense(up)?);
    if gate.dtype() != up.dtype() {
        (gate, up) = (gate.to_dtype(DType::F32)?, up.to_dtype(DType::F32)?);
    }
    Ok(TensorData::Dense(Tensor::cat(&[gate, up], 1)?.reshape(shape)?))
}

/// The blocks of a tensor. Every block has an even number of bytes, and candle wants them aligned for f16.
fn words(tensor: &QTensor) -> Result<Vec<u16>> {
    let data = tensor.data()?;
    Ok(data
        .as_chunks::<2>()
        .0
        .iter()
        .copied()
        .map(u16::from_ne_bytes)
        .collect())
}

fn quantized(words: Vec<u16>, dtype: GgmlDType, shape: &[usize]) -> Result<TensorData> {
    let storage = QStorage::from_data(Cow::Borrowed(bytemuck::cast_slice(&words)), &Device::Cpu, dtype)?;
    Ok(TensorData::Quantized(Arc::new(QTensor::new(storage, shape)?)))
}
