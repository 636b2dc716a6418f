//! The weights of one expert apart from those of the others: what is sent to a server that computes it, and how that
//! server computes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use candle_kernels_cpu::{ExpertGroups, expert_gate_gradients, scale_expert_rows};
use sha2::{Digest as _, Sha256};

use super::{Decoder, FeedForward, Weight, WeightType};
use crate::config::{Activation, DecoderConfig};
use crate::error::{Error, Result};
use crate::ops::activation;
use crate::ops::backward::{ExpertMatrix, activate_backward, experts_backward, experts_forward};
use crate::ops::experts::grouped_linear;
use crate::ops::half::{RoundingLosses, rounded, rounded_gradient, widened};
use crate::ops::storage::{CpuSlice, with_mut_slice, with_slice};

/// SHA-256 over type, shape and elements of an expert's matrices.
pub type ExpertDigest = [u8; 32];

/// The matrices of one expert, as they are held: dense or quantised, each by itself.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// Rows of the gate projection, then those of the up projection, `[2 inner, width]`.
    up: Weight,
    /// The down projection, `[width, inner]`.
    down: Weight,
    activation: Activation,
}

/// What the way back through an expert gives.
#[derive(Clone, Debug)]
pub struct ExpertGradient {
    /// Of the expert's rows, `[rows, width]`.
    pub rows: Vec<f32>,
    /// Of the gates of the rows, `[rows]`.
    pub gates: Vec<f32>,
    /// Of the gate and the up projection, `[2 inner, width]`.
    pub up: Vec<f32>,
    /// Of the down projection, `[width, inner]`.
    pub down: Vec<f32>,
    /// Elements of activations' gradients that overflowed when they were rounded to half precision.
    pub overflows: u64,
    /// Likewise those that became 0.
    pub underflows: u64,
}

/// The digests of a decoder's experts that were computed since its weights changed.
#[derive(Debug, Default)]
pub(super) struct ExpertDigests(Mutex<HashMap<(usize, usize), ExpertDigest>>);

impl ExpertDigests {
    /// Forgets all: the weights have changed.
    pub(super) fn clear(&mut self) {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl ExpertWeights {
    /// Matrices from their bytes, little-endian elements or blocks along the rows: gate and up `[2 inner, width]`, and down
    /// `[width, inner]`, each of its type, for the experts of `decoder`.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] for a decoder without experts, [`Error::InvalidArgument`] for another number of bytes, and
    /// for rows that are no whole blocks.
    pub fn from_bytes(decoder: &Decoder, types: [WeightType; 2], bytes: [&[u8]; 2]) -> Result<Self> {
        decoder.experts_config()?;
        let config = &decoder.config;
        let sizes = Self::sizes(config, types)?;
        for ((name, bytes), expected) in MATRICES.into_iter().zip(bytes).zip(sizes) {
            if bytes.len() != expected {
                let message = format!("the {name} of an expert has {} bytes, not {expected}", bytes.len());
                return Err(Error::InvalidArgument(message));
            }
        }
        let [up, down] = Self::shapes(config);
        Ok(Self {
            up: Weight::from_bytes(bytes[0], types[0], up, &decoder.device)?,
            down: Weight::from_bytes(bytes[1], types[1], down, &decoder.device)?,
            activation: config.activation,
        })
    }

    /// Bytes of gate and up projection, and of the down projection, of one expert of a model.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for rows that are no whole blocks of a quantised type.
    pub fn sizes(config: &DecoderConfig, types: [WeightType; 2]) -> Result<[usize; 2]> {
        let mut sizes = [0; 2];
        let matrices = MATRICES.into_iter().zip(Self::shapes(config)).zip(types);
        for (((name, [rows, columns]), kind), size) in matrices.zip(&mut sizes) {
            let (block, bytes) = kind.block();
            if !columns.is_multiple_of(block) {
                return Err(Error::InvalidArgument(format!(
                    "the {name} of an expert has rows of {columns} elements, which are no whole blocks of {}",
                    kind.name()
                )));
            }
            *size = rows * (columns / block) * bytes;
        }
        Ok(sizes)
    }

    fn shapes(config: &DecoderConfig) -> [[usize; 2]; 2] {
        let [inner, width] = [config.feed_forward_width, config.width];
        [[2 * inner, width], [width, inner]]
    }

    /// The types of gate and up projection, and of the down projection.
    #[must_use]
    pub fn types(&self) -> [WeightType; 2] {
        [self.up.kind(), self.down.kind()]
    }

    /// The bytes, as [`from_bytes`](Self::from_bytes) takes them.
    ///
    /// # Errors
    /// [`Error::Candle`] if a tensor cannot be read.
    pub fn to_bytes(&self) -> Result<[Vec<u8>; 2]> {
        let bytes = |weight: &Weight| -> Result<Vec<u8>> {
            let mut all = Vec::with_capacity(usize::try_from(weight.bytes()).unwrap_or_default());
            visit_rows(weight, 0..weight.dims()[0], |bytes| all.extend_from_slice(bytes))?;
            Ok(all)
        };
        Ok([bytes(&self.up)?, bytes(&self.down)?])
    }

    /// What tells these weights from all others.
    ///
    /// # Errors
    /// [`Error::Candle`] if a tensor cannot be read.
    pub fn digest(&self) -> Result<ExpertDigest> {
        let mut hash = Sha256::new();
        for weight in [&self.up, &self.down] {
            hash_rows(&mut hash, weight, 0..weight.dims()[0])?;
        }
        Ok(hash.finalize().into())
    }

    fn inner(&self) -> usize {
        self.up.dims()[0] / 2
    }

    /// What the expert makes of rows `[rows, width]` in inference.
    ///
    /// # Errors
    /// [`Error::Candle`] if a tensor operation fails.
    pub fn infer(&self, rows: &[f32]) -> Result<Vec<f32>> {
        let (x, inner) = (self.input(rows)?, self.inner());
        let (bounds, width) = ([0, x.dims()[0]], x.dims()[1]);
        let (gate_rows, up_rows) = (|_: usize| 0..inner, |_: usize| inner..2 * inner);
        let [gate, up] = grouped_linear(&x, &bounds, [(&self.up, &gate_rows), (&self.up, &up_rows)])?;
        let inner = activation::gate(&gate, &up, self.activation)?;
        let [y] = grouped_linear(&inner, &bounds, [(&self.down, &|_| 0..width)])?;
        Ok(y.flatten_all()?.to_vec1()?)
    }

    /// What the expert makes of rows `[rows, width]` in training, with products that read `dtype`: f32, f16 or bf16.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] for weights that are not f32, [`Error::Candle`].
    pub fn forward(&self, rows: &[f32], dtype: DType) -> Result<Vec<f32>> {
        let pass = ExpertPass::new(self, rows, dtype)?;
        let [gate, up] = pass.project()?;
        let inner = pass.activate(&gate, &up)?;
        let y = experts_forward(pass.matrix(&pass.down, &|_| 0..pass.width, None), &inner)?;
        Ok(y.flatten_all()?.to_vec1()?)
    }

    /// The way back of [`forward`](Self::forward) of the same `rows` where its output was multiplied by the `gates` `[rows]`
    /// of the rows: from the gradient `dy` `[rows, width]` of that.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward(&self, rows: &[f32], gates: &[f32], dy: &[f32], dtype: DType) -> Result<ExpertGradient> {
        let pass = ExpertPass::new(self, rows, dtype)?;
        let groups = ExpertGroups::new(&vec![0; gates.len()], 1, 1, None);
        let scale = |rows: &Tensor| -> Result<()> {
            let host = rows.to_device(&Device::Cpu)?;
            with_mut_slice(&host, |rows| scale_expert_rows(&groups, gates, rows))?;
            if !rows.device().is_cpu() {
                rows.slice_set(&host.to_device(rows.device())?, 0, 0)?;
            }
            Ok(())
        };
        let [dup_sum, ddown_sum] = [self.up.as_f32()?.zeros_like()?, self.down.as_f32()?.zeros_like()?];
        let [gate, up] = pass.project()?;
        let inner = widened(&pass.activate(&gate, &up)?)?;
        let gated = inner.copy()?;
        scale(&gated)?;
        let (down_rows, dy) = (|_: usize| 0..pass.width, self.input(dy)?);
        let down = pass.matrix(&pass.down, &down_rows, Some(&ddown_sum));
        let dinner = experts_backward(down, &rounded(&gated, dtype)?, &pass.gradient(&dy)?, None)?;
        let mut dgates = vec![0.0; gates.len()];
        let on_host = [dinner.to_device(&Device::Cpu)?, inner.to_device(&Device::Cpu)?];
        with_slice(&on_host[0], |dinner| {
            with_slice(&on_host[1], |inner| {
                expert_gate_gradients(&groups, dinner, inner, &mut dgates)
            })
        })??;
        scale(&dinner)?;
        let (dgate, dup) = activate_backward(self.activation, Some(&widened(&gate)?), &widened(&up)?, &dinner)?;
        let (gate_rows, up_rows) = pass.halves();
        let up = pass.matrix(&pass.up, &up_rows, Some(&dup_sum));
        let mut dx = experts_backward(up, &pass.x, &pass.gradient(&dup)?, None)?;
        if let Some(dgate) = dgate {
            let gate = pass.matrix(&pass.up, &gate_rows, Some(&dup_sum));
            dx = experts_backward(gate, &pass.x, &pass.gradient(&dgate)?, Some(dx))?;
        }
        let values = |tensor: &Tensor| -> Result<Vec<f32>> { Ok(tensor.flatten_all()?.to_vec1()?) };
        Ok(ExpertGradient {
            rows: values(&dx)?,
            gates: dgates,
            up: values(&dup_sum)?,
            down: values(&ddown_sum)?,
            overflows: pass.losses.overflows.get(),
            underflows: pass.losses.underflows.get(),
        })
    }

    fn input(&self, rows: &[f32]) -> Result<Tensor> {
        let width = self.up.dims()[1];
        Ok(Tensor::from_slice(
            rows,
            (rows.len() / width, width),
            &self.up.device(),
        )?)
    }
}

/// A pass of training through one expert, by the kernels that compute all experts of a layer.
struct ExpertPass<'a> {
    weights: &'a ExpertWeights,
    /// As products read them.
    up: Tensor,
    down: Tensor,
    x: Tensor,
    dtype: DType,
    width: usize,
    bounds: [usize; 2],
    losses: RoundingLosses,
}

impl<'a> ExpertPass<'a> {
    fn new(weights: &'a ExpertWeights, rows: &[f32], dtype: DType) -> Result<Self> {
        let x = weights.input(rows)?;
        let (count, width) = x.dims2()?;
        Ok(Self {
            weights,
            up: rounded(weights.up.as_f32()?, dtype)?.contiguous()?,
            down: rounded(weights.down.as_f32()?, dtype)?.contiguous()?,
            x: rounded(&x, dtype)?,
            dtype,
            width,
            bounds: [0, count],
            losses: RoundingLosses::default(),
        })
    }

    fn matrix<'b>(
        &'b self,
        weight: &'b Tensor,
        rows: &'b dyn Fn(usize) -> Range<usize>,
        dweight: Option<&'b Tensor>,
    ) -> ExpertMatrix<'b> {
        ExpertMatrix {
            weight,
            rows,
            dweight,
            bounds: &self.bounds,
            elsewhere: None,
        }
    }

    /// Rows of the gate and of the up projection.
    fn halves(&self) -> (impl Fn(usize) -> Range<usize>, impl Fn(usize) -> Range<usize>) {
        let inner = self.weights.inner();
        (move |_| 0..inner, move |_| inner..2 * inner)
    }

    /// The outputs of the gate and the up projection.
    fn project(&self) -> Result<[Tensor; 2]> {
        let (gate_rows, up_rows) = self.halves();
        let gate = experts_forward(self.matrix(&self.up, &gate_rows, None), &self.x)?;
        let up = experts_forward(self.matrix(&self.up, &up_rows, None), &self.x)?;
        Ok([rounded(&gate, self.dtype)?, rounded(&up, self.dtype)?])
    }

    fn activate(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let gated = activation::gate(&widened(gate)?, &widened(up)?, self.weights.activation)?;
        rounded(&gated, self.dtype)
    }

    /// A gradient as products read it.
    fn gradient(&self, dy: &Tensor) -> Result<Tensor> {
        match self.dtype {
            DType::F32 => Ok(dy.clone()),
            dtype => rounded_gradient(dy, dtype, &self.losses),
        }
    }
}

impl Decoder {
    /// The weights of an expert of layer number `layer`, as they are held; dense ones share the decoder's storage.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a layer or an expert that there is not, [`Error::FailedPrecondition`] for a decoder
    /// without experts.
    pub fn expert_weights(&self, layer: usize, expert: usize) -> Result<ExpertWeights> {
        let network = self.expert_network(layer, expert)?;
        let [gate, _, down] = self.rows_of_expert(network, expert);
        Ok(ExpertWeights {
            up: self
                .weight(network.up.weight)
                .rows(gate.start..gate.start + 2 * gate.len())?,
            down: self.weight(network.down.weight).rows(down)?,
            activation: self.config.activation,
        })
    }

    /// What tells the weights of an expert of layer number `layer` from all others. Computed once for as long as the weights
    /// stay as they are.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a layer or an expert that there is not, [`Error::FailedPrecondition`] for a decoder
    /// without experts.
    pub fn expert_digest(&self, layer: usize, expert: usize) -> Result<ExpertDigest> {
        let network = self.expert_network(layer, expert)?;
        let key = (network.up.weight.0, expert);
        let lock = || self.expert_digests.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&key) {
            return Ok(*known);
        }
        let [gate, _, down] = self.rows_of_expert(network, expert);
        let mut hash = Sha256::new();
        hash_rows(
            &mut hash,
            self.weight(network.up.weight),
            gate.start..gate.start + 2 * gate.len(),
        )?;
        hash_rows(&mut hash, self.weight(network.down.weight), down)?;
        let digest = hash.finalize().into();
        lock().insert(key, digest);
        Ok(digest)
    }

    fn expert_network(&self, layer: usize, expert: usize) -> Result<&FeedForward> {
        let experts = self.experts_config()?.experts;
        let refuse = |message: String| Err(Error::InvalidArgument(message));
        match self.layout.layers.get(layer) {
            None => refuse(format!("there is no layer {layer}")),
            Some(_) if expert >= experts => refuse(format!("there is no expert {expert}")),
            Some(layer) => Ok(&layer.feed_forward),
        }
    }

    fn rows_of_expert(&self, network: &FeedForward, expert: usize) -> [Range<usize>; 3] {
        network.expert_rows(expert, self.config.feed_forward_width, self.config.width)
    }
}

/// What the matrices are called, in their order.
const MATRICES: [&str; 2] = ["gate and up projection", "down projection"];

/// Hashes rows of a matrix as they are held, with their type and shape.
fn hash_rows(hash: &mut Sha256, weight: &Weight, rows: Range<usize>) -> Result<()> {
    let shape = [rows.len(), weight.dims()[1]];
    match weight {
        Weight::Dense(tensor) => hash.update(format!("{:?} {shape:?}\n", tensor.dtype())),
        Weight::Quantized(_) => hash.update(format!("{} {shape:?}\n", weight.kind().name())),
    }
    visit_rows(weight, rows, |bytes| hash.update(bytes))
}

/// Shows the bytes of rows of a matrix as they are held: little-endian elements, or blocks.
fn visit_rows(weight: &Weight, rows: Range<usize>, visit: impl FnOnce(&[u8])) -> Result<()> {
    match weight {
        Weight::Dense(tensor) => {
            let part = tensor.narrow(0, rows.start, rows.len())?.to_device(&Device::Cpu)?;
            visit(CpuSlice::new(&part.contiguous()?)?.bytes()?);
        }
        Weight::Quantized(tensor) => {
            let data = tensor.data()?;
            let row = data.len() / weight.dims()[0].max(1);
            visit(&data[rows.start * row..rows.end * row]);
        }
    }
    Ok(())
}
