//! The tokenizer that everything else uses.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use tokenizers::ModelWrapper;

use super::token_bytes::TokenBytes;
use crate::constraint::ConstraintVocabulary;
use crate::error::{Error, Result};

/// Text to tokens and back.
///
/// Special tokens that are written out in a text (`<|endoftext|>`) become those tokens, as in transformers.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bytes: TokenBytes,
    /// Made when the first response format is compiled.
    constraints: OnceLock<Arc<ConstraintVocabulary>>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("vocabulary_size", &self.vocabulary_size())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Takes over a tokenizer: checks that its decoder is one that can be undone token by token.
    pub(super) fn new(mut inner: tokenizers::Tokenizer) -> Result<Self> {
        // Settings for training batches, which would cut or pad prompts, and draw tokens at random.
        inner
            .with_truncation(None)
            .map_err(|error| Error::Unsupported(format!("tokenizer: {error}")))?;
        inner.with_padding(None);
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some()
        {
            let mut model = model.clone();
            model.dropout = None;
            inner.with_model(ModelWrapper::BPE(model));
        }
        let bytes = TokenBytes::new(&inner)?;
        Ok(Self {
            inner,
            bytes,
            constraints: OnceLock::new(),
        })
    }

    /// Reads the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// `InvalidFile` if it is damaged, `Unsupported` if its decoder is none of byte-level, SentencePiece's and
    /// WordPiece's.
    pub fn from_json(json: &str) -> Result<Self> {
        let invalid = |reason: String| Error::InvalidFile {
            path: "tokenizer.json".to_owned(),
            reason,
        };
        // The library's parser is not made for hostile files and has been seen to panic on some.
        let parsed = catch_unwind(|| tokenizers::Tokenizer::from_bytes(json.as_bytes()))
            .map_err(|_| invalid("it cannot be understood".to_owned()))?;
        Self::new(parsed.map_err(|error| invalid(error.to_string()))?)
    }

    /// The text of a `tokenizer.json` that `from_json` reads back to the same tokenizer.
    ///
    /// # Errors
    /// `Unsupported` if the library cannot write it.
    pub fn to_json(&self) -> Result<String> {
        self.inner
            .to_string(false)
            .map_err(|error| Error::Unsupported(format!("the tokenizer cannot be saved: {error}")))
    }

    /// The tokens of a text, with the special tokens that the model's own tokenizer adds around it by default (Llama's
    /// beginning of sequence; nothing for GPT-2).
    ///
    /// # Errors
    /// `InvalidArgument` if the tokenizer fails on the text, which a complete vocabulary never does.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// The tokens of a text and nothing around it: for prompts that a chat template has rendered.
    ///
    /// # Errors
    /// As `encode`.
    pub fn encode_without_special_tokens(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let failed =
            |reason: &str| Error::InvalidArgument(format!("the model's tokenizer fails on the text: {reason}"));
        let encoding = catch_unwind(AssertUnwindSafe(|| self.inner.encode_fast(text, add_special_tokens)))
            .map_err(|_| failed("its vocabulary or rules are broken"))?
            .map_err(|error| failed(&error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special tokens written out; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// `InvalidArgument` for an id outside the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.decode_filtered(tokens, |_| true)
    }

    /// The text of tokens without special tokens: what a reader of a completion sees.
    ///
    /// # Errors
    /// As `decode`.
    pub fn decode_skipping_special_tokens(&self, tokens: &[u32]) -> Result<String> {
        self.decode_filtered(tokens, |token| !self.is_special(token))
    }

    fn decode_filtered(&self, tokens: &[u32], keep: impl Fn(u32) -> bool) -> Result<String> {
        let mut bytes = Vec::new();
        let mut at_start = true;
        for &token in tokens {
            self.check(token)?;
            if keep(token) {
                bytes.extend_from_slice(self.bytes.get(token, at_start));
                at_start = false;
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes that a token stands for, in the middle of a text. Empty for an id that no token has.
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        self.bytes.get(token, false)
    }

    /// The bytes of a token; `at_start` where nothing but special tokens comes before it: SentencePiece tokenizers that
    /// put a space before a text take it away again there.
    pub(crate) fn bytes_at(&self, token: u32, at_start: bool) -> &[u8] {
        self.bytes.get(token, at_start)
    }

    /// The vocabulary as response formats are compiled against it; made at the first call and kept.
    ///
    /// # Errors
    /// `Unsupported` if the vocabulary cannot be used so.
    pub fn constraint_vocabulary(&self) -> Result<Arc<ConstraintVocabulary>> {
        if let Some(made) = self.constraints.get() {
            return Ok(Arc::clone(made));
        }
        let made = Arc::new(ConstraintVocabulary::new(self)?);
        Ok(Arc::clone(self.constraints.get_or_init(|| made)))
    }

    /// The text of a token on its own; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// `InvalidArgument` for an id outside the vocabulary.
    pub fn token_text(&self, token: u32) -> Result<String> {
        self.check(token)?;
        Ok(String::from_utf8_lossy(self.token_bytes(token)).into_owned())
    }

    /// One more than the largest token id.
    pub fn vocabulary_size(&self) -> usize {
        self.bytes.len()
    }

    /// Whether a token is special: written out in `decode`, absent from completions.
    pub fn is_special(&self, token: u32) -> bool {
        self.bytes.is_special(token)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub(super) fn check(&self, token: u32) -> Result<()> {
        let size = self.vocabulary_size();
        if (token as usize) < size {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "token id {token} is outside the vocabulary of {size} tokens"
        )))
    }
}
