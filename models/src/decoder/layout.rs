//! Which parameters a configuration has, in order, and which of them each part of the decoder uses.

use super::names::{Names, QueryKeyValueNames, names};
use crate::config::{DecoderConfig, ExpertsConfig, Norm, Position, Residual};
use std::ops::Range;

/// Number of a parameter in [`Decoder::parameters`](super::Decoder::parameters); the index of all that is kept per
/// parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParameterId(pub usize);

/// What a parameter does, which decides its initial value and how it may be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterRole {
    /// Token embedding, and the head when it is tied. `[vocabulary, width]`.
    Embedding,
    /// Learned positions. `[context_length, width]`, always f32.
    Positions,
    /// A projection's matrix.
    Matrix,
    /// A projection's matrix whose output is added to the residual stream.
    ResidualMatrix,
    /// A bias, of a projection or a norm; always f32.
    Bias,
    /// Weight of a norm, always f32.
    NormWeight,
    /// A matrix of a router, always f32: near ties are decided by its last bits.
    Router,
    /// The switches of a router: a bias and whether it is enabled for each expert. `[2, experts]`, always f32. They are no
    /// parameter of transformers, no optimizer step changes them, and nothing lists them.
    Switches,
    /// A factor of an adapter's low-rank matrix, always f32.
    LowRank,
}

impl ParameterRole {
    /// Whether the values may be held in another type than f32.
    pub fn is_matrix(self) -> bool {
        matches!(self, Self::Embedding | Self::Matrix | Self::ResidualMatrix)
    }
}

/// What is known of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterInfo {
    /// transformers' name.
    pub name: String,
    /// transformers' shape.
    pub shape: Vec<usize>,
    /// Whether the matrix is held as the transpose of `shape`.
    pub transposed: bool,
    /// What it does.
    pub role: ParameterRole,
    /// How it is held: `f32`, `bf16`, `q4_1`.
    pub dtype: &'static str,
    /// Whether an optimizer step changes it.
    pub trainable: bool,
}

impl ParameterInfo {
    /// Dimensions as held: `[out, in]` for matrices. The matrices of all experts of a layer, in transformers
    /// `[experts, out, in]`, are held as one with the rows of one after another.
    pub fn held_shape(&self) -> Vec<usize> {
        match (self.transposed, &self.shape[..]) {
            (true, shape) => shape.iter().rev().copied().collect(),
            (false, &[experts, rows, columns]) => vec![experts * rows, columns],
            (false, shape) => shape.to_vec(),
        }
    }

    /// Whether it is one that transformers has too, which is listed, counted, read and written under its name.
    pub fn is_listed(&self) -> bool {
        self.role != ParameterRole::Switches
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A linear map: some rows of a matrix, and the same elements of a bias. GPT-2's query, key and value are rows of one
/// matrix, Llama's are three matrices.
#[derive(Debug, Clone)]
pub struct Projection {
    /// The matrix, held `[out, in]`.
    pub weight: ParameterId,
    /// The bias, `[out]`.
    pub bias: Option<ParameterId>,
    /// The rows used.
    pub rows: Range<usize>,
    /// What an adapter adds to the matrix.
    pub low_rank: Option<LowRank>,
}

/// What an adapter adds to a matrix `[out, in]`: `scale * B A` (LoRA, arXiv:2106.09685).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRank {
    /// `A`, `[rank, in]`.
    pub a: ParameterId,
    /// `B`, `[out, rank]`.
    pub b: ParameterId,
    /// The factor of the product.
    pub scale: f32,
    /// Probability that training drops an element of the input of `A`.
    pub dropout: f32,
}

/// A norm's parameters, each `[width]`.
#[derive(Debug, Clone)]
pub struct NormParameters {
    /// Factor.
    pub weight: ParameterId,
    /// Summand, for LayerNorm.
    pub bias: Option<ParameterId>,
}

/// The feed-forward network: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))`.
#[derive(Debug, Clone)]
pub struct FeedForward {
    /// `[feed_forward_width, width]`, for gated networks.
    pub gate: Option<Projection>,
    /// `[feed_forward_width, width]`.
    pub up: Projection,
    /// `[width, feed_forward_width]`.
    pub down: Projection,
}

/// The query, key and value projections.
#[derive(Debug, Clone)]
pub enum QueryKeyValue {
    /// One after the other, in this order.
    Separate([Projection; 3]),
    /// One, whose output is `[heads, 3, head_dim]`: each head's query, key and value.
    PerHead(Projection),
}

impl QueryKeyValue {
    /// All of them.
    pub fn projections(&self) -> &[Projection] {
        match self {
            Self::Separate(projections) => projections,
            Self::PerHead(projection) => std::slice::from_ref(projection),
        }
    }

    fn projections_mut(&mut self) -> &mut [Projection] {
        match self {
            Self::Separate(projections) => projections,
            Self::PerHead(projection) => std::slice::from_mut(projection),
        }
    }
}

/// The router and the further networks of a layer with experts. The experts' own matrices are the [`FeedForward`]: `gate`
/// and `up` are one parameter with the rows of each expert's gate before those of its up projection.
#[derive(Debug, Clone)]
pub struct ExpertLayer {
    /// `[experts, width]`: the scores of the experts.
    pub router: Projection,
    /// `[2, experts]`: biases, and 1 for the experts that are enabled.
    pub switches: ParameterId,
    /// The network of every token.
    pub shared: Option<FeedForward>,
    /// `[1, width]`: the sigmoid of this map is the factor of the shared network's output.
    pub shared_gate: Option<Projection>,
}

/// One layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Norm before attention.
    pub attention_norm: NormParameters,
    /// Query, key and value projections.
    pub query_key_value: QueryKeyValue,
    /// The attention's output projection.
    pub attention_output: Projection,
    /// Norm before the feed-forward network; the same as that before attention where they share it.
    pub feed_forward_norm: NormParameters,
    /// Norms of queries and keys before their rotation.
    pub query_key_norm: Option<[NormParameters; 2]>,
    /// The feed-forward network, or the experts' networks together.
    pub feed_forward: FeedForward,
    /// What routes to the experts, where there are some.
    pub experts: Option<ExpertLayer>,
}

impl Layer {
    /// All projections of the layer, to be changed.
    pub(super) fn projections_mut(&mut self) -> impl Iterator<Item = &mut Projection> {
        let shared = self.experts.as_mut().and_then(|experts| experts.shared.as_mut());
        let networks = [&mut self.feed_forward].into_iter().chain(shared);
        let of_networks = networks.flat_map(|FeedForward { gate, up, down }| gate.iter_mut().chain([up, down]));
        let attention = self.query_key_value.projections_mut().iter_mut();
        attention.chain([&mut self.attention_output]).chain(of_networks)
    }
}

/// Which parameters each part of the decoder uses.
#[derive(Debug, Clone)]
pub struct Layout {
    /// `[vocabulary, width]`.
    pub token_embedding: ParameterId,
    /// `[context_length, width]`, for learned positions.
    pub position_embedding: Option<ParameterId>,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// Norm before the head.
    pub final_norm: NormParameters,
    /// The head `[vocabulary, width]`: the token embedding itself when tied.
    pub head: Projection,
}

/// The parameters of a configuration in transformers' order, and their use.
pub(super) fn lay_out(config: &DecoderConfig) -> (Vec<ParameterInfo>, Layout) {
    let names = names(config.architecture);
    let mut list = ParameterList {
        config,
        names,
        parameters: Vec::new(),
    };
    let (vocabulary, width) = (config.vocabulary, config.width);
    let embedding = format!("{}.weight", names.token_embedding);
    let token_embedding = list.push(embedding, vec![vocabulary, width], ParameterRole::Embedding);
    let position_embedding = (config.position == Position::Learned).then(|| {
        let positions = format!("{}.weight", names.position_embedding);
        list.push(positions, vec![config.context_length, width], ParameterRole::Positions)
    });
    let mut layers: Vec<Layer> = Vec::with_capacity(config.layers);
    for layer in 0..config.layers {
        let first = config.first_of_group(layer);
        let parameters = match layers.get(first) {
            Some(shared) => shared.clone(),
            None => list.push_layer(layer),
        };
        layers.push(parameters);
    }
    let final_norm = list.push_norm(names.final_norm);
    let head = match config.tied_head {
        true => token_embedding,
        false => list.push(
            format!("{}.weight", names.head),
            vec![vocabulary, width],
            ParameterRole::Embedding,
        ),
    };
    let bias = config.head_bias.then(|| {
        let name = format!("{}.bias", names.head);
        list.push(name, vec![vocabulary], ParameterRole::Bias)
    });
    let head = Projection {
        weight: head,
        bias,
        rows: 0..vocabulary,
        low_rank: None,
    };
    (
        list.parameters,
        Layout {
            token_embedding,
            position_embedding,
            layers,
            final_norm,
            head,
        },
    )
}

/// The names that transformers, where no layers share, gives to parameters besides their own, each with the shared
/// parameter.
pub(super) fn shared_names(config: &DecoderConfig, parameters: &[ParameterInfo]) -> Vec<(String, ParameterId)> {
    let layer_name = names(config.architecture).layer;
    let sharing = (0..config.layers).map(|layer| (layer, config.first_of_group(layer)));
    let mut shared = vec![];
    for (layer, first) in sharing.filter(|(layer, first)| layer != first) {
        let prefix = format!("{layer_name}.{first}.");
        for (index, parameter) in parameters.iter().enumerate() {
            if let Some(name) = parameter.name.strip_prefix(&prefix) {
                shared.push((format!("{layer_name}.{layer}.{name}"), ParameterId(index)));
            }
        }
    }
    shared
}

struct ParameterList<'a> {
    config: &'a DecoderConfig,
    names: &'static Names,
    parameters: Vec<ParameterInfo>,
}

impl ParameterList<'_> {
    fn push(&mut self, name: String, shape: Vec<usize>, role: ParameterRole) -> ParameterId {
        let transposed = false;
        self.parameters.push(ParameterInfo {
            name,
            shape,
            transposed,
            role,
            dtype: "f32",
            trainable: true,
        });
        ParameterId(self.parameters.len() - 1)
    }

    fn push_norm(&mut self, name: &str) -> NormParameters {
        self.push_norm_of(name, self.config.width)
    }

    fn push_norm_of(&mut self, name: &str, width: usize) -> NormParameters {
        let shape = vec![width];
        let weight = self.push(format!("{name}.weight"), shape.clone(), ParameterRole::NormWeight);
        let bias = self.config.norm == Norm::Layer;
        let bias = bias.then(|| self.push(format!("{name}.bias"), shape, ParameterRole::Bias));
        NormParameters { weight, bias }
    }

    /// A matrix of `outputs` rows over `inputs`, with a bias or without.
    fn push_matrix(&mut self, name: &str, sizes: [usize; 2], role: ParameterRole, bias: bool) -> Projection {
        let [outputs, inputs] = sizes;
        let transposed = self.names.transposed;
        let shape = if transposed {
            vec![inputs, outputs]
        } else {
            vec![outputs, inputs]
        };
        let weight = self.push(format!("{name}.weight"), shape, role);
        self.parameters[weight.0].transposed = transposed;
        let bias = bias.then(|| self.push(format!("{name}.bias"), vec![outputs], ParameterRole::Bias));
        Projection {
            weight,
            bias,
            rows: 0..outputs,
            low_rank: None,
        }
    }

    fn push_query_key_value(&mut self, prefix: &str) -> QueryKeyValue {
        let config = self.config;
        let (width, query, key) = (config.width, config.query_width(), config.key_value_width());
        let (role, bias) = (ParameterRole::Matrix, config.attention_bias);
        match &self.names.query_key_value {
            QueryKeyValueNames::Fused(name) => {
                let all = self.push_matrix(&format!("{prefix}.{name}"), [query + 2 * key, width], role, bias);
                let rows = [0..query, query..query + key, query + key..query + 2 * key];
                QueryKeyValue::Separate(rows.map(|rows| Projection { rows, ..all.clone() }))
            }
            QueryKeyValueNames::PerHead(name) => {
                let sizes = [query + 2 * key, width];
                QueryKeyValue::PerHead(self.push_matrix(&format!("{prefix}.{name}"), sizes, role, bias))
            }
            QueryKeyValueNames::Separate(names) => {
                let mut push = |index: usize, rows: usize| {
                    self.push_matrix(&format!("{prefix}.{}", names[index]), [rows, width], role, bias)
                };
                QueryKeyValue::Separate([push(0, query), push(1, key), push(2, key)])
            }
        }
    }

    fn push_layer(&mut self, layer: usize) -> Layer {
        let (config, names) = (self.config, self.names);
        let prefix = format!("{}.{layer}", names.layer);
        let (width, inner) = (config.width, config.feed_forward_width);
        let (into, residual) = (ParameterRole::Matrix, ParameterRole::ResidualMatrix);
        let attention_norm = self.push_norm(&format!("{prefix}.{}", names.attention_norm));
        let query_key_value = self.push_query_key_value(&prefix);
        let name = format!("{prefix}.{}", names.attention_output);
        let sizes = [width, config.query_width()];
        let attention_output = self.push_matrix(&name, sizes, residual, config.attention_output_bias);
        let query_key_norm = config.query_key_norm.then(|| {
            let widths = [("q_norm", config.query_width()), ("k_norm", config.key_value_width())];
            widths.map(|(name, width)| self.push_norm_of(&format!("{prefix}.self_attn.{name}"), width))
        });
        let feed_forward_norm = match config.residual {
            Residual::ParallelSharedNorm => attention_norm.clone(),
            Residual::Sequential | Residual::Parallel => {
                self.push_norm(&format!("{prefix}.{}", names.feed_forward_norm))
            }
        };
        let mut push = |name: &str, sizes: [usize; 2], role: ParameterRole| {
            self.push_matrix(&format!("{prefix}.{name}"), sizes, role, config.feed_forward_bias)
        };
        let (feed_forward, experts) = match &config.experts {
            Some(experts) => {
                let (feed_forward, experts) = self.push_experts(&format!("{prefix}.mlp"), experts);
                (feed_forward, Some(experts))
            }
            None => {
                let gate = config.gated.then(|| push(names.gate, [inner, width], into));
                let up = push(names.up, [inner, width], into);
                let down = push(names.down, [width, inner], residual);
                (FeedForward { gate, up, down }, None)
            }
        };
        Layer {
            attention_norm,
            query_key_value,
            attention_output,
            feed_forward_norm,
            query_key_norm,
            feed_forward,
            experts,
        }
    }

    /// The experts of a layer, as transformers names and orders their parameters.
    fn push_experts(&mut self, prefix: &str, experts: &ExpertsConfig) -> (FeedForward, ExpertLayer) {
        let (width, inner) = (self.config.width, self.config.feed_forward_width);
        let router = self.push_matrix(
            &format!("{prefix}.gate"),
            [experts.experts, width],
            ParameterRole::Router,
            false,
        );
        let switches = self.push(
            format!("{prefix}.gate.switches"),
            vec![2, experts.experts],
            ParameterRole::Switches,
        );
        self.parameters[switches.0].trainable = false;
        let mut push = |name: &str, [rows, columns]: [usize; 2], role| Projection {
            weight: self.push(
                format!("{prefix}.experts.{name}"),
                vec![experts.experts, rows, columns],
                role,
            ),
            bias: None,
            rows: 0..experts.experts * rows,
            low_rank: None,
        };
        let up = push("gate_up_proj", [2 * inner, width], ParameterRole::Matrix);
        let down = push("down_proj", [width, inner], ParameterRole::ResidualMatrix);
        let feed_forward = FeedForward {
            gate: Some(up.clone()),
            up,
            down,
        };
        let prefix = format!("{prefix}.shared_expert");
        let shared = (experts.shared_width > 0).then(|| {
            let inner = experts.shared_width;
            let (into, residual) = (ParameterRole::Matrix, ParameterRole::ResidualMatrix);
            FeedForward {
                gate: Some(self.push_matrix(&format!("{prefix}.gate_proj"), [inner, width], into, false)),
                up: self.push_matrix(&format!("{prefix}.up_proj"), [inner, width], into, false),
                down: self.push_matrix(&format!("{prefix}.down_proj"), [width, inner], residual, false),
            }
        });
        let shared_gate = experts
            .shared_gate
            .then(|| self.push_matrix(&format!("{prefix}_gate"), [1, width], ParameterRole::Router, false));
        let experts = ExpertLayer {
            router,
            switches,
            shared,
            shared_gate,
        };
        (feed_forward, experts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_settings;
    use serde_json::{Value, json};

    fn parameters(settings: Value) -> (DecoderConfig, Vec<ParameterInfo>) {
        let config = from_settings(settings.as_object().unwrap(), None).unwrap();
        let (parameters, _) = lay_out(&config);
        (config, parameters)
    }

    #[test]
    fn the_list_has_as_many_elements_as_the_configuration_counts() {
        for settings in [
            json!({"architecture": "gpt2", "layers": 3, "width": 24, "heads": 4, "context_length": 10, "vocabulary": 33}),
            json!({"architecture": "llama", "layers": 2, "width": 24, "heads": 6, "key_value_heads": 2, "head_dim": 8,
                "context_length": 10, "vocabulary": 33, "tied_head": false, "attention_bias": true,
                "feed_forward_bias": true}),
            json!({"architecture": "qwen2", "layers": 2, "width": 24, "heads": 6, "context_length": 10,
                "vocabulary": 33}),
            json!({"architecture": "gpt_neox", "layers": 2, "width": 21, "heads": 3, "context_length": 10,
                "vocabulary": 33, "attention_bias": false, "tied_head": false}),
            json!({"architecture": "gptj", "layers": 2, "width": 18, "heads": 3, "context_length": 10,
                "vocabulary": 33, "rotary_dim": 4}),
            json!({"architecture": "gptj", "layers": 3, "width": 18, "heads": 3, "context_length": 10,
                "vocabulary": 33, "tied_head": false, "share": "all"}),
            json!({"architecture": "olmoe", "layers": 2, "width": 24, "heads": 6, "key_value_heads": 2,
                "context_length": 10, "vocabulary": 33, "num_experts": 3, "num_experts_per_tok": 2}),
            json!({"architecture": "qwen2_moe", "layers": 2, "width": 24, "heads": 6, "context_length": 10,
                "vocabulary": 33, "num_experts": 5, "shared_expert_intermediate_size": 7}),
            json!({"architecture": "llama", "layers": 5, "width": 24, "heads": 6, "context_length": 10,
                "vocabulary": 33, "share": 2}),
        ] {
            let (config, parameters) = parameters(settings);
            let listed = parameters.iter().filter(|info| info.is_listed());
            let elements: usize = listed.map(ParameterInfo::elements).sum();
            assert_eq!(elements as u64, config.parameter_count());
        }
    }

    #[test]
    fn layers_of_a_group_have_their_parameters_in_common() {
        let shared = |share: Value| {
            let (config, parameters) = parameters(json!({"architecture": "gpt2", "layers": 5, "width": 8, "heads": 2,
                "context_length": 4, "vocabulary": 9, "share": share}));
            let norms: Vec<_> = lay_out(&config)
                .1
                .layers
                .iter()
                .map(|layer| layer.attention_norm.weight)
                .collect();
            let names = shared_names(&config, &parameters);
            let norm_names: Vec<_> = norms.iter().map(|id| parameters[id.0].name.clone()).collect();
            let extra: Vec<_> = names
                .iter()
                .filter(|(name, _)| name.ends_with("ln_1.weight"))
                .cloned()
                .collect();
            (
                norm_names,
                extra
                    .into_iter()
                    .map(|(name, id)| (name, parameters[id.0].name.clone()))
                    .collect::<Vec<_>>(),
            )
        };
        let name = |layer: usize| format!("transformer.h.{layer}.ln_1.weight");
        let expected = |firsts: [usize; 5]| {
            let extra = firsts.iter().enumerate().filter(|(layer, first)| layer != *first);
            (
                firsts.map(name).to_vec(),
                extra
                    .map(|(layer, first)| (name(layer), name(*first)))
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(shared(json!("none")), expected([0, 1, 2, 3, 4]));
        assert_eq!(shared(json!(4)), expected([0, 0, 2, 3, 4]));
        assert_eq!(shared(json!(2)), expected([0, 0, 0, 3, 3]));
        assert_eq!(shared(json!("all")), expected([0, 0, 0, 0, 0]));
    }

    #[test]
    fn gpt2_carries_transformers_names_and_shapes() {
        let (_, parameters) = parameters(
            json!({"architecture": "gpt2", "layers": 1, "width": 24, "heads": 4, "context_length": 10, "vocabulary": 33}),
        );
        let fused = parameters
            .iter()
            .find(|info| info.name == "transformer.h.0.attn.c_attn.weight")
            .unwrap();
        assert_eq!((fused.shape.clone(), fused.held_shape()), (vec![24, 72], vec![72, 24]));
    }
}
