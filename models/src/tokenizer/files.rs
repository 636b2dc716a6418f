//! The tokenizer of a Hugging Face directory.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::models::bpe::Vocab;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, ModelWrapper};

use super::merges::bpe_builder;
use super::pre_tokenizer::Family;
use super::train::END_OF_TEXT;
use super::wrapper::Tokenizer;
use super::{sentencepiece_model, word_piece};
use crate::error::{Error, Result};
use crate::formats::{read_json, read_text};

/// Pairs of vocabulary and merges: transformers' names and those of GPT-2's first release.
const PAIRS: &[(&str, &str)] = &[("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")];
/// SentencePiece's models, as transformers' tokenizers call them.
const SENTENCEPIECE: &[&str] = &["tokenizer.model", "spiece.model"];

impl Tokenizer {
    /// Reads `tokenizer.json`, or else `vocab.json` with `merges.txt`, `encoder.json` with `vocab.bpe`, BERT's `vocab.txt`,
    /// or a SentencePiece model; `None` if the directory has none of them.
    ///
    /// # Errors
    /// `InvalidFile` naming the damaged file; `Unsupported` for a kind of tokenizer that is not served.
    pub fn from_files(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join("tokenizer.json");
        if let Some(json) = read_text(&path)? {
            return Self::from_json(&json).map(Some).map_err(|error| at_path(error, &path));
        }
        for (vocabulary, merges) in PAIRS {
            let (vocabulary_path, merges_path) = (directory.join(vocabulary), directory.join(merges));
            match (read_json(&vocabulary_path)?, read_text(&merges_path)?) {
                (Some(vocabulary), Some(merges)) => {
                    let ids = vocabulary_ids(&vocabulary_path, &vocabulary)?;
                    let merges = parse_merges(&merges_path, &merges)?;
                    return from_vocabulary(directory, &merges_path, ids, merges).map(Some);
                }
                (Some(_), None) => return Err(invalid(&merges_path, "it is missing beside the vocabulary")),
                _ => {}
            }
        }
        let path = directory.join("vocab.txt");
        if let Some(text) = read_text(&path)? {
            let config = tokenizer_config(directory)?;
            let added = added_tokens(directory, &config)?;
            return word_piece::from_vocabulary(&path, &text, &config, added).map(Some);
        }
        for name in SENTENCEPIECE {
            let path = directory.join(name);
            if path.exists() {
                return sentencepiece_model::read(&path, &tokenizer_config(directory)?).map(Some);
            }
        }
        Ok(None)
    }
}

fn invalid(path: &Path, reason: impl Into<String>) -> Error {
    Error::invalid_file(path, reason)
}

fn at_path(error: Error, path: &Path) -> Error {
    match error {
        Error::InvalidFile { reason, .. } => invalid(path, reason),
        other => other,
    }
}

fn tokenizer_config(directory: &Path) -> Result<Map<String, Value>> {
    let path = directory.join("tokenizer_config.json");
    match read_json(&path)? {
        None => Ok(Map::new()),
        Some(Value::Object(config)) => Ok(config),
        Some(_) => Err(invalid(&path, "it is not a JSON object")),
    }
}

/// An object of token to id; no id twice.
fn vocabulary_ids(path: &Path, json: &Value) -> Result<Vocab> {
    let Value::Object(object) = json else {
        return Err(invalid(path, "it is no object of tokens and ids"));
    };
    let mut by_id = HashMap::with_capacity(object.len());
    let mut ids = Vocab::with_capacity(object.len());
    for (token, id) in object {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| invalid(path, format!("the id of {token:?} is no token id")))?;
        if let Some(other) = by_id.insert(id, token) {
            return Err(invalid(path, format!("{other:?} and {token:?} have the same id {id}")));
        }
        ids.insert(token.clone(), id);
    }
    Ok(ids)
}

/// One merge per line, two tokens with a space between; a first line `#version` is skipped.
fn parse_merges(path: &Path, text: &str) -> Result<Vec<(String, String)>> {
    let mut merges = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        match line.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
                merges.push((left.to_owned(), right.to_owned()));
            }
            _ => {
                return Err(invalid(
                    path,
                    format!("line {} is not two tokens with a space between", index + 1),
                ));
            }
        }
    }
    Ok(merges)
}

fn from_vocabulary(directory: &Path, path: &Path, ids: Vocab, merges: Vec<(String, String)>) -> Result<Tokenizer> {
    let config_path = directory.join("tokenizer_config.json");
    let config = tokenizer_config(directory)?;
    let family = family_of(&config)?;
    let has_end = ids.contains_key(END_OF_TEXT);
    let builder = bpe_builder(ids, merges).map_err(|reason| invalid(path, reason))?;
    let model = builder
        .build()
        .map_err(|error| invalid(path, format!("it does not fit the vocabulary: {error}")))?;
    let mut inner = tokenizers::Tokenizer::new(ModelWrapper::BPE(model));
    let failed = |error: tokenizers::Error| invalid(&config_path, format!("its tokens cannot be used: {error}"));
    inner.with_normalizer(family.normalizer()).map_err(failed)?;
    if family == Family::Gpt2 {
        let prefix = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
        inner.with_pre_tokenizer(Some(ByteLevel::new(prefix, true, true)));
    } else {
        inner.with_pre_tokenizer(Some(family.pre_tokenizer()?));
    }
    inner.with_decoder(Some(ByteLevel::new(false, true, true)));
    if has_end {
        inner
            .add_special_tokens([AddedToken::from(END_OF_TEXT, true)])
            .map_err(failed)?;
    }
    inner.add_tokens(added_tokens(directory, &config)?).map_err(failed)?;
    Tokenizer::new(inner)
}

/// The split rules of a tokenizer class; the files themselves do not tell.
fn family_of(config: &Map<String, Value>) -> Result<Family> {
    match config.get("tokenizer_class").and_then(Value::as_str) {
        None | Some("GPT2Tokenizer" | "GPT2TokenizerFast") => Ok(Family::Gpt2),
        Some("Qwen2Tokenizer" | "Qwen2TokenizerFast") => Ok(Family::Qwen2),
        Some(other) => Err(Error::Unsupported(format!(
            "tokenizer_class {other} without a tokenizer.json is not served; save the tokenizer as tokenizer.json"
        ))),
    }
}

/// Tokens added after training, in the order of their ids: `added_tokens_decoder` of tokenizer_config.json, else
/// added_tokens.json.
fn added_tokens(directory: &Path, config: &Map<String, Value>) -> Result<Vec<AddedToken>> {
    let mut tokens = Vec::new();
    if let Some(Value::Object(decoder)) = config.get("added_tokens_decoder") {
        let path = directory.join("tokenizer_config.json");
        for (id, token) in decoder {
            let id: u64 = id
                .parse()
                .map_err(|_| invalid(&path, format!("added token {id:?} has no number")))?;
            let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
            let content = token.get("content").and_then(Value::as_str);
            let content = content.ok_or_else(|| invalid(&path, format!("added token {id} has no content")))?;
            let added = AddedToken::from(content, flag("special"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .normalized(flag("normalized"))
                .single_word(flag("single_word"));
            tokens.push((id, added));
        }
    } else {
        let path = directory.join("added_tokens.json");
        for (token, id) in read_json(&path)?
            .as_ref()
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let id = id
                .as_u64()
                .ok_or_else(|| invalid(&path, format!("the id of {token:?} is no token id")))?;
            tokens.push((id, AddedToken::from(token.clone(), false)));
        }
    }
    tokens.sort_by_key(|&(id, _)| id);
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}
