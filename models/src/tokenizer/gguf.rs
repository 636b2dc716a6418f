//! The tokenizer in a GGUF file's metadata.

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BpeBuilder, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence as NormalizerSequence;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, ModelWrapper, NormalizerWrapper};

use super::merges::bpe_builder;
use super::pre_tokenizer::Family;
use super::sentencepiece::merges_of;
use super::token_bytes::fallback_byte;
use super::wrapper::Tokenizer;
use crate::error::{Error, Result};
use crate::formats::GgufMetadata;

/// Values of `tokenizer.ggml.token_type`.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;
/// Longest token, in bytes.
const MAX_TOKEN_BYTES: usize = 1 << 16;

impl Tokenizer {
    /// The tokenizer of a GGUF file; `None` if it carries none.
    ///
    /// It gives the tokens of the Hugging Face tokenizer that the file was converted from. A first or last token is
    /// added as `add_bos_token` and `add_eos_token` say; where they are absent, a first one for SentencePiece and for
    /// Llama 3.
    ///
    /// # Errors
    /// `InvalidFile` for metadata that contradicts itself; `Unsupported` for a kind or a split of unknown name.
    pub fn from_gguf(metadata: &GgufMetadata) -> Result<Option<Self>> {
        match metadata.string("tokenizer.ggml.model")? {
            None | Some("none" | "no_vocab") => Ok(None),
            Some("gpt2") => byte_level(&Vocabulary::read(metadata)?).map(Some),
            Some("llama") => sentencepiece(&Vocabulary::read(metadata)?).map(Some),
            Some(other) => Err(Error::Unsupported(format!(
                "tokenizer.ggml.model is {other:?} in {}; gpt2 and llama are served",
                metadata.path().display()
            ))),
        }
    }
}

/// The arrays of the metadata, checked against each other.
struct Vocabulary<'a> {
    metadata: &'a GgufMetadata,
    tokens: &'a [String],
    types: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a GgufMetadata) -> Result<Self> {
        let tokens = metadata.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
        let types = metadata
            .unsigneds("tokenizer.ggml.token_type")?
            .unwrap_or_else(|| vec![1; tokens.len()]);
        let vocabulary = Self {
            metadata,
            tokens,
            types,
        };
        if tokens.is_empty() {
            return Err(vocabulary.invalid("tokenizer.ggml.tokens is missing or empty"));
        }
        if vocabulary.types.len() != tokens.len() {
            let (types, tokens) = (vocabulary.types.len(), tokens.len());
            return Err(vocabulary.invalid(format!(
                "tokenizer.ggml.token_type has {types} elements for {tokens} tokens"
            )));
        }
        if let Some(index) = tokens.iter().position(|token| token.len() > MAX_TOKEN_BYTES) {
            let length = tokens[index].len();
            return Err(vocabulary.invalid(format!(
                "token {index} has {length} bytes; at most {MAX_TOKEN_BYTES} are allowed"
            )));
        }
        Ok(vocabulary)
    }

    fn invalid(&self, reason: impl Into<String>) -> Error {
        Error::invalid_file(self.metadata.path(), reason)
    }

    /// Token to id.
    fn ids(&self) -> Result<Vocab> {
        let mut ids = Vocab::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.clone(), id as u32) {
                return Err(self.invalid(format!("tokens {first} and {id} are both {token:?}")));
            }
        }
        Ok(ids)
    }

    /// `tokenizer.ggml.merges`, each two tokens with a space between.
    fn merges(&self) -> Result<Option<Vec<(String, String)>>> {
        let Some(merges) = self.metadata.strings("tokenizer.ggml.merges")? else {
            return Ok(None);
        };
        let split = |merge: &String| match merge.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok((left.to_owned(), right.to_owned())),
            _ => Err(self.invalid(format!("merge {merge:?} is not two tokens with a space between"))),
        };
        merges.iter().map(split).collect::<Result<_>>().map(Some)
    }

    /// The token whose id a key holds.
    fn token(&self, key: &str) -> Result<Option<(u32, &'a str)>> {
        let Some(id) = self.metadata.unsigned(key)? else {
            return Ok(None);
        };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        let token =
            token.ok_or_else(|| self.invalid(format!("{key} is {id}, but there are {} tokens", self.tokens.len())))?;
        Ok(Some((id as u32, token)))
    }

    fn builder(&self, merges: Vec<(String, String)>) -> Result<BpeBuilder> {
        bpe_builder(self.ids()?, merges).map_err(|reason| self.invalid(reason))
    }

    fn build(&self, builder: BpeBuilder) -> Result<tokenizers::Tokenizer> {
        let model = builder
            .build()
            .map_err(|error| self.invalid(format!("its tokenizer is damaged: {error}")))?;
        Ok(tokenizers::Tokenizer::new(ModelWrapper::BPE(model)))
    }

    /// Adds the tokens that are matched in the text before anything else, and the processor that adds first and last
    /// tokens.
    fn finish(&self, mut inner: tokenizers::Tokenizer, adds_first: bool) -> Result<Tokenizer> {
        let failed = |error: tokenizers::Error| self.invalid(format!("its special tokens cannot be used: {error}"));
        let of_type = |wanted: u64| {
            self.tokens
                .iter()
                .zip(&self.types)
                .filter(move |(_, kind)| **kind == wanted)
        };
        let mut special: Vec<AddedToken> = of_type(CONTROL)
            .chain(of_type(UNKNOWN))
            .map(|(token, _)| AddedToken::from(token.clone(), true))
            .collect();
        for key in ["bos", "eos", "eot", "eom", "unknown", "padding", "separator"] {
            let token = self.token(&format!("tokenizer.ggml.{key}_token_id"))?;
            special.extend(token.map(|(_, token)| AddedToken::from(token, true)));
        }
        inner
            .add_special_tokens(special.into_iter().map(|token| token.normalized(false)))
            .map_err(failed)?;
        let defined = of_type(USER_DEFINED).map(|(token, _)| AddedToken::from(token.clone(), false).normalized(false));
        inner.add_tokens(defined).map_err(failed)?;

        let first = self
            .metadata
            .boolean("tokenizer.ggml.add_bos_token")?
            .unwrap_or(adds_first);
        let last = self.metadata.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        let first = if first {
            self.token("tokenizer.ggml.bos_token_id")?
        } else {
            None
        };
        let last = if last {
            self.token("tokenizer.ggml.eos_token_id")?
        } else {
            None
        };
        if first.is_some() || last.is_some() {
            inner.with_post_processor(Some(self.processor(first, last)?));
        }
        Tokenizer::new(inner)
    }

    fn processor(&self, first: Option<(u32, &str)>, last: Option<(u32, &str)>) -> Result<TemplateProcessing> {
        // Named roles instead of the tokens' own texts, which may hold what the template syntax gives a meaning.
        let role = |name: &str, token: Option<(u32, &str)>| {
            token.map(|(id, text)| {
                let special = serde_json::json!({"id": name, "ids": [id], "tokens": [text]});
                let piece = serde_json::json!({"SpecialToken": {"id": name, "type_id": 0}});
                (name.to_owned(), special, piece)
            })
        };
        let (first, last) = (role("first", first), role("last", last));
        let text = |id: &str| serde_json::json!({"Sequence": {"id": id, "type_id": 0}});
        let around = |id: &str| {
            let pieces = first.iter().map(|(_, _, piece)| piece.clone()).chain([text(id)]);
            pieces
                .chain(last.iter().map(|(_, _, piece)| piece.clone()))
                .collect::<Vec<_>>()
        };
        let single = around("A");
        let pair = [around("A"), around("B")].concat();
        let tokens: serde_json::Map<_, _> = first
            .iter()
            .chain(&last)
            .map(|(name, special, _)| (name.clone(), special.clone()))
            .collect();
        let json =
            serde_json::json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens});
        serde_json::from_value(json)
            .map_err(|error| self.invalid(format!("its special tokens cannot be used: {error}")))
    }
}

/// `gpt2`: byte-level BPE with merges.
fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer> {
    let family = Family::from_gguf(vocabulary.metadata.string("tokenizer.ggml.pre")?)?;
    let merges = vocabulary
        .merges()?
        .ok_or_else(|| vocabulary.invalid("tokenizer.ggml.merges is missing"))?;
    let builder = vocabulary.builder(merges)?.ignore_merges(family.ignores_merges());
    let mut inner = vocabulary.build(builder)?;
    inner
        .with_normalizer(family.normalizer())
        .map_err(|error| Error::Unsupported(format!("tokenizer normalizer: {error}")))?;
    inner.with_pre_tokenizer(Some(family.pre_tokenizer()?));
    inner.with_decoder(Some(ByteLevel::new(false, true, true)));
    vocabulary.finish(inner, family == Family::Llama3)
}

/// `llama`: SentencePiece BPE with scores and byte tokens.
fn sentencepiece(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer> {
    let metadata = vocabulary.metadata;
    let scores = metadata
        .floats("tokenizer.ggml.scores")?
        .ok_or_else(|| vocabulary.invalid("tokenizer.ggml.scores is missing"))?;
    if scores.len() != vocabulary.tokens.len() || scores.iter().any(|score| score.is_nan()) {
        return Err(vocabulary.invalid("tokenizer.ggml.scores does not hold one number for each token"));
    }
    // Control, user-defined, unknown and byte tokens never come out of joining.
    let joinable = |id: usize| !matches!(vocabulary.types[id], UNKNOWN | CONTROL | USER_DEFINED | BYTE);
    let merges = merges_of(vocabulary.tokens, &scores, joinable);
    let mut builder = vocabulary.builder(merges)?.fuse_unk(true);
    let has_bytes = vocabulary
        .tokens
        .iter()
        .filter(|token| fallback_byte(token).is_some())
        .count()
        == 256;
    builder = builder.byte_fallback(has_bytes);
    if let Some((_, unknown)) = vocabulary.token("tokenizer.ggml.unknown_token_id")? {
        builder = builder.unk_token(unknown.to_owned());
    }
    let mut inner = vocabulary.build(builder)?;
    let adds_space = metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let failed = |error: tokenizers::Error| Error::Unsupported(format!("tokenizer rules: {error}"));
    let replace = || Replace::new(" ", "▁").map_err(failed);
    // transformers' original layout for Llama: the space goes before every stretch of text between special tokens.
    let normalizer: NormalizerWrapper = if adds_space {
        NormalizerSequence::new(vec![Prepend::new("▁".to_owned()).into(), replace()?.into()]).into()
    } else {
        replace()?.into()
    };
    inner.with_normalizer(Some(normalizer)).map_err(failed)?;
    let replace = Replace::new("▁", " ").map_err(failed)?;
    let mut decoders = vec![replace.into(), ByteFallback::new().into(), Fuse::new().into()];
    if adds_space {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(DecoderSequence::new(decoders)));
    vocabulary.finish(inner, true)
}
