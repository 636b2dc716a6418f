//! How the byte-level tokenizer families split a text into words before merging.

use serde_json::Value;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Result};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A family of byte-level tokenizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// GPT-2: contractions, letters, digits, others.
    Gpt2,
    /// StarCoder and SmolLM: GPT-2 with every digit on its own.
    SingleDigits,
    /// Llama 3: up to three digits together; whole words of the vocabulary before merges; adds a first token.
    Llama3,
    /// Qwen 2: every digit on its own; NFC.
    Qwen2,
}

/// Families by their name in GGUF's `tokenizer.ggml.pre`.
const FAMILIES: &[(&str, Family)] = &[
    ("default", Family::Gpt2),
    ("gpt-2", Family::Gpt2),
    ("gpt2", Family::Gpt2),
    ("mpt", Family::Gpt2),
    ("olmo", Family::Gpt2),
    ("phi-2", Family::Gpt2),
    ("smollm", Family::SingleDigits),
    ("starcoder", Family::SingleDigits),
    ("refact", Family::SingleDigits),
    ("codeshell", Family::SingleDigits),
    ("llama-bpe", Family::Llama3),
    ("llama3", Family::Llama3),
    ("llama-v3", Family::Llama3),
    ("qwen2", Family::Qwen2),
    ("deepseek-r1-qwen", Family::Qwen2),
];

impl Family {
    /// The family of a `tokenizer.ggml.pre`; a file without one is from before there were others than GPT-2's.
    ///
    /// # Errors
    /// `Unsupported` naming an unknown one: another split would give other tokens than the model was trained on.
    pub(super) fn from_gguf(pre: Option<&str>) -> Result<Self> {
        let pre = pre.unwrap_or("default");
        let known = || FAMILIES.iter().map(|&(name, _)| name).collect::<Vec<_>>().join(", ");
        match FAMILIES.iter().find(|&&(name, _)| name == pre) {
            Some(&(_, family)) => Ok(family),
            None => Err(Error::Unsupported(format!(
                "tokenizer.ggml.pre is {pre:?}, which is none of {}",
                known()
            ))),
        }
    }

    /// The split, then the byte alphabet.
    pub(super) fn pre_tokenizer(self) -> Result<PreTokenizerWrapper> {
        let bytes_only = ByteLevel::new(false, true, false);
        let sequence = match self {
            Self::Gpt2 => return Ok(ByteLevel::new(false, true, true).into()),
            Self::SingleDigits => vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()],
            Self::Llama3 => vec![split(LLAMA3)?, bytes_only.into()],
            Self::Qwen2 => vec![split(QWEN2)?, bytes_only.into()],
        };
        Ok(Sequence::new(sequence).into())
    }

    /// What happens to a text before it is split.
    pub(super) fn normalizer(self) -> Option<NormalizerWrapper> {
        (self == Self::Qwen2).then(|| NFC.into())
    }

    /// Whether a whole word of the vocabulary is taken without looking at merges.
    pub(super) fn ignores_merges(self) -> bool {
        self == Self::Llama3
    }
}

/// The name in GGUF of the rules of a byte-level `tokenizer.json`, given its `normalizer`, `pre_tokenizer` and `model`;
/// `None` if no family has them.
pub(crate) fn byte_level_family(normalizer: &Value, pre_tokenizer: &Value, model: &Value) -> Option<&'static str> {
    // One name of each family that llama.cpp knows; a family has several.
    const NAMES: [(&str, Family); 4] = [
        ("gpt-2", Family::Gpt2),
        ("smollm", Family::SingleDigits),
        ("llama-bpe", Family::Llama3),
        ("qwen2", Family::Qwen2),
    ];
    let ignores_merges = model["ignore_merges"].as_bool() == Some(true);
    let matches = |family: Family| {
        let rules = serde_json::to_value(family.pre_tokenizer().ok()?).ok()?;
        let before = serde_json::to_value(family.normalizer()).ok()?;
        let same = comparable(&rules) == comparable(pre_tokenizer) && before == *normalizer;
        (same && family.ignores_merges() == ignores_merges).then_some(())
    };
    NAMES
        .into_iter()
        .find_map(|(name, family)| matches(family).map(|()| name))
}

/// Rules without what does not change the tokens.
fn comparable(rules: &Value) -> Value {
    match rules {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(name, _)| name.as_str() != "trim_offsets");
            Value::Object(kept.map(|(name, value)| (name.clone(), comparable(value))).collect())
        }
        Value::Array(rules) => Value::Array(rules.iter().map(comparable).collect()),
        other => other.clone(),
    }
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper> {
    let split = Split::new(
        SplitPattern::Regex(pattern.to_owned()),
        SplitDelimiterBehavior::Isolated,
        false,
    );
    Ok(split
        .map_err(|error| Error::Unsupported(format!("tokenizer pattern: {error}")))?
        .into())
}
