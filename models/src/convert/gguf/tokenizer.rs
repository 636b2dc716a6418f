//! The tokenizer of a model as GGUF's metadata, checked by reading it back.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::metadata::{Metadata, integer};
use super::vocabulary::{Vocabulary, unsupported};
use crate::convert::plan::Conversion;
use crate::error::Result;
use crate::formats::gguf::{GgufMetadata, MetadataValue};
use crate::opened::ModelFiles;
use crate::tokenizer::{Tokenizer, byte_level_family};

/// Texts on which the tokenizer that is written must agree with the model's own.
const SAMPLES: [&str; 10] = [
    "Hello world",
    " leading, and  double   spaces ",
    "It's 1,234.5 or 2024-11-23; they'll see (naïvely).",
    "größer ≥ straße, e\u{301}, ﬁ",
    "漢字とかな 한국어 العربية हिन्दी",
    "😀👩‍👩‍👧 ok\u{7f}\u{1}",
    "tab\tnew\nline\r\n\n  indented",
    "def f(x):\n    return x**2 != 0x1F",
    "\u{a0}nbsp\u{2003}em",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// The tokenizer's part of the metadata.
///
/// # Errors
/// `Unsupported` for a tokenizer that llama.cpp has no form for.
pub(super) fn metadata(conversion: &Conversion) -> Result<Metadata> {
    let (model, rows) = (&conversion.model, conversion.model.config.vocabulary);
    let Some(tokenizer) = &model.text.tokenizer else {
        return Ok(Metadata::from([(
            "tokenizer.ggml.model".to_owned(),
            MetadataValue::String("no_vocab".to_owned()),
        )]));
    };
    let json: Value = serde_json::from_str(&tokenizer.to_json()?).map_err(unsupported)?;
    let vocabulary = Vocabulary::read(&json, rows)?;
    let mut metadata: Metadata = vocabulary.arrays().into_iter().collect();
    let mut put = |key: &str, value: MetadataValue| drop(metadata.insert(format!("tokenizer.ggml.{key}"), value));
    let text = |value: &str| MetadataValue::String(value.to_owned());
    match is_byte_level(&json) {
        true => {
            let family = byte_level_family(&json["normalizer"], &json["pre_tokenizer"], &json["model"])
                .ok_or_else(|| unsupported("its rules for splitting a text are none that llama.cpp has a name for"))?;
            put("model", text("gpt2"));
            put("pre", text(family));
            let (_, merges) = vocabulary.merges_array()?;
            put("merges", merges);
        }
        false => {
            put("model", text("llama"));
            put("pre", text("default"));
            put("scores", vocabulary.scores_array().1);
            let prepends = json["normalizer"].to_string().contains("Prepend")
                || json["pre_tokenizer"]["prepend_scheme"]
                    .as_str()
                    .is_some_and(|scheme| scheme != "never");
            put("add_space_prefix", MetadataValue::Boolean(prepends));
        }
    }
    special_tokens(conversion, tokenizer, &vocabulary, &mut metadata)?;
    if let Some(template) = &model.text.chat_template {
        let template = MetadataValue::String(template.source().to_owned());
        metadata.insert("tokenizer.chat_template".to_owned(), template);
    }
    check(tokenizer, &metadata)?;
    Ok(metadata)
}

fn is_byte_level(json: &Value) -> bool {
    json["decoder"].to_string().contains("ByteLevel")
}

/// First and last tokens, and those that end a generation.
fn special_tokens(
    conversion: &Conversion,
    tokenizer: &Tokenizer,
    vocabulary: &Vocabulary,
    metadata: &mut Metadata,
) -> Result<()> {
    let mut put = |key: &str, value: MetadataValue| drop(metadata.insert(format!("tokenizer.ggml.{key}"), value));
    let (plain, whole) = (tokenizer.encode_without_special_tokens("a")?, tokenizer.encode("a")?);
    let start = whole.windows(plain.len().max(1)).position(|window| window == plain);
    let start = start.ok_or_else(|| unsupported("it changes a text by its special tokens"))?;
    let (before, behind) = (&whole[..start], &whole[start + plain.len()..]);
    if before.len() > 1 || behind.len() > 1 {
        return Err(unsupported("it puts several special tokens before or behind a text"));
    }
    let named = named_tokens(conversion)?;
    let id_of = |name: &str| named.get(name).and_then(|token| vocabulary.id(token));
    let mut ends: Vec<usize> = conversion.model.text.end_tokens.iter().map(|id| *id as usize).collect();
    let first = before.first().map(|id| *id as usize).or_else(|| id_of("bos_token"));
    let last = behind.first().map(|id| *id as usize);
    let last = last.or_else(|| id_of("eos_token")).or_else(|| ends.first().copied());
    ends.retain(|id| Some(*id) != last);
    put("add_bos_token", MetadataValue::Boolean(!before.is_empty()));
    put("add_eos_token", MetadataValue::Boolean(!behind.is_empty()));
    let unknown = vocabulary.unknown.as_ref().and_then(|token| vocabulary.id(token));
    for (key, id) in [
        ("bos_token_id", first),
        ("eos_token_id", last),
        ("eot_token_id", ends.first().copied()),
        ("eom_token_id", ends.get(1).copied()),
        ("unknown_token_id", unknown),
        ("padding_token_id", id_of("pad_token")),
    ] {
        if let Some(id) = id {
            put(key, integer(id));
        }
    }
    match ends.len() > 2 {
        true => Err(unsupported("more than three tokens end a generation")),
        false => Ok(()),
    }
}

/// The special tokens that tokenizer_config.json names.
fn named_tokens(conversion: &Conversion) -> Result<BTreeMap<String, String>> {
    let ModelFiles::HuggingFace(files) = &conversion.model.files else {
        let template = conversion.model.text.chat_template.as_ref();
        let token = |name: &str, token: Option<&str>| Some((name.to_owned(), token?.to_owned()));
        let first = token("bos_token", template.and_then(|template| template.bos()));
        let last = token("eos_token", template.and_then(|template| template.eos()));
        return Ok(first.into_iter().chain(last).collect());
    };
    let text = files.document("tokenizer_config.json")?.unwrap_or_default();
    // It has been parsed before, for the chat template.
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    let token = |name: &&str| {
        let token = &config[*name];
        let content = token.as_str().or_else(|| token["content"].as_str())?;
        Some(((*name).to_owned(), content.to_owned()))
    };
    Ok(["bos_token", "eos_token", "pad_token"]
        .iter()
        .filter_map(token)
        .collect())
}

/// Reads the metadata back and compares the tokens of the samples.
fn check(tokenizer: &Tokenizer, metadata: &Metadata) -> Result<()> {
    let metadata = GgufMetadata::new(Path::new("the gguf file"), metadata.clone());
    let Some(written) = Tokenizer::from_gguf(&metadata)? else {
        return Err(unsupported("it is not read back"));
    };
    for sample in SAMPLES {
        if written.encode(sample)? != tokenizer.encode(sample)? {
            return Err(unsupported(format!("{sample:?} would become other tokens")));
        }
    }
    Ok(())
}
