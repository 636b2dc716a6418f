//! The contents of the log, encoded as protocol buffers: fields may be added, and old logs stay readable.

use candle_compute_proto::v1;
use prost::{Enumeration, Message, Oneof};

/// What stands before the data of a frame.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Header {
    /// Number of the frame; grows by one with each.
    #[prost(uint64, tag = "1")]
    pub(crate) number: u64,
    /// The transaction's identifier; empty for one that no client named.
    #[prost(string, tag = "2")]
    pub(crate) transaction: String,
    /// The number that its publish was answered with.
    #[prost(uint64, tag = "3")]
    pub(crate) writes: u64,
    /// Variant of the kernels in use.
    #[prost(string, tag = "4")]
    pub(crate) simd: String,
    /// What happened to models; their data follow the header in this order.
    #[prost(message, repeated, tag = "5")]
    pub(crate) entries: Vec<Entry>,
    /// What happened to checkpoints, evaluations and tokenizers.
    #[prost(message, repeated, tag = "6")]
    pub(crate) files: Vec<FileChange>,
    /// Transactions published before, whose own frames a rewritten log does not have any more.
    #[prost(message, repeated, tag = "7")]
    pub(crate) earlier: Vec<Published>,
}

/// A published transaction.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Published {
    #[prost(string, tag = "1")]
    pub(crate) transaction: String,
    #[prost(uint64, tag = "2")]
    pub(crate) writes: u64,
}

/// What a frame says about one model.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Entry {
    /// Number of the model; never used again for another.
    #[prost(uint64, tag = "1")]
    pub(crate) model: u64,
    #[prost(enumeration = "Kind", tag = "2")]
    pub(crate) kind: i32,
    /// Bytes of its data.
    #[prost(uint64, tag = "3")]
    pub(crate) bytes: u64,
    /// CRC-32 of its data.
    #[prost(fixed32, tag = "4")]
    pub(crate) checksum: u32,
    /// Tokens that a replay has to compute.
    #[prost(uint64, tag = "5")]
    pub(crate) tokens: u64,
    /// Of a base: the last frame whose changes it has already.
    #[prost(uint64, tag = "6")]
    pub(crate) through: u64,
}

/// The kinds of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub(crate) enum Kind {
    /// [`Changes`].
    Changes = 0,
    /// A [`LogBase`]: the model was created, or saved.
    Base = 1,
    /// The model was unloaded.
    Drop = 2,
    /// Commits of the model were lost by damage to the log; the data is the reason as text.
    Lost = 3,
}

/// A checkpoint, an evaluation or a tokenizer that was published or deleted.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct FileChange {
    #[prost(string, tag = "1")]
    pub(crate) model: String,
    /// Of an evaluation its id.
    #[prost(uint64, tag = "2")]
    pub(crate) step: u64,
    /// Where the new one lay before, relative to the data folder; empty for a deletion.
    #[prost(string, tag = "3")]
    pub(crate) staged: String,
    /// Its place, relative to the data folder.
    #[prost(string, tag = "4")]
    pub(crate) path: String,
}

/// Where a model's replay begins.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LogBase {
    /// Name, source, device as `models` shows them; with its configuration, how the model is loaded or created again.
    #[prost(message, optional, tag = "1")]
    pub(crate) request: Option<v1::LoadModelRequest>,
    /// Seed as `models` shows it.
    #[prost(int64, optional, tag = "2")]
    pub(crate) seed: Option<i64>,
    #[prost(message, optional, tag = "3")]
    pub(crate) created_at: Option<prost_types::Timestamp>,
    #[prost(message, optional, tag = "4")]
    pub(crate) origin: Option<Origin>,
    /// Of an adapter: how it is made again. There is no `request` then.
    #[prost(message, optional, tag = "5")]
    pub(crate) adapter: Option<v1::CreateAdapterRequest>,
    /// Of an adapter: the number of its model.
    #[prost(uint64, tag = "6")]
    pub(crate) of: u64,
    /// The tenant that loaded it; what it holds counts for that one.
    #[prost(string, tag = "7")]
    pub(crate) tenant: String,
}

/// Where a base's weights come from.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Origin {
    #[prost(oneof = "origin::Kind", tags = "1, 2, 3")]
    pub(crate) kind: Option<origin::Kind>,
}

/// See [`Origin`].
pub(crate) mod origin {
    use super::Oneof;

    /// The places.
    #[derive(Clone, PartialEq, Oneof)]
    pub(crate) enum Kind {
        /// Made from configuration and seed; the tokenizer as JSON, empty without one.
        #[prost(string, tag = "1")]
        Created(String),
        /// Files below the models folder, with the digest that they had.
        #[prost(string, tag = "2")]
        Files(String),
        /// A state saved below `commits/bases`.
        #[prost(string, tag = "3")]
        Saved(String),
    }
}

/// What one transaction changed in a model.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Changes {
    /// Leading parts of the committed gradient that the new ones may not be added to.
    #[prost(uint64, tag = "1")]
    pub(crate) sealed: u64,
    /// In order.
    #[prost(message, repeated, tag = "2")]
    pub(crate) operations: Vec<Operation>,
}

/// One change.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Operation {
    #[prost(oneof = "operation::Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9")]
    pub(crate) kind: Option<operation::Kind>,
}

/// See [`Operation`].
pub(crate) mod operation {
    use super::{Batch, GradientData, Merge, Oneof, Step, Train, Write};

    /// The kinds.
    #[derive(Clone, PartialEq, Oneof)]
    pub(crate) enum Kind {
        /// Sequences whose gradient is computed again.
        #[prost(message, tag = "1")]
        Batch(Batch),
        /// A gradient as data.
        #[prost(message, tag = "2")]
        Gradient(GradientData),
        /// So many leading parts of the committed gradient are discarded.
        #[prost(uint64, tag = "3")]
        Zero(u64),
        /// An optimizer step.
        #[prost(message, tag = "4")]
        Step(Box<Step>),
        /// Training settings, a JSON object.
        #[prost(string, tag = "5")]
        Settings(String),
        /// Elements of a parameter.
        #[prost(message, tag = "6")]
        Write(Write),
        /// Whether a parameter is trained.
        #[prost(message, tag = "7")]
        Train(Train),
        /// An adapter's product is added to the weights of the model.
        #[prost(message, tag = "8")]
        Merge(Merge),
        /// The adapter adds nothing any more.
        #[prost(bool, tag = "9")]
        Merged(bool),
    }
}

/// What an adapter adds to the weights of its model.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Merge {
    #[prost(message, repeated, tag = "1")]
    pub(crate) products: Vec<Product>,
}

/// A product of two factors, f32 and little-endian, that is added to a matrix.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Product {
    #[prost(uint32, tag = "1")]
    pub(crate) parameter: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) rank: u32,
    /// `[out, rank]`, scaled.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) b: Vec<u8>,
    /// `[rank, in]`.
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) a: Vec<u8>,
}

/// Sequences with the way in which their gradient was summed.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Batch {
    #[prost(message, repeated, tag = "1")]
    pub(crate) sequences: Vec<v1::Sequence>,
    #[prost(message, optional, tag = "2")]
    pub(crate) recipe: Option<Recipe>,
    #[prost(double, tag = "3")]
    pub(crate) duration_ms: f64,
}

/// How a gradient was summed: the grouping decides the rounding.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Recipe {
    #[prost(message, repeated, tag = "1")]
    pub(crate) steps: Vec<RecipeStep>,
}

impl Recipe {
    /// Adds a step.
    pub(crate) fn push(&mut self, kind: recipe_step::Kind) {
        self.steps.push(RecipeStep { kind: Some(kind) });
    }
}

/// One addition to a gradient.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct RecipeStep {
    #[prost(oneof = "recipe_step::Kind", tags = "1, 2")]
    pub(crate) kind: Option<recipe_step::Kind>,
}

/// See [`RecipeStep`].
pub(crate) mod recipe_step {
    use super::{Oneof, Pass, Recipe};

    /// The kinds.
    #[derive(Clone, PartialEq, Oneof)]
    pub(crate) enum Kind {
        /// The next sequences, in the micro-batches of one request.
        #[prost(message, tag = "1")]
        Pass(Pass),
        /// A gradient that was summed apart.
        #[prost(message, tag = "2")]
        Apart(Recipe),
    }
}

/// The sequences of one request.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Pass {
    /// How many.
    #[prost(uint64, tag = "1")]
    pub(crate) sequences: u64,
    /// The settings they were computed with, a JSON object, where they were not those of the model at its commit.
    #[prost(string, optional, tag = "2")]
    pub(crate) settings: Option<String>,
    /// Sequences that were accumulated before them, since the last step: masks of dropout depend on it.
    #[prost(uint64, tag = "3")]
    pub(crate) first_sequence: u64,
    /// Factor on the loss of each target.
    #[prost(double, tag = "4")]
    pub(crate) loss_factor: f64,
}

/// A gradient whose sources are not known.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct GradientData {
    #[prost(message, repeated, tag = "1")]
    pub(crate) sums: Vec<GradientSum>,
    #[prost(bool, repeated, tag = "2")]
    pub(crate) trainable: Vec<bool>,
    #[prost(uint64, tag = "3")]
    pub(crate) tokens: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) micro_batches: u64,
    #[prost(double, tag = "5")]
    pub(crate) weighted_loss: f64,
    #[prost(uint64, tag = "6")]
    pub(crate) loss_tokens: u64,
    /// What `batches` shows of it.
    #[prost(message, repeated, tag = "7")]
    pub(crate) sequences: Vec<v1::AccumulatedSequence>,
    #[prost(double, tag = "8")]
    pub(crate) duration_ms: f64,
    /// Factor on the sums.
    #[prost(double, tag = "9")]
    pub(crate) scale: f64,
    #[prost(uint64, tag = "10")]
    pub(crate) overflows: u64,
    #[prost(uint64, tag = "11")]
    pub(crate) underflows: u64,
}

/// The sum of one parameter.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct GradientSum {
    #[prost(uint32, tag = "1")]
    pub(crate) parameter: u32,
    /// f32, little-endian, in the decoder's layout.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) data: Vec<u8>,
}

/// An optimizer step.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Step {
    /// Leading parts of the committed gradient that it uses up.
    #[prost(uint64, tag = "1")]
    pub(crate) parts: u64,
    #[prost(bool, tag = "2")]
    pub(crate) decay_norms_and_biases: bool,
    /// Its row of the training log, with its options.
    #[prost(message, optional, tag = "3")]
    pub(crate) report: Option<v1::OptimizerStep>,
}

/// New elements of a parameter.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Write {
    #[prost(uint32, tag = "1")]
    pub(crate) parameter: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) chunk: u32,
    /// Elements before it.
    #[prost(uint64, tag = "3")]
    pub(crate) start: u64,
    /// f32, little-endian.
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) data: Vec<u8>,
}

/// Whether optimizer steps change a parameter.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Train {
    #[prost(uint32, tag = "1")]
    pub(crate) parameter: u32,
    #[prost(bool, tag = "2")]
    pub(crate) trainable: bool,
}
