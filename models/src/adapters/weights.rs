//! An adapter's factors by themselves, for passes over the base that mix the rows of several adapters.

use std::ops::Range;

use candle_core::Tensor;

use super::LoraConfig;
use crate::decoder::{Decoder, Factors, ParameterId, Projection};
use crate::error::{Error, Result};
use crate::ops::low_rank::add_low_rank;

/// A copy of the factors of an adapter as they were at one time. Nothing changes it, so any thread may compute with it.
pub struct AdapterWeights {
    factors: Vec<Factors>,
    /// For each parameter of the base the position of its factors.
    positions: Vec<Option<usize>>,
    scale: f32,
    config: LoraConfig,
}

impl AdapterWeights {
    /// Copies the factors of an adapted decoder; those of an adapter that is merged into its base add nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a decoder without an adapter; [`Error::Candle`].
    pub fn of(adapted: &Decoder) -> Result<Self> {
        let config = adapted.lora_config();
        let config = config.ok_or_else(|| Error::InvalidArgument("the decoder has no adapter".into()))?;
        let mut positions = vec![None; adapted.own_parameters().start];
        let mut factors = Vec::new();
        if !adapted.is_merged() {
            for (matrix, low_rank) in adapted.adapted_modules() {
                positions[matrix.0] = Some(factors.len());
                factors.push(Factors {
                    matrix: *matrix,
                    a_name: adapted.parameters()[low_rank.a.0].name.clone(),
                    a: adapted.weight(low_rank.a).deep_copy()?,
                    b_name: adapted.parameters()[low_rank.b.0].name.clone(),
                    b: adapted.weight(low_rank.b).deep_copy()?,
                });
            }
        }
        Ok(Self {
            factors,
            positions,
            scale: config.scale() as f32,
            config: config.clone(),
        })
    }

    /// The same adapter, adding nothing.
    #[must_use]
    pub fn without_factors(&self) -> Self {
        Self {
            factors: Vec::new(),
            positions: vec![None; self.positions.len()],
            scale: self.scale,
            config: self.config.clone(),
        }
    }

    /// Bytes that the copy takes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.factors.iter().map(|one| one.a.bytes() + one.b.bytes()).sum()
    }

    /// A decoder of `base` with these factors. Both are shared, not copied.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when `base` is another model than the adapter's; [`Error::Unsupported`] when it is
    /// adapted itself.
    pub fn over(&self, base: &Decoder) -> Result<Decoder> {
        self.check(base)?;
        base.with_low_rank(self.factors.clone(), self.config.clone())
    }

    fn check(&self, base: &Decoder) -> Result<()> {
        if base.is_adapted() {
            return Err(Error::Unsupported("an adapter of an adapter is not supported".into()));
        }
        match self.positions.len() == base.parameters().len() {
            true => Ok(()),
            false => Err(Error::InvalidArgument("the adapter is of another model".into())),
        }
    }

    fn of_matrix(&self, matrix: ParameterId) -> Option<&Factors> {
        self.factors.get(self.positions.get(matrix.0).copied().flatten()?)
    }
}

/// Which rows of a pass over a base have which adapter.
pub(crate) struct AdapterRows<'a> {
    /// Neighbouring rows of one adapter; rows without one are in none.
    groups: Vec<(Range<usize>, &'a AdapterWeights)>,
}

impl<'a> AdapterRows<'a> {
    /// No row has one.
    pub(crate) fn none() -> Self {
        Self { groups: Vec::new() }
    }

    /// The rows of sequences of so many new tokens each, with the adapter of each.
    ///
    /// Fails as [`AdapterWeights::over`].
    pub(crate) fn new(
        base: &Decoder,
        sequences: impl Iterator<Item = (usize, Option<&'a AdapterWeights>)>,
    ) -> Result<Self> {
        let mut groups: Vec<(Range<usize>, &'a AdapterWeights)> = Vec::new();
        let mut first = 0;
        for (rows, adapter) in sequences {
            let end = first + rows;
            match (adapter, groups.last_mut()) {
                (Some(adapter), Some((group, last))) if group.end == first && std::ptr::eq(*last, adapter) => {
                    group.end = end;
                }
                (Some(adapter), _) => {
                    adapter.check(base)?;
                    groups.push((first..end, adapter));
                }
                (None, _) => {}
            }
            first = end;
        }
        Ok(Self { groups })
    }

    /// Adds to `output` `[rows, projection.rows.len()]` what each adapter makes of its rows of `input` `[rows, in]`.
    pub(crate) fn add(&self, output: &Tensor, input: &Tensor, projection: &Projection) -> Result<()> {
        for (rows, adapter) in &self.groups {
            if let Some(factors) = adapter.of_matrix(projection.weight) {
                let y = output.narrow(0, rows.start, rows.len())?;
                let x = input.narrow(0, rows.start, rows.len())?;
                add_low_rank(&y, &x, &factors.a, &factors.b, projection.rows.clone(), adapter.scale)?;
            }
        }
        Ok(())
    }
}
