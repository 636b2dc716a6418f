//! A tape as a list: one entry for each operation of the forward pass.

use candle_core::DType;

use super::Pass;
use super::stored::Stored;
use super::tape::{Kept, LayerTape, Tape};

/// One operation that a forward pass recorded. What it reads is told by places in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapeEntry {
    /// The part of the model: `embedding`, `block 0`, …, `head`.
    pub segment: String,
    /// What was computed: `attention_norm`, `query` (with its rotation), `attention_output` (with the residual), ….
    pub operation: &'static str,
    /// Places of the entries whose results it reads, from 0.
    pub inputs: Vec<usize>,
    /// Shape of the result.
    pub shape: Vec<usize>,
    /// Type in which the result is held: `f32`, `bf16`, `f16`, `q8` (signed bytes in blocks of 64 with one f32 scale each).
    pub dtype: &'static str,
    /// Bytes held for the backward pass; 0 for a result that is computed again.
    pub bytes: u64,
    /// Where backward takes the result from.
    pub storage: ActivationStorage,
}

/// Where the backward pass takes an activation from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationStorage {
    /// It was kept as it was computed.
    Kept,
    /// It is computed again.
    Recomputed,
    /// It was kept in a smaller type.
    Compressed,
}

impl ActivationStorage {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Recomputed => "recomputed",
            Self::Compressed => "compressed",
        }
    }
}

impl Pass<'_> {
    /// The operations of the forward pass that made `tape`, and of the head that follows it.
    pub(super) fn list(&self, tape: &Tape) -> Vec<TapeEntry> {
        let mut list = Listing {
            segment: "embedding".into(),
            entries: vec![],
            products: self.product_dtype(),
        };
        let stream = [self.batch.tokens.len(), self.decoder.config().width];
        let mut input = list.add_as("embedding", &[], &stream, layer_input(tape, 0), DType::F32);
        for (index, kept) in tape.layers.iter().enumerate() {
            list.segment = format!("block {index}");
            let whole = match kept {
                Kept::Everything(tape) => Some(tape.as_ref()),
                Kept::Input(_) | Kept::Nothing => None,
            };
            let middle = self.list_attention(&mut list, input, whole);
            let inner = match self.decoder.config().experts.is_some() {
                true => self.list_experts(index, &mut list, middle, whole),
                false => self.list_feed_forward(&mut list, middle, whole),
            };
            input = list.add_as(
                "down",
                &[inner, middle],
                &stream,
                layer_input(tape, index + 1),
                DType::F32,
            );
        }
        self.list_head(&mut list, input);
        list.entries
    }

    /// The attention half of a layer; the place of its result.
    fn list_attention(&self, list: &mut Listing, input: usize, tape: Option<&LayerTape<Stored>>) -> usize {
        let config = self.decoder.config();
        let tokens = self.batch.tokens.len();
        let (stream, heads) = ([tokens, config.width], [tokens, config.heads * config.head_dim]);
        let key_value = [tokens, config.key_value_heads * config.head_dim];
        let attention = tape.map(|tape| &tape.attention);
        let norm = list.add_operand("attention_norm", &[input], &stream, None);
        let query = list.add_operand("query", &[norm], &heads, attention.map(|tape| &tape.query));
        let key = list.add_operand("key", &[norm], &key_value, attention.map(|tape| &tape.key));
        let value = list.add_operand("value", &[norm], &key_value, attention.map(|tape| &tape.value));
        // They stay f32: there are few, and backward's probabilities hang on them. Other devices keep none.
        if attention.is_none_or(|tape| !tape.log_sum_exp.is_empty()) {
            let held = attention.map(|tape| Held::plain(tape.log_sum_exp.len(), DType::F32));
            list.add_as("log_sum_exp", &[query, key], &[tokens, config.heads], held, DType::F32);
        }
        let output = list.add_operand(
            "attention",
            &[query, key, value],
            &heads,
            attention.map(|tape| &tape.output),
        );
        list.add(
            "attention_output",
            &[output, input],
            &stream,
            tape.map(|tape| &tape.middle),
        )
    }

    /// The feed-forward half of a layer up to the activation; the place of its result.
    fn list_feed_forward(&self, list: &mut Listing, input: usize, tape: Option<&LayerTape<Stored>>) -> usize {
        let config = self.decoder.config();
        let tokens = self.batch.tokens.len();
        let inner = [tokens, config.feed_forward_width];
        let norm = list.add_operand("feed_forward_norm", &[input], &[tokens, config.width], None);
        let mut factors = vec![];
        if config.gated {
            let gate = tape.and_then(|tape| tape.gate.as_ref());
            factors.push(list.add_operand("gate", &[norm], &inner, gate));
        }
        factors.push(list.add_operand("up", &[norm], &inner, tape.map(|tape| &tape.up)));
        list.add_operand("activation", &factors, &inner, None)
    }

    /// The experts of layer number `index` up to the activation; the place of its result.
    fn list_experts(&self, index: usize, list: &mut Listing, input: usize, tape: Option<&LayerTape<Stored>>) -> usize {
        let config = self.decoder.config();
        let tokens = self.batch.tokens.len();
        let norm = list.add_as("feed_forward_norm", &[input], &[tokens, config.width], None, DType::F32);
        let routing = self.routings.borrow()[index].clone();
        let (rows, held) = routing.map_or((0, None), |routing| {
            let held = Held {
                bytes: routing.bytes(),
                ..Held::plain(0, DType::F32)
            };
            (routing.groups.rows(), Some(held))
        });
        let experts = config.experts.as_ref().map_or(0, |experts| experts.experts);
        let router = list.add_as("router", &[norm], &[tokens, experts], held, DType::F32);
        let inner = [rows, config.feed_forward_width];
        let gate = list.add_operand(
            "gate",
            &[norm, router],
            &inner,
            tape.and_then(|tape| tape.gate.as_ref()),
        );
        let up = list.add_operand("up", &[norm, router], &inner, tape.map(|tape| &tape.up));
        list.add_operand("activation", &[gate, up], &inner, None)
    }

    /// The head, whose backward follows at once; logits exist in blocks only and are not listed.
    fn list_head(&self, list: &mut Listing, mut input: usize) {
        let (rows, width) = (self.batch.rows.len(), self.decoder.config().width);
        list.segment = "head".into();
        let products = list.products;
        let mut add = |operation, input: usize, shape: &[usize], dtype| {
            let held = Held::plain(shape.iter().product(), dtype);
            list.add_as(operation, &[input], shape, Some(held), dtype)
        };
        if !self.batch.every_row_has_a_target() {
            input = add("rows_with_targets", input, &[rows, width], DType::F32);
        }
        let norm = add("final_norm", input, &[rows, width], products);
        add("cross_entropy", norm, &[rows], DType::F32);
    }
}

/// What is kept of the input of layer `index`, or of the last layer's output.
fn layer_input(tape: &Tape, index: usize) -> Option<Held> {
    match tape.layers.get(index) {
        None => Some(Held::plain(tape.output.elem_count(), DType::F32)),
        Some(Kept::Everything(layer)) => Some(Held::stored(&layer.input, DType::F32)),
        Some(Kept::Input(input)) => Some(Held::stored(input, DType::F32)),
        Some(Kept::Nothing) => None,
    }
}

/// How a result is held.
struct Held {
    dtype: &'static str,
    bytes: u64,
    storage: ActivationStorage,
}

impl Held {
    fn plain(elements: usize, dtype: DType) -> Self {
        Self {
            dtype: dtype.as_str(),
            bytes: (elements * dtype.size_in_bytes()) as u64,
            storage: ActivationStorage::Kept,
        }
    }

    /// Something that was computed in the type `computed`.
    fn stored(stored: &Stored, computed: DType) -> Self {
        Self {
            dtype: stored.dtype(),
            bytes: stored.bytes(),
            storage: match stored.is_compressed(computed) {
                true => ActivationStorage::Compressed,
                false => ActivationStorage::Kept,
            },
        }
    }
}

/// A list that is being made.
struct Listing {
    segment: String,
    entries: Vec<TapeEntry>,
    /// Type of what products read.
    products: DType,
}

impl Listing {
    /// Adds an operation whose f32 result is `stored`, or else computed again. Returns its place.
    fn add(&mut self, operation: &'static str, inputs: &[usize], shape: &[usize], stored: Option<&Stored>) -> usize {
        let held = stored.map(|stored| Held::stored(stored, DType::F32));
        self.add_as(operation, inputs, shape, held, DType::F32)
    }

    /// [`add`](Self::add) of an operation whose result has the type that products read.
    fn add_operand(
        &mut self,
        operation: &'static str,
        inputs: &[usize],
        shape: &[usize],
        stored: Option<&Stored>,
    ) -> usize {
        let held = stored.map(|stored| Held::stored(stored, self.products));
        self.add_as(operation, inputs, shape, held, self.products)
    }

    /// Adds an operation whose result is computed in the type `dtype` and is `held`, or else computed again. Returns its
    /// place.
    fn add_as(
        &mut self,
        operation: &'static str,
        inputs: &[usize],
        shape: &[usize],
        held: Option<Held>,
        dtype: DType,
    ) -> usize {
        let again = Held {
            dtype: dtype.as_str(),
            bytes: 0,
            storage: ActivationStorage::Recomputed,
        };
        let Held { dtype, bytes, storage } = held.unwrap_or(again);
        self.entries.push(TapeEntry {
            segment: self.segment.clone(),
            operation,
            inputs: inputs.into(),
            shape: shape.into(),
            dtype,
            bytes,
            storage,
        });
        self.entries.len() - 1
    }
}
