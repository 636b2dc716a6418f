//! A model: a decoder with its tokenizer, chat template and configuration, loaded from files or made from nothing.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use serde_json::{Map, Value};

use crate::attention_layouts;
use crate::chat_template::ChatTemplate;
use crate::config::{self, DecoderConfig, GgufTensorFacts, TRAINING_FIELDS};
use crate::decoder::{Decoder, WeightType, load_decoder};
use crate::error::{Error, Result};
use crate::formats::{GgufModel, TensorData, TensorSource};
use crate::opened::OpenedModel;
use crate::tokenizer::Tokenizer;

/// How a model is loaded or made.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Type of the matrices: `f32`, `bf16`, `f16`, `q8_0`, `q4_0`, `q4_k`. Default: as stored; f32 for a model made from
    /// nothing.
    pub dtype: Option<String>,
    /// Where the model computes. Default: the CPU.
    pub device: Device,
    /// Seed of the initial weights of a model made from nothing. Default 0.
    pub seed: u64,
    /// `models.config`: the shape of a model made from nothing, or settings that override a file's; training settings.
    pub config: Map<String, Value>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            device: Device::Cpu,
            seed: 0,
            config: Map::new(),
        }
    }
}

/// A decoder with what surrounds it.
#[derive(Debug)]
pub struct Model {
    /// The network.
    pub decoder: Decoder,
    /// Its tokenizer; absent for models of bare token ids.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Its chat template; absent for base models.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// Tokens that end a generation.
    pub end_tokens: Vec<u32>,
    /// The whole configuration as `models.config` shows it: a JSON object of shape and training settings.
    pub config: Value,
}

/// Fields of a file's configuration that `models.config` may override; what they contradict in the weights is found
/// when the tensors' shapes are checked. Layers that are made to share take the parameters of the first of their group.
const OVERRIDABLE: &[&str] = &[
    "context_length",
    "rope_theta",
    "rope_scaling",
    "norm_epsilon",
    "activation",
    "share",
    "attention_window",
    "attention_pattern",
    "attention_block_size",
    "attention_bias",
    "attention_output_bias",
    "feed_forward_bias",
    "rotary_pct",
    "expert_servers",
];

impl Model {
    /// Loads a Hugging Face directory, a GGUF file, or another file of weights with its configuration.
    ///
    /// Fails with [`Error::NotFound`] when there is no such file, [`Error::InvalidFile`] for damaged files and for
    /// weights that contradict the configuration, [`Error::InvalidConfig`] for impossible configurations and overrides,
    /// [`Error::Unsupported`] for unknown architectures, [`Error::ResourceExhausted`] when the memory is too small.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self> {
        let OpenedModel {
            config: stored,
            files,
            text,
            ..
        } = OpenedModel::open(path)?;
        let (decoder_config, mut settings) = override_settings(&stored, &options.config)?;
        if stored.experts.is_some()
            && let Some(balance_loss) = files.balance_loss()?
        {
            settings.entry("router_aux_loss_coef").or_insert(balance_loss.into());
        }
        if let Some(tokenizer) = &text.tokenizer {
            check_tokenizer(&decoder_config, tokenizer)?;
        }
        let mut decoder = load_decoder(
            decoder_config,
            files.source(),
            &options.device,
            requested_type(options)?,
        )?;
        if let Some(layouts) = files.document(attention_layouts::FILE_NAME)? {
            decoder.load_attention_layouts(path, &layouts)?;
        }
        let end_tokens = text
            .end_tokens
            .into_iter()
            .filter(|id| (*id as usize) < decoder.config().vocabulary);
        Ok(Self {
            tokenizer: text.tokenizer,
            chat_template: text.chat_template,
            end_tokens: end_tokens.collect(),
            config: Value::Object(settings),
            decoder,
        })
    }

    /// Makes a model from `options.config` with seeded initial weights. The tokenizer's end-of-text token ends its
    /// generations.
    ///
    /// Fails with [`Error::InvalidConfig`] naming the field, or [`Error::ResourceExhausted`].
    pub fn create(options: &LoadOptions, tokenizer: Option<Arc<Tokenizer>>) -> Result<Self> {
        let tokenizer_size = tokenizer.as_ref().map(|tokenizer| tokenizer.vocabulary_size());
        let decoder_config = config::from_settings(&options.config, tokenizer_size)?;
        let mut settings = config::to_settings(&decoder_config);
        for (field, value) in config::normalize_settings(&options.config)? {
            settings.entry(field).or_insert(value);
        }
        let decoder = Decoder::initialize(decoder_config, &options.device, requested_type(options)?, options.seed)?;
        let end_of_text = tokenizer
            .as_ref()
            .and_then(|tokenizer| tokenizer.token_id(crate::tokenizer::END_OF_TEXT));
        Ok(Self {
            decoder,
            tokenizer,
            chat_template: None,
            end_tokens: end_of_text.into_iter().collect(),
            config: Value::Object(settings),
        })
    }
}

fn requested_type(options: &LoadOptions) -> Result<Option<WeightType>> {
    options.dtype.as_deref().map(WeightType::from_name).transpose()
}

/// A file's configuration with the overrides applied, and the settings to show.
fn override_settings(
    stored: &DecoderConfig,
    overrides: &Map<String, Value>,
) -> Result<(DecoderConfig, Map<String, Value>)> {
    let mut settings = config::to_settings(stored);
    for (field, value) in config::normalize_settings(overrides)? {
        let shape_field = !TRAINING_FIELDS.contains(&field.as_str()) && field != "tokenizer";
        let given = settings.insert(field.clone(), value.clone());
        if !shape_field || OVERRIDABLE.contains(&field.as_str()) {
            continue;
        }
        let same = |before: &Value| *before == value || before.as_f64().is_some_and(|b| Some(b) == value.as_f64());
        if !given.as_ref().is_some_and(same) {
            let file = given.map_or_else(|| "nothing".to_owned(), |before| before.to_string());
            return Err(Error::invalid_config(
                field,
                format!("{value} contradicts the model's files, which say {file}"),
            ));
        }
    }
    let merged = config::from_settings(&settings, None)?;
    if merged.context_length > stored.context_length && merged.position == stored.position {
        let reason = format!(
            "{} is longer than the model's {}",
            merged.context_length, stored.context_length
        );
        return Err(Error::invalid_config("context_length", reason));
    }
    let mut shown = config::to_settings(&merged);
    for (field, value) in settings {
        shown.entry(field).or_insert(value);
    }
    Ok((merged, shown))
}

/// Refuses a tokenizer whose tokens have no row in the embedding.
fn check_tokenizer(config: &DecoderConfig, tokenizer: &Tokenizer) -> Result<()> {
    match tokenizer.vocabulary_size() {
        size if size > config.vocabulary => {
            let reason = format!("{} is less than the tokenizer's {size} tokens", config.vocabulary);
            Err(Error::invalid_config("vocabulary", reason))
        }
        _ => Ok(()),
    }
}

/// The embedding of tokens in each of the families, and the head.
const EMBEDDINGS: [&str; 3] = [
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
];
const HEAD: &str = "lm_head.weight";

/// What of the configuration a GGUF file tells by which tensors it holds. Names are transformers' already.
pub(crate) fn gguf_tensor_facts(source: &GgufModel) -> Result<GgufTensorFacts> {
    let missing = || Error::invalid_file(source.path(), "tensor `token_embd.weight` is missing or no matrix");
    let embedding = EMBEDDINGS
        .into_iter()
        .find(|name| source.shape(name).is_some())
        .ok_or_else(missing)?;
    let [vocabulary, _] = *source.shape(embedding).unwrap_or_default() else {
        return Err(missing());
    };
    let layer_has = |names: [&str; 2]| {
        let [llama, neox] = names;
        source.shape(&format!("model.layers.0.{llama}")).is_some()
            || source.shape(&format!("gpt_neox.layers.0.{neox}")).is_some()
    };
    Ok(GgufTensorFacts {
        vocabulary,
        untied_head: has_own_head(source)?,
        attention_bias: layer_has(["self_attn.q_proj.bias", "attention.query_key_value.bias"]),
        attention_output_bias: layer_has(["self_attn.o_proj.bias", "attention.dense.bias"]),
        feed_forward_bias: layer_has(["mlp.up_proj.bias", "mlp.dense_h_to_4h.bias"]),
        rotary_factors: rotary_factors(source)?,
    })
}

/// Whether a source holds a head that is not the embedding of tokens: converters store a tied head a second time.
pub(crate) fn has_own_head(source: &dyn TensorSource) -> Result<bool> {
    let embedding = EMBEDDINGS.into_iter().find(|name| source.shape(name).is_some());
    match embedding {
        Some(embedding) if source.shape(HEAD).is_some() => Ok(!same_values(source, embedding, HEAD)?),
        _ => Ok(false),
    }
}

/// Whether two tensors hold the same values in the same type.
fn same_values(source: &dyn TensorSource, first: &str, second: &str) -> Result<bool> {
    if source.bytes(first) != source.bytes(second) || source.shape(first) != source.shape(second) {
        return Ok(false);
    }
    match (source.load(first)?.data, source.load(second)?.data) {
        (TensorData::Quantized(first), TensorData::Quantized(second)) => {
            Ok(first.dtype() == second.dtype() && first.data()? == second.data()?)
        }
        (TensorData::Dense(first), TensorData::Dense(second)) => Ok(first.dtype() == second.dtype()
            && first.ne(&second)?.to_dtype(DType::F32)?.max_all()?.to_scalar::<f32>()? == 0.0),
        _ => Ok(false),
    }
}

fn rotary_factors(source: &GgufModel) -> Result<Option<Vec<f32>>> {
    const NAME: &str = "rope_freqs.weight";
    if source.shape(NAME).is_none() {
        return Ok(None);
    }
    match source.load(NAME)?.data {
        TensorData::Dense(factors) => Ok(Some(factors.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)),
        TensorData::Quantized(_) => Err(Error::invalid_file(
            source.path(),
            format!("tensor `{NAME}` is quantised"),
        )),
    }
}
