//! A Hugging Face directory: `config.json`, weights, tokenizer files, chat template; or a file of weights that has them
//! beside it, or within.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::documents::Documents;
use super::files::invalid;
use super::locating::{carrier, open_directory, open_file};
use super::source::{Orientation, StoredTensor, TensorData, TensorSource, TextAssets};
use super::values::FloatType;
use super::weight_file::{StoredType, TensorInfo, WeightFile};
use crate::chat_template::ChatTemplate;
use crate::config::Architecture;
use crate::decoder::{WeightType, name_of_stored};
use crate::error::{Error, Result};

/// Open weights with their documents; all headers have been read and checked.
#[derive(Debug)]
pub struct HuggingFaceModel {
    path: PathBuf,
    documents: Documents,
    config: Map<String, Value>,
    files: Vec<Box<dyn WeightFile>>,
    tensors: BTreeMap<String, Located>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Located {
    file: usize,
    /// Its name there.
    stored: String,
    info: TensorInfo,
}

/// Opens a directory, or a file of weights (safetensors, manifest, `.npz`, `.bin`), and checks configuration, index and
/// the headers of all shards.
///
/// # Errors
/// `NotFound` if there is no such path; `InvalidFile` for a missing or damaged file; `Unsupported` for weights that
/// are not f32, f16 or bf16.
pub fn open_hugging_face(path: &Path) -> Result<HuggingFaceModel> {
    let (documents, files) = match path.is_dir() {
        true => open_folder(path)?,
        false => {
            let (documents, file) = open_file(path)?;
            (documents, vec![file])
        }
    };
    let config = config_of(path, &documents)?;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let mut tensors = BTreeMap::new();
    for (index, file) in files.iter().enumerate() {
        for (stored, info) in file.tensors() {
            if is_buffer(stored) {
                continue;
            }
            info.check_type(file.path(), stored)?;
            let name = transformers_name(model_type, stored);
            let located = Located {
                file: index,
                stored: stored.to_owned(),
                info,
            };
            if tensors.insert(name.clone(), located).is_some() {
                return Err(invalid(
                    file.path(),
                    format!("tensor {name} is there twice, here and in another shard or name"),
                ));
            }
        }
    }
    Ok(HuggingFaceModel {
        path: path.to_owned(),
        documents,
        config,
        files,
        tensors,
    })
}

/// The weights of a folder; without a configuration, whatever they are, they are no model.
fn open_folder(path: &Path) -> Result<(Documents, Vec<Box<dyn WeightFile>>)> {
    let documents = Documents::in_folder(path);
    match (config_of(path, &documents), carrier(path)) {
        (Err(Error::InvalidFile { .. }), Some(carrier)) if !path.join("config.json").exists() => {
            let (documents, file) = open_file(&carrier)?;
            Ok((documents, vec![file]))
        }
        (config, _) => {
            config?;
            let files = open_directory(path, &documents)?;
            Ok((documents, files))
        }
    }
}

fn config_of(path: &Path, documents: &Documents) -> Result<Map<String, Value>> {
    documents.object("config.json")?.ok_or_else(|| {
        invalid(
            path,
            "config.json is missing: this is no Hugging Face model directory, nor are these weights in one",
        )
    })
}

/// Tables that old exports carry along: GPT-2's causal masks and rotary frequencies. They are no weights.
fn is_buffer(name: &str) -> bool {
    [
        ".attn.bias",
        ".attn.masked_bias",
        ".attention.bias",
        ".attention.masked_bias",
        ".rotary_emb.inv_freq",
    ]
    .iter()
    .any(|buffer| name.ends_with(buffer))
}

/// What transformers calls a stored tensor: base models are saved without the head's prefix, `wte.weight` for
/// `transformer.wte.weight`, and GPT-NeoX's head under its former name.
fn transformers_name(model_type: &str, name: &str) -> String {
    let starts = |parts: &[&str]| parts.iter().any(|part| name.starts_with(part));
    if model_type == Architecture::GptNeox.name() {
        return match starts(&["embed_in.", "layers.", "final_layer_norm."]) {
            true => format!("gpt_neox.{name}"),
            false => name_of_stored(model_type, name),
        };
    }
    if starts(&["wte.", "wpe.", "h.", "ln_f."]) {
        format!("transformer.{name}")
    } else if starts(&["embed_tokens.", "layers.", "norm."]) {
        format!("model.{name}")
    } else {
        name.to_owned()
    }
}

impl HuggingFaceModel {
    /// `config.json`.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// A document that belongs to the weights, such as `tokenizer_config.json`; `None` if it is absent.
    ///
    /// # Errors
    /// `InvalidFile` if it is too long or not UTF-8.
    pub fn document(&self, name: &str) -> Result<Option<String>> {
        self.documents.text(name)
    }

    /// Tokenizer, chat template and end tokens.
    ///
    /// # Errors
    /// `InvalidFile` or `Unsupported` for a tokenizer or template that cannot be used.
    pub fn text_assets(&self) -> Result<TextAssets> {
        let tokenizer = self.documents.tokenizer()?.map(Arc::new);
        let tokenizer_config = self.documents.object("tokenizer_config.json")?.unwrap_or_default();
        let template = match self.documents.text("chat_template.jinja")? {
            Some(source) => Some(source),
            None => self.template_of(&tokenizer_config)?,
        };
        let chat_template = match template {
            Some(source) => {
                let bos = special_token(&tokenizer_config, "bos_token");
                let eos = special_token(&tokenizer_config, "eos_token");
                Some(Arc::new(ChatTemplate::new(&source, bos, eos)?))
            }
            None => None,
        };
        let mut end_tokens = self.end_tokens()?;
        if let (true, Some(tokenizer)) = (end_tokens.is_empty(), &tokenizer) {
            end_tokens.extend(special_token(&tokenizer_config, "eos_token").and_then(|eos| tokenizer.token_id(eos)));
        }
        Ok(TextAssets {
            tokenizer,
            chat_template,
            end_tokens,
        })
    }

    /// `chat_template` of tokenizer_config.json: a text, or a list of named ones of which `default` is taken.
    fn template_of(&self, tokenizer_config: &Map<String, Value>) -> Result<Option<String>> {
        match tokenizer_config.get("chat_template") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(source)) => Ok(Some(source.clone())),
            Some(Value::Array(templates)) => {
                let text = |template: &Value, key: &str| template.get(key).and_then(Value::as_str).map(str::to_owned);
                let default = templates
                    .iter()
                    .find(|template| text(template, "name").as_deref() == Some("default"));
                Ok(default.and_then(|template| text(template, "template")))
            }
            Some(_) => {
                let path = self.documents.path("tokenizer_config.json");
                Err(invalid(
                    &path,
                    "chat_template is neither a text nor a list of named ones",
                ))
            }
        }
    }

    /// `eos_token_id`, a number or a list, of generation_config.json, else of config.json.
    fn end_tokens(&self) -> Result<Vec<u32>> {
        let path = self.documents.path("generation_config.json");
        let generation = self.documents.object("generation_config.json")?.unwrap_or_default();
        let of = |config: &Map<String, Value>, path: &Path| -> Result<Vec<u32>> {
            let values = match config.get("eos_token_id") {
                None | Some(Value::Null) => return Ok(Vec::new()),
                Some(Value::Array(values)) => values.as_slice(),
                Some(value) => std::slice::from_ref(value),
            };
            let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            let bad = || invalid(path, "eos_token_id is neither a token id nor a list of them");
            let mut ids = values.iter().map(id).collect::<Option<Vec<_>>>().ok_or_else(bad)?;
            ids.sort_unstable();
            ids.dedup();
            Ok(ids)
        };
        let ids = of(&generation, &path)?;
        if ids.is_empty() {
            of(&self.config, &self.documents.path("config.json"))
        } else {
            Ok(ids)
        }
    }
}

/// A special token of tokenizer_config.json: a text or an object with `content`.
fn special_token<'a>(tokenizer_config: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    let value = tokenizer_config.get(key)?;
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
}

impl TensorSource for HuggingFaceModel {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|located| located.info.shape.as_slice())
    }

    fn orientation(&self) -> Orientation {
        Orientation::AsTransformers
    }

    fn bytes(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |located| located.info.bytes)
    }

    fn stored_type(&self, name: &str) -> Option<WeightType> {
        match self.tensors.get(name)?.info.dtype {
            StoredType::Float(FloatType::F16) => Some(WeightType::F16),
            StoredType::Float(FloatType::Bf16) => Some(WeightType::Bf16),
            StoredType::Float(FloatType::F32 | FloatType::F64) => Some(WeightType::F32),
            StoredType::Other(_) => None,
        }
    }

    fn load(&self, name: &str) -> Result<StoredTensor> {
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", self.path.display()));
        let located = self.tensors.get(name).ok_or_else(missing)?;
        let tensor = self
            .files
            .get(located.file)
            .ok_or_else(missing)?
            .load(&located.stored)?;
        Ok(StoredTensor {
            data: TensorData::Dense(tensor),
            orientation: Orientation::AsTransformers,
        })
    }
}
