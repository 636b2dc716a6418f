//! A Hugging Face directory: `config.json`, safetensors whole or in shards, tokenizer files, chat template.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::files::{invalid, read_json, read_text};
use super::safetensors::SafetensorsFile;
use super::source::{Orientation, StoredTensor, TensorData, TensorSource, TextAssets};
use crate::chat_template::ChatTemplate;
use crate::config::Architecture;
use crate::decoder::name_of_stored;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Most shards of a model.
const MAX_SHARDS: usize = 4096;

/// An open Hugging Face directory; all headers have been read and checked.
#[derive(Debug)]
pub struct HuggingFaceModel {
    directory: PathBuf,
    config: Map<String, Value>,
    shards: Vec<SafetensorsFile>,
    /// Name to shard, and the name within it.
    tensors: BTreeMap<String, (usize, String)>,
}

/// Opens a directory and checks configuration, index and the headers of all shards.
///
/// # Errors
/// `NotFound` if there is no such directory; `InvalidFile` for a missing or damaged file; `Unsupported` for weights that
/// are not safetensors in f32, f16 or bf16.
pub fn open_hugging_face(directory: &Path) -> Result<HuggingFaceModel> {
    if !directory.is_dir() {
        return Err(Error::NotFound(format!(
            "there is no directory {}",
            directory.display()
        )));
    }
    let config = read_object(&directory.join("config.json"))?.ok_or_else(|| {
        invalid(
            directory,
            "config.json is missing: this is no Hugging Face model directory",
        )
    })?;
    let shards = open_shards(directory)?;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let mut tensors = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        for (stored, entry) in &shard.entries {
            if is_buffer(stored) {
                continue;
            }
            entry.float_dtype(&shard.path, stored)?;
            let name = transformers_name(model_type, stored);
            if tensors.insert(name.clone(), (index, stored.clone())).is_some() {
                return Err(invalid(
                    &shard.path,
                    format!("tensor {name} is there twice, here and in another shard or name"),
                ));
            }
        }
    }
    Ok(HuggingFaceModel {
        directory: directory.to_owned(),
        config,
        shards,
        tensors,
    })
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    match read_json(path)? {
        None => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(invalid(path, "it is not a JSON object")),
    }
}

fn open_shards(directory: &Path) -> Result<Vec<SafetensorsFile>> {
    let single = directory.join(WEIGHTS);
    if single.exists() {
        return Ok(vec![SafetensorsFile::open(&single)?]);
    }
    let index_path = directory.join(INDEX);
    let Some(index) = read_object(&index_path)? else {
        if directory.join("pytorch_model.bin").exists() || directory.join("pytorch_model.bin.index.json").exists() {
            let directory = directory.display();
            return Err(Error::Unsupported(format!(
                "{directory} has its weights in pytorch_model.bin; save them as safetensors"
            )));
        }
        return Err(invalid(directory, format!("neither {WEIGHTS} nor {INDEX} is there")));
    };
    let Some(Value::Object(weight_map)) = index.get("weight_map") else {
        return Err(invalid(&index_path, "weight_map is missing or no object"));
    };
    let mut files = BTreeSet::new();
    for (tensor, file) in weight_map {
        let file = file
            .as_str()
            .ok_or_else(|| invalid(&index_path, format!("the shard of {tensor} is no text")))?;
        check_shard_name(&index_path, tensor, file)?;
        files.insert(file);
    }
    if files.len() > MAX_SHARDS {
        return Err(invalid(
            &index_path,
            format!("it names {} shards; at most {MAX_SHARDS} are read", files.len()),
        ));
    }
    let shards: BTreeMap<&str, SafetensorsFile> = files
        .into_iter()
        .map(|file| match SafetensorsFile::open(&directory.join(file)) {
            Err(Error::NotFound(_)) => Err(invalid(&index_path, format!("shard {file} is missing"))),
            opened => Ok((file, opened?)),
        })
        .collect::<Result<_>>()?;
    for (tensor, file) in weight_map {
        let shard = file.as_str().and_then(|file| shards.get(file));
        if !shard.is_some_and(|shard| shard.entries.contains_key(tensor)) {
            return Err(invalid(
                &index_path,
                format!("tensor {tensor} is not in its shard {file}"),
            ));
        }
    }
    Ok(shards.into_values().collect())
}

/// A shard is a file of the directory itself: no path leads out of it.
fn check_shard_name(index_path: &Path, tensor: &str, file: &str) -> Result<()> {
    let mut components = Path::new(file).components();
    let plain = matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    );
    if plain && !file.contains(['\\', '\0']) && !file.ends_with('/') {
        return Ok(());
    }
    let shown: String = file.chars().take(200).collect();
    Err(invalid(
        index_path,
        format!("the shard of {tensor} is {shown:?}, which is not the name of a file in this directory"),
    ))
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

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Tokenizer, chat template and end tokens.
    ///
    /// # Errors
    /// `InvalidFile` or `Unsupported` for a tokenizer or template that cannot be used.
    pub fn text_assets(&self) -> Result<TextAssets> {
        let tokenizer = Tokenizer::from_files(&self.directory)?.map(Arc::new);
        let tokenizer_config = read_object(&self.directory.join("tokenizer_config.json"))?.unwrap_or_default();
        let template = match read_text(&self.directory.join("chat_template.jinja"))? {
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
                let path = self.directory.join("tokenizer_config.json");
                Err(invalid(
                    &path,
                    "chat_template is neither a text nor a list of named ones",
                ))
            }
        }
    }

    /// `eos_token_id`, a number or a list, of generation_config.json, else of config.json.
    fn end_tokens(&self) -> Result<Vec<u32>> {
        let path = self.directory.join("generation_config.json");
        let generation = read_object(&path)?.unwrap_or_default();
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
            of(&self.config, &self.directory.join("config.json"))
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
        &self.directory
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        let (shard, stored) = self.tensors.get(name)?;
        self.shards
            .get(*shard)?
            .entries
            .get(stored)
            .map(|entry| entry.shape.as_slice())
    }

    fn orientation(&self) -> Orientation {
        Orientation::AsTransformers
    }

    fn bytes(&self, name: &str) -> u64 {
        let entry = self
            .tensors
            .get(name)
            .and_then(|(shard, stored)| self.shards.get(*shard)?.entries.get(stored));
        entry.map_or(0, super::safetensors::Entry::bytes)
    }

    fn load(&self, name: &str) -> Result<StoredTensor> {
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", self.directory.display()));
        let (shard, stored) = self.tensors.get(name).ok_or_else(missing)?;
        let tensor = self.shards.get(*shard).ok_or_else(missing)?.load(stored)?;
        Ok(StoredTensor {
            data: TensorData::Dense(tensor),
            orientation: Orientation::AsTransformers,
        })
    }
}
