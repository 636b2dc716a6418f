//! The tokens of a `tokenizer.json` as GGUF's arrays have them.

use std::collections::HashMap;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::formats::gguf::MetadataValue;
use crate::tokenizer::byte_of_token;

/// Values of `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Tokens in the order of their ids, one for each row of the embedding.
pub(super) struct Vocabulary {
    pub(super) tokens: Vec<String>,
    types: Vec<i64>,
    pub(super) merges: Vec<(String, String)>,
    pub(super) unknown: Option<String>,
}

/// An `Unsupported` error about the tokenizer.
pub(super) fn unsupported(reason: impl std::fmt::Display) -> Error {
    Error::Unsupported(format!("the tokenizer has no form in gguf: {reason}"))
}

impl Vocabulary {
    /// Reads the BPE model of a `tokenizer.json`; `rows` is the number of rows of the embedding.
    pub(super) fn read(tokenizer: &Value, rows: usize) -> Result<Self> {
        let model = &tokenizer["model"];
        let kind = model["type"].as_str().unwrap_or("BPE");
        let (Some(vocabulary), "BPE") = (model["vocab"].as_object(), kind) else {
            return Err(unsupported(format!("it is a {kind} and no BPE")));
        };
        let mut found = Self {
            // What llama.cpp's converter calls rows without a token.
            tokens: (0..rows).map(|id| format!("[PAD{id}]")).collect(),
            types: vec![UNUSED; rows],
            merges: Vec::new(),
            unknown: model["unk_token"].as_str().map(str::to_owned),
        };
        for (token, id) in vocabulary {
            let kind = match byte_of_token(token) {
                Some(_) if model["byte_fallback"].as_bool() == Some(true) => BYTE,
                _ if found.unknown.as_ref() == Some(token) => UNKNOWN,
                _ => NORMAL,
            };
            found.place(token, id, kind)?;
        }
        for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let special = token["special"].as_bool() == Some(true);
            let content = token["content"].as_str().unwrap_or_default();
            let kind = match special {
                true if found.unknown.as_deref() == Some(content) => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            found.place(content, &token["id"], kind)?;
        }
        for merge in model["merges"].as_array().into_iter().flatten() {
            let pair = match merge {
                Value::String(text) => text.split_once(' '),
                pair => pair[0].as_str().zip(pair[1].as_str()),
            };
            let (left, right) = pair.ok_or_else(|| unsupported(format!("its merge {merge} is no pair")))?;
            found.merges.push((left.to_owned(), right.to_owned()));
        }
        Ok(found)
    }

    fn place(&mut self, token: &str, id: &Value, kind: i64) -> Result<()> {
        let rows = self.tokens.len();
        let index = id.as_u64().map(|id| id as usize).filter(|id| *id < rows);
        let index =
            index.ok_or_else(|| unsupported(format!("token {token:?} has id {id}, the embedding {rows} rows")))?;
        self.tokens[index] = token.to_owned();
        self.types[index] = kind;
        Ok(())
    }

    /// The id of a token.
    pub(super) fn id(&self, token: &str) -> Option<usize> {
        self.tokens.iter().position(|known| known == token)
    }

    /// `tokenizer.ggml.tokens` and `tokenizer.ggml.token_type`.
    pub(super) fn arrays(&self) -> [(String, MetadataValue); 2] {
        [
            (
                "tokenizer.ggml.tokens".to_owned(),
                MetadataValue::Strings(self.tokens.clone()),
            ),
            (
                "tokenizer.ggml.token_type".to_owned(),
                MetadataValue::Integers(self.types.clone()),
            ),
        ]
    }

    /// `tokenizer.ggml.merges`: two tokens with a space between.
    pub(super) fn merges_array(&self) -> Result<(String, MetadataValue)> {
        if let Some((left, right)) = self.merges.iter().find(|(l, r)| l.contains(' ') || r.contains(' ')) {
            return Err(unsupported(format!(
                "the merge of {left:?} and {right:?} holds a space"
            )));
        }
        let merges = self.merges.iter().map(|(left, right)| format!("{left} {right}"));
        Ok((
            "tokenizer.ggml.merges".to_owned(),
            MetadataValue::Strings(merges.collect()),
        ))
    }

    /// `tokenizer.ggml.scores`: a token that an earlier merge makes has a higher one; what no merge makes, the lowest.
    pub(super) fn scores_array(&self) -> (String, MetadataValue) {
        let mut ranks: HashMap<String, usize> = HashMap::with_capacity(self.merges.len());
        for (rank, (left, right)) in self.merges.iter().enumerate() {
            ranks.entry(format!("{left}{right}")).or_insert(rank);
        }
        let score = |token: &String| match ranks.get(token) {
            Some(rank) => -(*rank as f64),
            None => -(self.merges.len() as f64) - 1.0,
        };
        let scores = self.tokens.iter().map(score).collect();
        ("tokenizer.ggml.scores".to_owned(), MetadataValue::Floats(scores))
    }
}
