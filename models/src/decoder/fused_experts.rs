//! Files that hold the matrices of each expert by themselves, as a source that has those of a layer in one tensor.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

use super::WeightType;
use crate::error::{Error, Result};
use crate::formats::{Orientation, StoredTensor, TensorData, TensorSource};

/// A file of a model with experts. Published files have `block_sparse_moe.experts.0.w1.weight` (Mixtral) or
/// `mlp.experts.0.gate_proj.weight`; transformers 5 holds `mlp.experts.gate_up_proj` `[experts, 2 inner, width]` and
/// `mlp.experts.down_proj` `[experts, width, inner]`, which is what this source has of both.
#[derive(Debug)]
pub(super) struct FusedExperts<'a> {
    source: &'a dyn TensorSource,
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug)]
enum Stored {
    /// The tensor of that name.
    Whole(String),
    /// Matrices of one shape, to be laid one after another.
    Parts { names: Vec<String>, shape: [usize; 3] },
}

/// The matrices of an expert in the order in which they are laid, by both families' names.
const GATE_UP: [[&str; 2]; 2] = [["w1", "w3"], ["gate_proj", "up_proj"]];
const DOWN: [[&str; 1]; 2] = [["w2"], ["down_proj"]];

impl<'a> FusedExperts<'a> {
    /// Reads names and shapes. Fails with [`Error::InvalidFile`] when an expert lacks a matrix, or has one of another shape
    /// than the others.
    pub(super) fn new(source: &'a dyn TensorSource, experts: usize) -> Result<Self> {
        let mut fused = Self {
            source,
            tensors: BTreeMap::new(),
        };
        let mut groups = BTreeMap::new();
        for stored in source.names() {
            let name = stored.replacen(".block_sparse_moe.", ".mlp.", 1);
            match expert_of(&name) {
                // An expert that the configuration does not have keeps its name, under which it is refused.
                Some((prefix, expert, matrix)) if expert < experts => {
                    let layer: &mut BTreeMap<(usize, String), String> = groups.entry(prefix.to_owned()).or_default();
                    layer.insert((expert, matrix.to_owned()), stored.to_owned());
                }
                _ => fused.insert(name, Stored::Whole(stored.to_owned()))?,
            }
        }
        for (prefix, layer) in groups {
            let has = |matrix: &str| layer.keys().any(|(_, name)| name == matrix);
            let family = usize::from(!has("w1") && !has("w2") && !has("w3"));
            fused.insert_parts(&prefix, "gate_up_proj", &layer, experts, &GATE_UP[family])?;
            fused.insert_parts(&prefix, "down_proj", &layer, experts, &DOWN[family])?;
            let matrices = GATE_UP[family].iter().chain(&DOWN[family]);
            let known: Vec<&str> = matrices.copied().collect();
            if let Some(((_, _), stored)) = layer.iter().find(|((_, name), _)| !known.contains(&name.as_str())) {
                let reason = format!("tensor `{stored}` is not a matrix of an expert");
                return Err(Error::invalid_file(source.path(), reason));
            }
        }
        Ok(fused)
    }

    fn insert(&mut self, name: String, stored: Stored) -> Result<()> {
        match self.tensors.insert(name.clone(), stored) {
            None => Ok(()),
            Some(_) => {
                let reason = format!("tensor `{name}` is there twice, under two names");
                Err(Error::invalid_file(self.source.path(), reason))
            }
        }
    }

    fn insert_parts(
        &mut self,
        prefix: &str,
        name: &str,
        layer: &BTreeMap<(usize, String), String>,
        experts: usize,
        matrices: &[&str],
    ) -> Result<()> {
        let refuse = |reason: String| Err(Error::invalid_file(self.source.path(), reason));
        let mut names = Vec::with_capacity(experts * matrices.len());
        let mut shape: Option<&[usize]> = None;
        for expert in 0..experts {
            for matrix in matrices {
                let Some(stored) = layer.get(&(expert, (*matrix).to_owned())) else {
                    return refuse(format!("tensor `{prefix}.{expert}.{matrix}.weight` is missing"));
                };
                let found = self.source.shape(stored).unwrap_or_default();
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
        self.insert(format!("{prefix}.{name}"), Stored::Parts { names, shape })
    }
}

/// The parts of `PREFIX.experts.NUMBER.MATRIX.weight`, the prefix with `experts`.
fn expert_of(name: &str) -> Option<(&str, usize, &str)> {
    let (layer, rest) = name.split_once(".mlp.experts.")?;
    let (number, matrix) = rest.strip_suffix(".weight")?.split_once('.')?;
    let prefix = &name[..layer.len() + ".mlp.experts".len()];
    Some((prefix, number.parse().ok()?, matrix))
}

impl TensorSource for FusedExperts<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        match self.tensors.get(name)? {
            Stored::Whole(stored) => self.source.shape(stored),
            Stored::Parts { shape, .. } => Some(shape),
        }
    }

    fn orientation(&self) -> Orientation {
        self.source.orientation()
    }

    fn bytes(&self, name: &str) -> u64 {
        match self.tensors.get(name) {
            None => 0,
            Some(Stored::Whole(stored)) => self.source.bytes(stored),
            Some(Stored::Parts { names, .. }) => names.iter().map(|name| self.source.bytes(name)).sum(),
        }
    }

    fn stored_type(&self, name: &str) -> Option<WeightType> {
        match self.tensors.get(name)? {
            Stored::Whole(stored) => self.source.stored_type(stored),
            Stored::Parts { names, .. } => self.source.stored_type(names.first()?),
        }
    }

    fn load(&self, name: &str) -> Result<StoredTensor> {
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", self.path().display()));
        let (names, shape) = match self.tensors.get(name).ok_or_else(missing)? {
            Stored::Whole(stored) => return self.source.load(stored),
            Stored::Parts { names, shape } => (names, shape),
        };
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
        Ok(StoredTensor {
            data: TensorData::Dense(Tensor::cat(&parts, 0)?.reshape(shape)?),
            orientation: self.source.orientation(),
        })
    }
}
