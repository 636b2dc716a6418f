//! The documents of a Hugging Face directory: those of the source, or made from a GGUF file's metadata.

use serde_json::{Map, Value, json};

use super::plan::Conversion;
use crate::attention_layouts;
use crate::config::{self, DecoderConfig, Position, RotaryScaling};
use crate::decoder::WeightType;
use crate::error::{Error, Result};
use crate::formats::HuggingFaceModel;
use crate::opened::ModelFiles;
use crate::training::checkpoint;

/// What is copied as it is, where it is there.
const COPIED: [&str; 5] = [
    attention_layouts::FILE_NAME,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// All documents of a conversion, by name.
pub(super) fn of(conversion: &Conversion) -> Result<Vec<(String, String)>> {
    match &conversion.model.files {
        ModelFiles::HuggingFace(files) => copied(conversion, files),
        ModelFiles::Gguf(_) => made(conversion),
    }
}

fn copied(conversion: &Conversion, files: &HuggingFaceModel) -> Result<Vec<(String, String)>> {
    let config = with_type(conversion, files.config().clone());
    let mut documents = vec![("config.json".to_owned(), config)];
    for name in COPIED {
        documents.extend(files.document(name)?.map(|text| (name.to_owned(), text)));
    }
    // A vocabulary with merges becomes the one file that all formats can carry.
    let tokenizer = match files.document("tokenizer.json")? {
        Some(text) => Some(text),
        None => conversion
            .model
            .text
            .tokenizer
            .as_ref()
            .map(|tokenizer| tokenizer.to_json())
            .transpose()?,
    };
    documents.extend(tokenizer.map(|text| ("tokenizer.json".to_owned(), text)));
    Ok(documents)
}

fn made(conversion: &Conversion) -> Result<Vec<(String, String)>> {
    let (model, text) = (&conversion.model, &conversion.model.text);
    let mut documents = checkpoint::documents(
        &model.config,
        &text.end_tokens,
        text.tokenizer.as_deref(),
        text.chat_template.as_deref(),
    )?;
    for (name, text) in &mut documents {
        if name == "config.json"
            && let Ok(Value::Object(config)) = serde_json::from_str(text)
        {
            *text = with_type(conversion, described(&model.config, config)?);
        }
    }
    Ok(documents)
}

/// A configuration that says everything about the decoder, or an error.
fn described(decoder: &DecoderConfig, mut config: Map<String, Value>) -> Result<Map<String, Value>> {
    if let Position::Rotary(rotary) = &decoder.position
        && let RotaryScaling::Factors(factors) = &rotary.scaling
    {
        // Ours alone: transformers has no words for the factors of a GGUF file and refuses these.
        config.insert(
            "rope_scaling".into(),
            json!({"rope_type": "factors", "factors": factors}),
        );
    }
    match config::from_hugging_face(&config) {
        Ok(read) if rounded(&read) == rounded(decoder) => Ok(config),
        _ => Err(Error::Unsupported(
            "config.json has no words for this model's combination of biases; convert it to gguf".to_owned(),
        )),
    }
}

/// A decoder whose numbers are those of f32, in which they are computed: as text they may have lost their last bit.
fn rounded(decoder: &DecoderConfig) -> DecoderConfig {
    let mut decoder = decoder.clone();
    let round = |number: &mut f64| *number = f64::from(*number as f32);
    round(&mut decoder.norm_epsilon);
    if let Position::Rotary(rotary) = &mut decoder.position {
        round(&mut rotary.theta);
        if let RotaryScaling::Linear { factor } = &mut rotary.scaling {
            round(factor);
        }
    }
    decoder
}

/// The configuration with the type of the weights that are written.
fn with_type(conversion: &Conversion, mut config: Map<String, Value>) -> String {
    let types: Vec<WeightType> = conversion.tensors.iter().map(|tensor| tensor.dtype).collect();
    if let Some(first) = types.first().filter(|first| types.iter().all(|kind| kind == *first)) {
        let name = match first {
            WeightType::F16 => "float16",
            WeightType::Bf16 => "bfloat16",
            WeightType::F32 | WeightType::Quantized(_) => "float32",
        };
        for field in ["dtype", "torch_dtype"] {
            if config.contains_key(field) {
                config.insert(field.to_owned(), json!(name));
            }
        }
    }
    format!("{:#}\n", Value::Object(config))
}
