//! BERT's WordPiece (arXiv:1810.04805) from a `vocab.txt`: one token a line, its id the line's number from 0.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{AddedToken, ModelWrapper};

use super::wrapper::Tokenizer;
use crate::error::{Error, Result};

/// What begins a piece that goes on a word.
const PREFIX: &str = "##";
/// The special tokens: the field of `tokenizer_config.json` that renames each, and transformers' default.
const SPECIAL: [(&str, &str); 5] = [
    ("unk_token", "[UNK]"),
    ("sep_token", "[SEP]"),
    ("pad_token", "[PAD]"),
    ("cls_token", "[CLS]"),
    ("mask_token", "[MASK]"),
];

/// The tokenizer of a vocabulary, with the rules that `tokenizer_config.json` gives: texts are lower-cased unless
/// `do_lower_case` is false, and stand between `[CLS]` and `[SEP]` where the vocabulary has both.
///
/// # Errors
/// `InvalidFile` for a token that is there twice, or without the token for unknown words; `Unsupported` for the class of
/// another tokenizer.
pub(super) fn from_vocabulary(
    path: &Path,
    text: &str,
    config: &Map<String, Value>,
    added: Vec<AddedToken>,
) -> Result<Tokenizer> {
    match config.get("tokenizer_class").and_then(Value::as_str) {
        None | Some("BertTokenizer" | "BertTokenizerFast" | "DistilBertTokenizer" | "DistilBertTokenizerFast") => {}
        Some(other) => {
            return Err(Error::Unsupported(format!(
                "tokenizer_class {other} with a vocab.txt is not served; save the tokenizer as tokenizer.json"
            )));
        }
    }
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let mut ids = Vocab::new();
    for (id, token) in (0u32..).zip(text.lines()) {
        // An empty line has an id and no token.
        if !token.is_empty() && ids.insert(token.to_owned(), id).is_some() {
            return Err(invalid(format!(
                "line {} holds {token:?} a second time",
                u64::from(id) + 1
            )));
        }
    }
    let named = |field: &str, default: &str| -> String {
        let given = config.get(field);
        let given = given.and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
        given.unwrap_or(default).to_owned()
    };
    let [unknown, separator, padding, class, mask] = SPECIAL.map(|(field, default)| named(field, default));
    if !ids.contains_key(&unknown) {
        return Err(invalid(format!(
            "it does not hold {unknown:?}, the token of unknown words"
        )));
    }
    let around = ids.get(&separator).copied().zip(ids.get(&class).copied());
    let special = [&unknown, &separator, &padding, &class, &mask];
    let special: Vec<AddedToken> = special
        .into_iter()
        .filter(|token| ids.contains_key(token.as_str()))
        .map(|token| AddedToken::from(token.clone(), true))
        .collect();
    let model = WordPiece::builder()
        .vocab(ids)
        .unk_token(unknown)
        .continuing_subword_prefix(PREFIX.to_owned())
        .build()
        .map_err(|error| invalid(error.to_string()))?;
    let mut inner = tokenizers::Tokenizer::new(ModelWrapper::WordPiece(model));
    let flag = |field: &str| config.get(field).and_then(Value::as_bool);
    let lower_case = flag("do_lower_case").unwrap_or(true);
    let chinese = flag("tokenize_chinese_chars").unwrap_or(true);
    let normalizer = BertNormalizer::new(true, chinese, flag("strip_accents"), lower_case);
    let failed = |error: tokenizers::Error| invalid(format!("it cannot be used: {error}"));
    inner.with_normalizer(Some(normalizer)).map_err(failed)?;
    inner.with_pre_tokenizer(Some(BertPreTokenizer));
    inner.with_decoder(Some(WordPieceDecoder::new(PREFIX.to_owned(), true)));
    if let Some((separator_id, class_id)) = around {
        inner.with_post_processor(Some(BertProcessing::new((separator, separator_id), (class, class_id))));
    }
    inner.add_special_tokens(special).map_err(failed)?;
    inner.add_tokens(added).map_err(failed)?;
    Tokenizer::new(inner)
}
